"""What DeepSeek-V2 and V3 share beside attention: which layers have experts."""

from __future__ import annotations

from typing import Any, Final

from skimp.model.families import common
from skimp.model.families.reader import ConfigReader
from skimp.model.spec import ModelSpec

EXPERT_FIELDS: Final = (
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "moe_layer_freq",
    "n_group",
    "topk_group",
    "topk_method",
    "scoring_func",
    "norm_topk_prob",
    "routed_scaling_factor",
    "aux_loss_alpha",
    "seq_aux",
    "ep_size",
)
# Modules that draft further tokens from the last layer's states: not part of the decoder.
DRAFT_FIELDS: Final = ("num_nextn_predict_layers", "num_mtp_layers")


def read_experts(read: ConfigReader, sizes: common.Sizes, *, first: int) -> None:
    """Refuse layers of experts; their fields are kept where no layer has any. ``first`` is the
    class's default of the first layer that has."""
    first = read.integer("first_k_dense_replace", first, least=0)
    for name in (*EXPERT_FIELDS, *DRAFT_FIELDS):
        read.raw(name)
        read.keep(name)
    if first < sizes.num_layers:
        raise read.refuse(
            f"first_k_dense_replace={first} of {sizes.num_layers} layers: layers of experts are "
            "not supported"
        )


def write_dense(spec: ModelSpec) -> dict[str, Any]:
    """That no layer has experts, as other engines read it too: SGLang asks for a number of experts
    before it looks at ``first_k_dense_replace``, and both would build draft modules."""
    fields: dict[str, Any] = {"first_k_dense_replace": spec.num_layers}
    if "n_routed_experts" not in spec.config:
        fields |= {"n_routed_experts": 1, "n_shared_experts": 1, "num_experts_per_tok": 1}
        fields |= {"n_group": 1, "topk_group": 1, "moe_intermediate_size": 64}
    return fields
