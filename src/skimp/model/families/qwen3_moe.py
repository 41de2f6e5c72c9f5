"""Qwen3 models with a mixture of experts (2025), in all layers or some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skimp.errors import ConfigError, shown
from skimp.model.families import common
from skimp.model.families.common import llama_tensor_names as tensor_names
from skimp.model.families.common import stored_name
from skimp.model.families.reader import ConfigReader
from skimp.model.families.rope_config import read_rope
from skimp.model.spec import (
    Activation,
    AttentionSpec,
    ExpertsSpec,
    FFNSpec,
    GatedFFNSpec,
    ModelSpec,
    RouterSpec,
)

__all__ = ["stored_name", "tensor_names", "to_config", "to_spec"]

PATTERN = ("decoder_sparse_step", "mlp_only_layers")


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    read = ConfigReader("qwen3_moe", config)
    sizes = common.read_sizes(read, max_positions=32768, kv_heads=4)
    window = read.optional_integer("sliding_window", 4096, least=1)
    if not read.boolean("use_sliding_window", False):
        window = None
    # The class knows one window for all layers, so layer_types may only repeat that.
    windows = common.read_windows(read, sizes.num_layers, window, lambda i: True)
    if any(w != window for w in windows):
        raise read.refuse(f"layer_types mixes kinds, but sliding_window={window} is for all layers")
    bias = read.boolean("attention_bias", False)
    mixer = AttentionSpec(
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        rope=read_rope(read, head_dim=sizes.head_dim, max_positions=sizes.max_positions),
        scale=sizes.head_dim**-0.5,
        window=window,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
    )
    activation = read.choice("hidden_act", "silu", common.ACTIVATIONS)
    read.keep("intermediate_size")  # no layer may have it
    return common.make_spec(
        read,
        sizes,
        [mixer] * sizes.num_layers,
        activation=activation,
        ffns=_ffns(read, sizes, activation),
    )


def _ffns(read: ConfigReader, sizes: common.Sizes, activation: Activation) -> list[FFNSpec]:
    count = common.read_experts(read, "num_experts", 128, least=0)
    dense = GatedFFNSpec(intermediate_size=sizes.intermediate_size, activation=activation)
    step, skipped = read.integer("decoder_sparse_step", 1), read.raw("mlp_only_layers")
    if not isinstance(skipped, list | None):
        raise read.refuse(f"mlp_only_layers must be a list, got {shown(skipped)}")
    for i in skipped or []:
        read.check_integer("mlp_only_layers", i, least=0, most=sizes.num_layers - 1)
    for name in PATTERN:
        read.keep(name)
    chosen = read.integer("num_experts_per_tok", 8, most=max(1, count))
    inner = read.integer("moe_intermediate_size", 768)
    normalize = read.boolean("norm_topk_prob", False)
    if count == 0:
        return [dense] * sizes.num_layers
    experts = ExpertsSpec(
        num_experts=count,
        experts_per_token=chosen,
        intermediate_size=inner,
        activation=activation,
        router=RouterSpec(normalize=normalize),
    )
    sparse = _sparse(sizes.num_layers, step, skipped)
    return [experts if i in sparse else dense for i in range(sizes.num_layers)]


def _sparse(num_layers: int, step: int, skipped: list[int] | None) -> set[int]:
    """The layers with experts."""
    return {i for i in range(num_layers) if (i + 1) % step == 0 and i not in (skipped or [])}


def to_config(spec: ModelSpec) -> dict[str, Any]:
    sparse = {i for i, layer in enumerate(spec.layers) if isinstance(layer.ffn, ExpertsSpec)}
    experts = next((x.ffn for x in spec.layers if isinstance(x.ffn, ExpertsSpec)), None)
    if experts is None:
        raise ConfigError("model_type='qwen3_moe' without a layer that has experts is qwen3")
    config = common.base_config(spec, "Qwen3MoeForCausalLM")
    config.setdefault("intermediate_size", experts.intermediate_size)
    step, skipped = config.get(PATTERN[0]), config.get(PATTERN[1])
    if _sparse(spec.num_layers, step or 1, skipped) != sparse:
        dense = [i for i in range(spec.num_layers) if i not in sparse]
        config |= dict(zip(PATTERN, (1, dense)))
    window = spec.layers[0].mixer.window
    config |= {
        "attention_bias": common.softmax_mixers(spec)[0].qkv_bias,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "moe_intermediate_size": experts.intermediate_size,
        "norm_topk_prob": experts.router.normalize,
    }
    return common.checked(config, spec, to_spec)
