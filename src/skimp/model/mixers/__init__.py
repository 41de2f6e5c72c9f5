"""Mixers: what mixes positions in a layer. One file each: its maths, its cache and its kernels.

To add one, write its spec (``model/spec.py``) and its module, and name both below.
"""

from __future__ import annotations

import torch

from skimp.cache.spec import CacheSpec
from skimp.model.mixers import attention, latent
from skimp.model.mixers.attention import Attention
from skimp.model.mixers.latent import LatentAttention
from skimp.model.spec import AttentionSpec, MixerSpec

Mixer = Attention | LatentAttention


def make_mixer(spec: MixerSpec, hidden_size: int, *, norm_eps: float, norm_plus_one: bool) -> Mixer:
    """The module of a mixer's spec, without weights."""
    if isinstance(spec, AttentionSpec):
        return Attention(spec, hidden_size, norm_eps=norm_eps, norm_plus_one=norm_plus_one)
    return LatentAttention(spec, hidden_size)


def cache_spec(spec: MixerSpec, dtype: torch.dtype) -> CacheSpec:
    """What a mixer remembers of a token, in ``dtype``."""
    if isinstance(spec, AttentionSpec):
        return attention.cache_spec(spec, dtype)
    return latent.cache_spec(spec, dtype)
