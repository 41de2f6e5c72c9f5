"""Attention of whole prompts by the kernels that PyTorch brings: quicker there than ours.

Only where they compute the same: causal, nothing cached before, no window, cap or sinks.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from skimp.model.spec import AttentionSpec

LEAST_ROWS = 2048  # of a prompt: below, what the call costs the host outweighs it
ORDER = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)


def serves(spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a kernel of PyTorch computes this layer's attention over whole prompts."""
    plain = spec.window is None and spec.softcap is None and not spec.sinks
    return plain and _backend(spec, dtype, device) is not None


def attend(qkv: Tensor, out: Tensor, spec: AttentionSpec, starts: Sequence[int]) -> None:
    """Causal attention of sequences of prepared heads [R, (H + 2 G) D] into ``out`` [R, H D].

    ``starts`` are the first rows of the sequences, then R.
    """
    backend = _backend(spec, qkv.dtype, qkv.device)
    assert backend is not None
    heads = qkv.unflatten(1, (-1, spec.head_dim)).transpose(0, 1)[None]
    q, k, v = heads.split((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1)
    with sdpa_kernel(backend):
        for first, last in itertools.pairwise(starts):
            rows = slice(first, last)
            y = _attention(q[:, :, rows], k[:, :, rows], v[:, :, rows], spec)
            out[rows].unflatten(1, (spec.num_heads, -1)).copy_(y[0].transpose(0, 1))


def _attention(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    grouped = spec.num_heads != spec.num_kv_heads
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=spec.scale, enable_gqa=grouped
    )


@functools.cache
def _backend(spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> SDPBackend | None:
    """The first of them that takes these sizes."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    for backend in ORDER:
        heads = [
            torch.zeros(1, n, 64, spec.head_dim, dtype=dtype, device=device)
            for n in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        ]
        try:
            with sdpa_kernel(backend):
                _attention(heads[0], heads[1], heads[2], spec)
        except RuntimeError:
            continue
        return backend
    return None
