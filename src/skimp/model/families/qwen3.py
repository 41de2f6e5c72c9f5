"""Qwen3 dense models (2025): Qwen2 with norms on q and k instead of biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skimp.model.families import common
from skimp.model.families.common import llama_tensor_names as tensor_names
from skimp.model.families.common import stored_name
from skimp.model.families.qwen2 import read_qwen, write_qwen
from skimp.model.families.reader import ConfigReader
from skimp.model.spec import ModelSpec

__all__ = ["stored_name", "tensor_names", "to_config", "to_spec"]


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    read = ConfigReader("qwen3", config)
    bias = read.boolean("attention_bias", False)
    return read_qwen(read, head_dim=128, qkv_bias=bias, out_bias=bias, qk_norm=True)


def to_config(spec: ModelSpec) -> dict[str, Any]:
    config = write_qwen(spec, "Qwen3ForCausalLM")
    config["attention_bias"] = common.softmax_mixers(spec)[0].qkv_bias
    return common.checked(config, spec, to_spec)
