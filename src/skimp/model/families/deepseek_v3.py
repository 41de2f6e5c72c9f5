"""DeepSeek-V3 (2024): latent attention and mixtures of experts. With dense layers alone it is also
the stock class for a model whose keys and values were turned into latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from skimp.model.families import common, deepseek, latent
from skimp.model.families.common import llama_tensor_names as tensor_names
from skimp.model.families.deepseek import stored_name
from skimp.model.families.reader import ConfigReader
from skimp.model.spec import ModelSpec, RouterSpec

__all__ = ["stored_name", "tensor_names", "to_config", "to_spec"]

DEFAULTS: Final = {
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "topk_group": 4,
}


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    read = ConfigReader("deepseek_v3", config)
    sizes = latent.read_sizes(read, max_positions=4096)
    mixer = latent.read_mixer(read, sizes, interleaved=read.boolean("rope_interleave", True))
    activation = read.choice("hidden_act", "silu", common.ACTIVATIONS)
    for name, value in (("topk_method", "noaux_tc"), ("scoring_func", "sigmoid")):
        read.must_be(name, value)
        read.keep(name)
    router = RouterSpec(
        scoring="sigmoid",
        correction=True,
        group_score="top2",
        normalize=read.boolean("norm_topk_prob", True),
        normalize_eps=1e-20,
        scale=2.5,  # unless the config says
    )
    return common.make_spec(
        read,
        sizes,
        [mixer] * sizes.num_layers,
        activation=activation,
        ffns=deepseek.read_ffns(read, sizes, activation, router=router, first=3, defaults=DEFAULTS),
        bos=0,
        eos=1,
    )


def to_config(spec: ModelSpec) -> dict[str, Any]:
    config = latent.write(spec, "DeepseekV3ForCausalLM")
    config["rope_interleave"] = latent.interleaved(spec)
    config |= deepseek.write_ffns(spec)
    if not any(name in config for name in deepseek.DRAFT_FIELDS):
        config["num_nextn_predict_layers"] = 0  # one, unless it is said
    return common.checked(config, spec, to_spec)
