"""Llama 1 to 3 and everything exported in its layout (Touvron et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skimp.model.families import common
from skimp.model.families.common import llama_tensor_names as tensor_names
from skimp.model.families.common import stored_name
from skimp.model.families.reader import ConfigReader
from skimp.model.families.rope_config import read_rope
from skimp.model.spec import AttentionSpec, ModelSpec

__all__ = ["stored_name", "tensor_names", "to_config", "to_spec"]


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    read = ConfigReader("llama", config)
    sizes = common.read_sizes(read, max_positions=2048)
    bias = read.boolean("attention_bias", False)
    mixer = AttentionSpec(
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        rope=read_rope(read, head_dim=sizes.head_dim, max_positions=sizes.max_positions),
        scale=sizes.head_dim**-0.5,
        qkv_bias=bias,
        out_bias=bias,
    )
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
    config = common.base_config(spec, "LlamaForCausalLM")
    config["attention_bias"] = common.softmax_mixers(spec)[0].qkv_bias
    config["mlp_bias"] = common.gated_ffns(spec)[0].bias
    return common.checked(config, spec, to_spec)
