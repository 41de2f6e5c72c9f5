"""Gemma 2 (2024): like Gemma 3, with soft caps instead of norms on q and k, and one RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skimp.model.families import common
from skimp.model.families.common import stored_name
from skimp.model.families.gemma3_text import read_gemma, tensor_names, write_gemma
from skimp.model.families.reader import ConfigReader
from skimp.model.families.rope_config import read_rope
from skimp.model.spec import ModelSpec

__all__ = ["stored_name", "tensor_names", "to_config", "to_spec"]


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    read = ConfigReader("gemma2", config)
    sizes = common.read_sizes(read, max_positions=8192, kv_heads=4, head_dim=256)
    rope = read_rope(read, head_dim=sizes.head_dim, max_positions=sizes.max_positions)
    return read_gemma(
        read,
        sizes,
        period=2,
        ropes=(rope, rope),
        qk_norm=False,
        softcap=read.optional_number("attn_logit_softcapping", 50.0),
        logit_softcap=read.optional_number("final_logit_softcapping", 30.0),
    )


def to_config(spec: ModelSpec) -> dict[str, Any]:
    config = write_gemma(spec, "Gemma2ForCausalLM")
    config["attn_logit_softcapping"] = common.softmax_mixers(spec)[0].softcap
    return common.checked(config, spec, to_spec)
