"""Attention of whole prompts by the kernels that PyTorch brings: quicker there than ours.

Only where they compute the same: causal, nothing cached before, no window, cap or sinks.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from skimp.model.spec import AttentionSpec, LatentAttentionSpec

LEAST_ROWS = 2048  # of a prompt: below, what the call costs the host outweighs it
ORDER = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,  # where keys and values differ in size
)


@dataclass(frozen=True, kw_only=True)
class Heads:
    """What a kernel is asked to take: numbers of heads and their sizes."""

    queries: int
    keys: int
    key_dim: int
    value_dim: int
    scale: float


def serves(spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a kernel of PyTorch computes this layer's attention over whole prompts."""
    plain = spec.window is None and spec.softcap is None and not spec.sinks
    return plain and _backend(_heads(spec), dtype, device) is not None


def serves_latent(spec: LatentAttentionSpec, dtype: torch.dtype, device: torch.device) -> bool:
    """The same of heads that are made of latents."""
    return _backend(_made_heads(spec), dtype, device) is not None


def attend(qkv: Tensor, out: Tensor, spec: AttentionSpec, starts: Sequence[int]) -> None:
    """Causal attention of sequences of prepared heads [R, (H + 2 G) D] into ``out`` [R, H D].

    ``starts`` are the first rows of the sequences, then R.
    """
    heads = qkv.unflatten(1, (-1, spec.head_dim))
    q, k, v = heads.split((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1)
    _attend(q, k, v, out, _heads(spec), starts)


def attend_made(
    q_RHK: Tensor,
    k_RHK: Tensor,
    v_RHV: Tensor,
    out: Tensor,
    spec: LatentAttentionSpec,
    starts: Sequence[int],
) -> None:
    """The same of heads made of latents, every query head with a key of its own."""
    _attend(q_RHK, k_RHK, v_RHV, out, _made_heads(spec), starts)


def _heads(spec: AttentionSpec) -> Heads:
    return Heads(
        queries=spec.num_heads,
        keys=spec.num_kv_heads,
        key_dim=spec.head_dim,
        value_dim=spec.head_dim,
        scale=spec.scale,
    )


def _made_heads(spec: LatentAttentionSpec) -> Heads:
    return Heads(
        queries=spec.num_heads,
        keys=spec.num_heads,
        key_dim=spec.nope_dim + spec.rope_dim,
        value_dim=spec.value_dim,
        scale=spec.scale,
    )


def _attend(
    q_RHK: Tensor, k_RHK: Tensor, v_RHV: Tensor, out: Tensor, heads: Heads, starts: Sequence[int]
) -> None:
    backend = _backend(heads, q_RHK.dtype, q_RHK.device)
    assert backend is not None
    q, k, v = (x.transpose(0, 1)[None] for x in (q_RHK, k_RHK, v_RHV))
    with sdpa_kernel(backend):
        for first, last in itertools.pairwise(starts):
            rows = slice(first, last)
            y = _attention(q[:, :, rows], k[:, :, rows], v[:, :, rows], heads)
            out[rows].unflatten(1, (heads.queries, -1)).copy_(y[0].transpose(0, 1))


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=heads.scale, enable_gqa=heads.queries != heads.keys
    )


@functools.cache
def _backend(heads: Heads, dtype: torch.dtype, device: torch.device) -> SDPBackend | None:
    """The first of them that takes these sizes."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    shapes = (
        (heads.queries, heads.key_dim),
        (heads.keys, heads.key_dim),
        (heads.keys, heads.value_dim),
    )
    for backend in ORDER:
        q, k, v = (torch.zeros(1, n, 64, dim, dtype=dtype, device=device) for n, dim in shapes)
        try:
            with sdpa_kernel(backend), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # why it does not take them
                _attention(q, k, v, heads)
        except RuntimeError:
            continue
        return backend
    return None
