"""Youtu-LLM (Tencent 2026): dense layers with latent attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skimp.model.families import common, latent
from skimp.model.families.common import llama_tensor_names as tensor_names
from skimp.model.families.common import stored_name
from skimp.model.families.reader import ConfigReader
from skimp.model.spec import ModelSpec

__all__ = ["stored_name", "tensor_names", "to_config", "to_spec"]


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    read = ConfigReader("youtu", config)
    sizes = latent.read_sizes(read, max_positions=131_072)
    mixer = latent.read_mixer(read, sizes, interleaved=read.boolean("rope_interleave", True))
    return common.make_spec(
        read,
        sizes,
        [mixer] * sizes.num_layers,
        activation=read.choice("hidden_act", "silu", common.ACTIVATIONS),
        tie_embeddings=True,
        bos=128_000,
        eos=128_001,
    )


def to_config(spec: ModelSpec) -> dict[str, Any]:
    config = latent.write(spec, "YoutuForCausalLM")
    config["rope_interleave"] = latent.interleaved(spec)
    return common.checked(config, spec, to_spec)
