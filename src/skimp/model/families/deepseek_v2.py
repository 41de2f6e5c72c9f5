"""DeepSeek-V2 (2024): latent attention and mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from skimp.model.families import common, deepseek, latent
from skimp.model.families.common import llama_tensor_names as tensor_names
from skimp.model.families.deepseek import stored_name
from skimp.model.families.reader import ConfigReader
from skimp.model.spec import ExpertsSpec, ModelSpec, RouterSpec

__all__ = ["stored_name", "tensor_names", "to_config", "to_spec"]

LIMITED: Final = "group_limited_greedy"
DEFAULTS: Final = {
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": None,
    "moe_intermediate_size": 1407,
    "n_group": None,
    "topk_group": None,
}


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    read = ConfigReader("deepseek_v2", config)
    sizes = latent.read_sizes(read, max_positions=2048)
    mixer = latent.read_mixer(read, sizes, interleaved=True)
    activation = read.choice("hidden_act", "silu", common.ACTIVATIONS)
    limited = read.choice("topk_method", "greedy", {"greedy": False, LIMITED: True})
    read.must_be("scoring_func", "softmax")
    read.keep("scoring_func")
    read.must_be("norm_topk_prob", False)
    return common.make_spec(
        read,
        sizes,
        [mixer] * sizes.num_layers,
        activation=activation,
        ffns=deepseek.read_ffns(
            read,
            sizes,
            activation,
            router=RouterSpec(),
            limited=limited,
            first=0,
            bias=read.boolean("mlp_bias", False),
            defaults=DEFAULTS,
        ),
        bos=1,
        eos=2,
    )


def to_config(spec: ModelSpec) -> dict[str, Any]:
    config = latent.write(spec, "DeepseekV2ForCausalLM")
    ffn = spec.layers[0].ffn
    shared = ffn.shared if isinstance(ffn, ExpertsSpec) else ffn
    config["mlp_bias"] = shared is not None and shared.bias
    groups = [f.router.groups for f in (x.ffn for x in spec.layers) if isinstance(f, ExpertsSpec)]
    config["topk_method"] = LIMITED if max(groups, default=1) > 1 else "greedy"
    config |= deepseek.write_ffns(spec)
    return common.checked(config, spec, to_spec)
