"""Code World Model (Meta 2025): Llama with windows on all layers but every fourth.

It is also the stock class for a Llama whose layers were given windows.
"""

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

# What the class takes where a config says nothing about RoPE.
DEFAULT_ROPE = {
    "rope_theta": 1_000_000.0,
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
DEFAULT_EOS = [128001, 128008, 128009]


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    config = dict(config)
    if config.get("eos_token_id") is None:
        config["eos_token_id"] = DEFAULT_EOS
    if not config.get("rope_scaling") and config.get("rope_parameters") is None:
        config["rope_parameters"] = DEFAULT_ROPE
    read = ConfigReader("cwm", config)
    for name in ("attention_bias", "qkv_bias"):
        read.must_be(name, False)
    sizes = common.read_sizes(read, max_positions=131_072, kv_heads=8, head_dim=128)
    window = read.optional_integer("sliding_window", 8192, least=0) or None
    if window is None and not read.has("layer_types"):
        raise read.refuse("sliding_window is off, but without layer_types most layers slide")
    rope = read_rope(
        read, head_dim=sizes.head_dim, max_positions=sizes.max_positions, theta=1_000_000.0
    )
    mixers = [
        AttentionSpec(
            num_heads=sizes.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            head_dim=sizes.head_dim,
            rope=rope,
            scale=sizes.head_dim**-0.5,
            window=layer_window,
        )
        for layer_window in common.read_windows(
            read, sizes.num_layers, window, lambda i: i % 4 != 0
        )
    ]
    return common.make_spec(
        read,
        sizes,
        mixers,
        norm_eps=1e-5,
        activation=read.choice("hidden_act", "silu", common.ACTIVATIONS),
        ffn_bias=read.boolean("mlp_bias", False),
        bos=128_000,
    )


def to_config(spec: ModelSpec) -> dict[str, Any]:
    config = common.base_config(spec, "CwmForCausalLM") | common.write_windows(spec)
    config["mlp_bias"] = common.gated_ffns(spec)[0].bias
    if config["sliding_window"] is None:
        del config["sliding_window"]
    if config.get("rope_scaling") is None:  # null would mean DEFAULT_ROPE
        config["rope_scaling"] = {"rope_type": "default"}
    return common.checked(config, spec, to_spec)
