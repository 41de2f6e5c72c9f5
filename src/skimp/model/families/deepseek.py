"""What DeepSeek-V2 and V3 share beside attention: mixtures of experts behind the first layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from skimp.errors import ConfigError
from skimp.model.families import common
from skimp.model.families.reader import ConfigReader
from skimp.model.spec import Activation, ExpertsSpec, FFNSpec, GatedFFNSpec, ModelSpec, RouterSpec

# Modules behind the last layer that draft further tokens: not part of the decoder.
DRAFT_FIELDS: Final = ("num_nextn_predict_layers", "num_mtp_layers")
# Of training alone.
LOSS_FIELDS: Final = ("aux_loss_alpha", "seq_aux", "ep_size")
EXPERT_FIELDS: Final = (
    *("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("n_group", "topk_group", "topk_method", "scoring_func"),
    *("norm_topk_prob", "routed_scaling_factor"),
)
DENSE: Final = {  # what a config without experts says of them, for engines that ask
    "n_routed_experts": 1,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 64,
}


def read_ffns(
    read: ConfigReader,
    sizes: common.Sizes,
    activation: Activation,
    *,
    router: RouterSpec,
    limited: bool = True,
    first: int,
    bias: bool = False,
    defaults: Mapping[str, int | None],
) -> list[FFNSpec]:
    """Each layer's; ``first`` is the class's default of the first layer with experts, ``router``
    has what the class fixes, ``defaults`` are those of the other fields. ``limited``: experts are
    chosen from the best groups."""
    first = read.integer("first_k_dense_replace", first, least=0)
    read.must_be("moe_layer_freq", 1)  # experts in every layer behind the first
    read.keep("moe_layer_freq")
    for name in (*DRAFT_FIELDS, *LOSS_FIELDS):
        if name in DRAFT_FIELDS and read.raw(name):
            read.warn(f"{name}: the modules that draft further tokens are not served")
        read.raw(name)
        read.keep(name)
    dense = GatedFFNSpec(
        intermediate_size=sizes.intermediate_size, activation=activation, bias=bias
    )
    if first >= sizes.num_layers:
        for name in EXPERT_FIELDS:
            read.raw(name)
            read.keep(name)
        return [dense] * sizes.num_layers

    def size(name: str) -> int:
        found = read.optional_integer(name, defaults[name], least=1)
        if found is None:
            raise read.refuse(f"{name} is missing")
        return found

    count, inner = size("n_routed_experts"), size("moe_intermediate_size")
    chosen = size("num_experts_per_tok")
    if count > common.MAX_EXPERTS or chosen > count:
        raise read.refuse(f"num_experts_per_tok={chosen} of n_routed_experts={count}")
    groups = read.optional_integer("n_group", defaults["n_group"], least=1) or 1
    kept = read.optional_integer("topk_group", defaults["topk_group"], least=1) or 1
    if not limited:
        groups = kept = 1
        read.keep("n_group")
        read.keep("topk_group")
    read.keep("intermediate_size")  # no layer may have it
    if count % groups or not kept <= groups or kept * (count // groups) < chosen:
        raise read.refuse(
            f"n_group={groups} and topk_group={kept} do not fit n_routed_experts={count} and "
            f"num_experts_per_tok={chosen}"
        )
    if router.group_score == "top2" and count // groups < 2:
        raise read.refuse(f"n_group={groups}: groups of one expert have no best two")
    shared = read.integer("n_shared_experts", defaults["n_shared_experts"]) * inner
    experts = ExpertsSpec(
        num_experts=count,
        experts_per_token=chosen,
        intermediate_size=inner,
        activation=activation,
        router=replace(
            router,
            groups=groups,
            groups_chosen=kept,
            scale=read.number("routed_scaling_factor", router.scale),
        ),
        shared=GatedFFNSpec(intermediate_size=shared, activation=activation, bias=bias),
    )
    return [dense if i < first else experts for i in range(sizes.num_layers)]


def write_ffns(spec: ModelSpec) -> dict[str, Any]:
    """The fields that :func:`read_ffns` reads. Without experts they are written nevertheless:
    SGLang asks for their number before it looks at ``first_k_dense_replace``."""
    kinds = [isinstance(layer.ffn, ExpertsSpec) for layer in spec.layers]
    first = kinds.index(True) if any(kinds) else spec.num_layers
    fields: dict[str, Any] = {"first_k_dense_replace": first}
    if not any(kinds):
        return fields | {name: spec.config.get(name, value) for name, value in DENSE.items()}
    if not all(kinds[first:]):
        raise ConfigError(f"model_type={spec.family!r} has experts in every layer behind the first")
    experts = spec.layers[first].ffn
    assert isinstance(experts, ExpertsSpec)
    if experts.shared is None or experts.shared.intermediate_size % experts.intermediate_size:
        raise ConfigError(f"model_type={spec.family!r} has shared experts of an expert's size")
    if first == 0:  # the class wants a width even so
        width = spec.config.get("intermediate_size", experts.intermediate_size)
        fields["intermediate_size"] = width
    router = experts.router
    groups = {"n_group": router.groups, "topk_group": router.groups_chosen}
    return fields | {
        "n_routed_experts": experts.num_experts,
        "n_shared_experts": experts.shared.intermediate_size // experts.intermediate_size,
        "num_experts_per_tok": experts.experts_per_token,
        "moe_intermediate_size": experts.intermediate_size,
        **{n: value for n, value in groups.items() if value > 1 or n not in spec.config},
        "routed_scaling_factor": router.scale,
        "norm_topk_prob": router.normalize,
    }


def stored_name(name: str, spec: ModelSpec) -> str | None:
    """Modules that draft lie behind the last layer, as layers of higher numbers."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer is not None and int(layer[1]) >= spec.num_layers:
        return None
    return common.stored_name(name, spec)
