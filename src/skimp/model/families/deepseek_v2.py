"""DeepSeek-V2 (2024): latent attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skimp.model.families import common, deepseek, latent
from skimp.model.families.common import llama_tensor_names as tensor_names
from skimp.model.families.common import stored_name
from skimp.model.families.reader import ConfigReader
from skimp.model.spec import ModelSpec

__all__ = ["stored_name", "tensor_names", "to_config", "to_spec"]


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    read = ConfigReader("deepseek_v2", config)
    sizes = latent.read_sizes(read, max_positions=2048)
    mixer = latent.read_mixer(read, sizes, interleaved=True)
    deepseek.read_experts(read, sizes, first=0)
    return common.make_spec(
        read,
        sizes,
        [mixer] * sizes.num_layers,
        activation=read.choice("hidden_act", "silu", common.ACTIVATIONS),
        ffn_bias=read.boolean("mlp_bias", False),
        bos=1,
        eos=2,
    )


def to_config(spec: ModelSpec) -> dict[str, Any]:
    config = latent.write(spec, "DeepseekV2ForCausalLM")
    config["mlp_bias"] = spec.layers[0].ffn.bias
    config |= deepseek.write_dense(spec)
    return common.checked(config, spec, to_spec)
