"""Mistral 7B and its successors (Jiang et al. 2023): Llama with one window for all layers."""

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
    read = ConfigReader("mistral", config)
    sizes = common.read_sizes(read, max_positions=4096 * 32, kv_heads=8)
    # The class's default is 4096 where the field is absent; null means no window.
    window = read.optional_integer("sliding_window", 4096, least=1)
    # The class ignores layer_types, so they may only repeat what the window says.
    windows = common.read_windows(read, sizes.num_layers, window, lambda i: True)
    if any(w != window for w in windows):
        raise read.refuse(f"layer_types mixes kinds, but sliding_window={window} is for all layers")
    mixer = AttentionSpec(
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        rope=read_rope(read, head_dim=sizes.head_dim, max_positions=sizes.max_positions),
        scale=sizes.head_dim**-0.5,
        window=window,
    )
    activation = read.choice("hidden_act", "silu", common.ACTIVATIONS)
    return common.make_spec(
        read, sizes, [mixer] * sizes.num_layers, activation=activation, bos=1, eos=2
    )


def to_config(spec: ModelSpec) -> dict[str, Any]:
    config = common.base_config(spec, "MistralForCausalLM")
    config["sliding_window"] = spec.layers[0].mixer.window
    return common.checked(config, spec, to_spec)
