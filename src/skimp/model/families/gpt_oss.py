"""gpt-oss (OpenAI 2025): every other layer sees a window, attention has sinks, and every layer is
a mixture of experts with biases and a clamped activation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skimp.errors import ConfigError, shown
from skimp.model.families import common
from skimp.model.families.common import stored_name
from skimp.model.families.reader import ConfigReader
from skimp.model.families.rope_config import read_rope
from skimp.model.spec import (
    AttentionSpec,
    ClampedSwiGLU,
    ExpertsSpec,
    FFNSpec,
    ModelSpec,
    RouterSpec,
)

__all__ = ["stored_name", "tensor_names", "to_config", "to_spec"]

THETA = 150_000.0
# What the class takes where a config says nothing about RoPE.
DEFAULT_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    config = dict(config)
    if not config.get("rope_scaling") and config.get("rope_parameters") is None:
        config["rope_parameters"] = DEFAULT_ROPE
    read = ConfigReader("gpt_oss", config)
    sizes = common.read_sizes(read, max_positions=131_072, kv_heads=8, head_dim=64)
    window = read.optional_integer("sliding_window", 128, least=1)
    if window is None and not read.has("layer_types"):
        raise read.refuse("sliding_window is off, but without layer_types every other layer slides")
    bias = read.boolean("attention_bias", True)
    rope = read_rope(read, head_dim=sizes.head_dim, max_positions=sizes.max_positions, theta=THETA)
    # Where the first training ended; RoPE's original_max_position_embeddings is what counts.
    read.raw("initial_context_length")
    read.keep("initial_context_length")
    mixers = [
        AttentionSpec(
            num_heads=sizes.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            head_dim=sizes.head_dim,
            rope=rope,
            scale=sizes.head_dim**-0.5,
            window=layer_window,
            qkv_bias=bias,
            out_bias=bias,
            sinks=True,
        )
        for layer_window in common.read_windows(
            read, sizes.num_layers, window, lambda i: i % 2 == 0
        )
    ]
    if read.raw("hidden_act", "silu") != "silu":
        raise read.refuse(
            f"hidden_act={shown(read.raw('hidden_act'))}, but this class has only its own"
        )
    return common.make_spec(
        read,
        sizes,
        mixers,
        norm_eps=1e-5,
        activation="silu",
        ffns=[_experts(read, sizes)] * sizes.num_layers,
    )


def _experts(read: ConfigReader, sizes: common.Sizes) -> ExpertsSpec:
    count = common.read_experts(read, "num_local_experts", 128)
    chosen = read.integer("num_experts_per_tok", 4, most=count)
    again = read.optional_integer("experts_per_token", None, least=1)
    if again not in (None, chosen):
        raise read.refuse(f"experts_per_token={again} beside num_experts_per_tok={chosen}")
    read.keep("experts_per_token")
    return ExpertsSpec(
        num_experts=count,
        experts_per_token=chosen,
        intermediate_size=sizes.intermediate_size,
        activation=ClampedSwiGLU(
            alpha=read.number("swiglu_alpha", 1.702), limit=read.number("swiglu_limit", 7.0)
        ),
        bias=True,
        router=RouterSpec(bias=True, normalize=True),
        fused=True,
    )


def tensor_names(spec: ModelSpec) -> Mapping[str, str]:
    return common.llama_tensor_names(spec, ffn_names=_ffn_names)


def _ffn_names(ffn: FFNSpec) -> dict[str, str]:
    names = {f"router.{kind}": f"router.{kind}" for kind in ("weight", "bias")}
    parts = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    return names | {f"experts.{part}": f"experts.{part}" for part in parts}


def to_config(spec: ModelSpec) -> dict[str, Any]:
    experts = spec.layers[0].ffn
    if not isinstance(experts, ExpertsSpec) or not isinstance(experts.activation, ClampedSwiGLU):
        raise ConfigError("model_type='gpt_oss' wants experts with a clamped activation")
    config = common.base_config(spec, "GptOssForCausalLM") | common.write_windows(spec)
    if config["sliding_window"] is None:
        del config["sliding_window"]
    if config.get("rope_scaling") is None:  # null would mean DEFAULT_ROPE
        config["rope_scaling"] = {"rope_type": "default"}
    config |= {
        "attention_bias": common.softmax_mixers(spec)[0].qkv_bias,
        "intermediate_size": experts.intermediate_size,
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "swiglu_alpha": experts.activation.alpha,
        "swiglu_limit": experts.activation.limit,
    }
    if "experts_per_token" in config:
        config["experts_per_token"] = experts.experts_per_token
    return common.checked(config, spec, to_spec)
