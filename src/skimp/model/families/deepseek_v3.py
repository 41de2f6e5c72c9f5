"""DeepSeek-V3 (2024): latent attention. With dense layers alone it is also the stock class for a
model whose keys and values were turned into latents."""

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
    read = ConfigReader("deepseek_v3", config)
    sizes = latent.read_sizes(read, max_positions=4096)
    mixer = latent.read_mixer(read, sizes, interleaved=read.boolean("rope_interleave", True))
    deepseek.read_experts(read, sizes, first=3)
    return common.make_spec(
        read,
        sizes,
        [mixer] * sizes.num_layers,
        activation=read.choice("hidden_act", "silu", common.ACTIVATIONS),
        bos=0,
        eos=1,
    )


def to_config(spec: ModelSpec) -> dict[str, Any]:
    config = latent.write(spec, "DeepseekV3ForCausalLM")
    config["rope_interleave"] = latent.interleaved(spec)
    config |= deepseek.write_dense(spec)
    return common.checked(config, spec, to_spec)
