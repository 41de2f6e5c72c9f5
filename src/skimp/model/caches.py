"""Which cache a model is served with: the checkpoint's wish, the engine's options, what is refused.

The engine and every command that plans without one read :func:`cache_specs`.
"""

from __future__ import annotations

from typing import Literal

import torch

from skimp.cache.spec import DEFAULT_RECENT, FORMAT_BITS, CacheSpec
from skimp.errors import OptionError
from skimp.model.mixers import cache_spec
from skimp.model.spec import AttentionSpec, LatentAttentionSpec, ModelSpec

CacheDType = Literal["auto", "bfloat16", "float32", "fp8", "int8", "int4"]


def cache_specs(
    spec: ModelSpec,
    dtype: str,
    *,
    cache_dtype: CacheDType = "auto",
    cache_recent: int | None = None,
    cache_hadamard: bool | None = None,
) -> list[CacheSpec]:
    """What each layer remembers, in layer order, served with weights and arithmetic in ``dtype``.

    ``auto`` is what the checkpoint asks for, else ``dtype``. ``cache_recent`` defaults to 0 at
    eight bits and 64 at four, ``cache_hadamard`` to true at four. Raises ``OptionError`` naming
    the fields that do not go together.
    """
    chosen = (spec.cache_format or dtype) if cache_dtype == "auto" else cache_dtype
    if chosen not in FORMAT_BITS:
        if cache_recent:
            raise OptionError(
                f"cache_recent: cache_dtype {chosen} keeps every token at full precision already"
            )
        if cache_hadamard:
            raise OptionError(f"cache_hadamard: cache_dtype {chosen} rounds nothing to turn for")
        return [cache_spec(layer.mixer, getattr(torch, chosen)) for layer in spec.layers]
    for index, layer in enumerate(spec.layers):
        if isinstance(layer.mixer, LatentAttentionSpec):
            raise OptionError(
                f"cache_dtype: {chosen} rounds keys and values of heads, and layer {index} has a "
                "latent; use auto"
            )
    recent = DEFAULT_RECENT[chosen] if cache_recent is None else cache_recent
    turned = chosen == "int4" if cache_hadamard is None else cache_hadamard
    for index, layer in enumerate(spec.layers):
        if isinstance(layer.mixer, AttentionSpec) and layer.mixer.head_dim % 2:
            field = "cache_dtype: int4" if chosen == "int4" else "cache_hadamard"
            if chosen == "int4" or turned:
                raise OptionError(
                    f"{field} needs an even head_dim, layer {index} has {layer.mixer.head_dim}"
                )
    caches = [cache_spec(layer.mixer, getattr(torch, dtype)) for layer in spec.layers]
    return [cache.rounded(chosen, recent=recent, hadamard=turned) for cache in caches]
