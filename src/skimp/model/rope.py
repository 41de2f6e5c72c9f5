"""Rotary position embedding tables: default, linear, llama3, yarn; dynamic and longrope where
their frequencies stay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from skimp.errors import ConfigError
from skimp.model.spec import RopeSpec


def rope_tables(spec: RopeSpec, max_positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions ``0 .. max_positions - 1``.

    Both are float32 [max_positions, rotary_dim / 2], with YaRN's attention factor folded in.
    Frequencies and angles are float32, step by step as in transformers: at 100,000 tokens the
    rounding of ``position * frequency`` is visible, and models were trained with that rounding.

    Raises :class:`ConfigError` where the scaling would have to change with the length.
    """
    frequencies, factor = inverse_frequencies(spec)
    scaling = spec.scaling or {}
    kind = scaling.get("rope_type")
    if kind in ("dynamic", "longrope"):
        limit = scaling["original_max_position_embeddings"]
        if max_positions > limit:
            field = "original_" * (kind == "longrope") + "max_position_embeddings"
            raise ConfigError(
                f"max_positions={max_positions} is beyond {field}={limit}: rope_type {kind} "
                "changes every cached key there"
            )
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies[None, :]
    return angles.cos() * factor, angles.sin() * factor


def inverse_frequencies(spec: RopeSpec) -> tuple[Tensor, float]:
    """Radians per token, float32 [rotary_dim / 2], and the factor on cosine and sine."""
    exponents = torch.arange(0, spec.rotary_dim, 2, dtype=torch.float32) / spec.rotary_dim
    wavelengths = spec.theta**exponents  # in tokens per radian
    scaling = spec.scaling or {"rope_type": "default"}
    kind = scaling["rope_type"]
    if kind in ("default", "dynamic"):
        return 1.0 / wavelengths, 1.0
    if kind == "linear":
        return (1.0 / wavelengths) / scaling["factor"], 1.0
    if kind == "llama3":
        return _llama3(1.0 / wavelengths, scaling), 1.0
    if kind == "yarn":
        return _yarn(wavelengths, spec, scaling), yarn_attention_factor(scaling)
    if kind == "longrope":
        short = torch.tensor(scaling["short_factor"], dtype=torch.float32)
        return 1.0 / (short * wavelengths), longrope_attention_factor(scaling)
    known = "default, linear, llama3, yarn, dynamic, longrope"
    raise ConfigError(f"rope_type {kind!r} is not one of {known}")


def _llama3(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: slow dimensions are slowed by ``factor``, fast ones kept, a ramp between."""
    factor, low, high = (scaling[k] for k in ("factor", "low_freq_factor", "high_freq_factor"))
    context = scaling["original_max_position_embeddings"]
    period = 2 * math.pi / frequencies
    scaled = torch.where(period > context / low, frequencies / factor, frequencies)
    smooth = (context / period - low) / (high - low)
    ramp = (1 - smooth) * scaled / factor + smooth * scaled
    between = (period >= context / high) & (period <= context / low)
    return torch.where(between, ramp, scaled)


def _yarn(wavelengths: Tensor, spec: RopeSpec, scaling: Mapping[str, Any]) -> Tensor:
    """YaRN (Peng et al. 2023), "NTK by parts": interpolate the dimensions that turn seldom."""
    context, dim = scaling["original_max_position_embeddings"], spec.rotary_dim

    def dimension(rotations: float) -> float:
        """The dimension that makes this many turns over the original context."""
        turns = math.log(context / (rotations * 2 * math.pi))
        return (dim * turns) / (2 * math.log(spec.theta))

    low, high = dimension(scaling["beta_fast"]), dimension(scaling["beta_slow"])
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as in the reference code: a step instead of a ramp
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)
    keep = 1 - ramp.clamp(0, 1)
    # Not simplified: the order of these float32 roundings is transformers'.
    return 1.0 / (scaling["factor"] * wavelengths) * (1 - keep) + 1.0 / wavelengths * keep


def longrope_attention_factor(scaling: Mapping[str, Any]) -> float:
    """The factor on cosine and sine: given, or from the ratio of the two context lengths."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context))


def yarn_softmax_factor(scaling: Mapping[str, Any] | None) -> float:
    """What DeepSeek's classes multiply the softmax scale by: the square of ``mscale_all_dim``'s
    growth."""
    if scaling is None or not scaling.get("mscale_all_dim"):
        return 1.0
    return _grown(scaling["factor"], scaling["mscale_all_dim"]) ** 2


def _grown(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def yarn_attention_factor(scaling: Mapping[str, Any]) -> float:
    """The factor on cosine and sine: given, or from ``factor`` and DeepSeek's two ``mscale``."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    mscale, all_dim, factor = (
        scaling.get("mscale"),
        scaling.get("mscale_all_dim"),
        scaling["factor"],
    )
    if mscale and all_dim:
        return _grown(factor, mscale) / _grown(factor, all_dim)
    return _grown(factor, 1.0)
