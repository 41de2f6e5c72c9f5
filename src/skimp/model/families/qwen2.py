"""Qwen2 and Qwen2.5 (2024): Llama with biases on q, k and v, and windows on the upper layers."""

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
    read = ConfigReader("qwen2", config)
    for name, value in (("attention_bias", True), ("qkv_bias", True), ("use_mrope", False)):
        read.must_be(name, value)
    return read_qwen(read, head_dim=None, qkv_bias=True, out_bias=False, qk_norm=False)


def read_qwen(
    read: ConfigReader, *, head_dim: int | None, qkv_bias: bool, out_bias: bool, qk_norm: bool
) -> ModelSpec:
    """What Qwen2 and Qwen3 share."""
    sizes = common.read_sizes(read, max_positions=32768, kv_heads=32, head_dim=head_dim)
    rope = read_rope(read, head_dim=sizes.head_dim, max_positions=sizes.max_positions)
    window = read.optional_integer("sliding_window", 4096, least=1)
    if not read.boolean("use_sliding_window", False):
        window = None
    first = read.integer("max_window_layers", 28, least=0)
    read.keep("max_window_layers")
    windows = common.read_windows(read, sizes.num_layers, window, lambda i: i >= first)
    mixers = [
        AttentionSpec(
            num_heads=sizes.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            head_dim=sizes.head_dim,
            rope=rope,
            scale=sizes.head_dim**-0.5,
            window=layer_window,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            qk_norm=qk_norm,
        )
        for layer_window in windows
    ]
    activation = read.choice("hidden_act", "silu", common.ACTIVATIONS)
    return common.make_spec(read, sizes, mixers, activation=activation)


def write_qwen(spec: ModelSpec, architecture: str) -> dict[str, Any]:
    config = common.base_config(spec, architecture) | common.write_windows(spec)
    sliding = [i for i, layer in enumerate(spec.layers) if layer.mixer.window is not None]
    config["use_sliding_window"] = bool(sliding)
    if sliding:  # readers older than layer_types know only "from this layer upwards"
        config["max_window_layers"] = sliding[0]
    return config


def to_config(spec: ModelSpec) -> dict[str, Any]:
    config = write_qwen(spec, "Qwen2ForCausalLM")
    if config["head_dim"] * config["num_attention_heads"] == spec.hidden_size:
        del config["head_dim"]  # not a field of the class, though its attention reads it
    return common.checked(config, spec, to_spec)
