"""Attention of whole sequences over themselves, nothing cached, through PyTorch's own kernels.

Shape legend: R rows of all sequences, N sequences, L rows of the longest, H query heads,
G key-value heads, K numbers of a key, V of a value.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

LEAST_QUERIES: Final = 256  # rows of a block of windowed attention, if there are as many
# Not cuDNN's: it plans some 5 ms for every new shape, and sequences hardly ever have the same.
BACKENDS: Final = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
LEAST_FILLED: Final = 0.75  # of the rows of sequences that are padded to one length


def attend_whole(
    q_RHK: Tensor,
    k_RGK: Tensor,
    v_RGV: Tensor,
    starts: tuple[int, ...],
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """Causal attention of each sequence over itself [R, H, V]; differentiable. ``starts``: first
    row of each sequence, then R. On a GPU sequences of similar lengths are computed together."""
    on_gpu = q_RHK.device.type != "cpu"
    with sdpa_kernel(BACKENDS) if on_gpu else contextlib.nullcontext():
        if on_gpu and len(starts) > 2:
            return attend_padded(q_RHK, k_RGK, v_RGV, starts, scale=scale, window=window)
        outs = []
        for part in zip(*(x.tensor_split(starts[1:-1]) for x in (q_RHK, k_RGK, v_RGV))):
            q, k, v = (x[None] for x in part)
            outs.append(_attend(q, k, v, scale=scale, window=window)[0])
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def attend_padded(
    q_RHK: Tensor,
    k_RGK: Tensor,
    v_RGV: Tensor,
    starts: tuple[int, ...],
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """:func:`attend_whole` with sequences side by side, padded behind: no row sees what follows."""
    groups, back = _side_by_side(starts, q_RHK.device)
    outs = []
    for rows, length in groups:
        q, k, v = (
            x.index_select(0, rows).unflatten(0, (-1, length)) for x in (q_RHK, k_RGK, v_RGV)
        )
        outs.append(_attend(q, k, v, scale=scale, window=window).flatten(0, 1))
    return torch.cat(outs).index_select(0, back)


@functools.lru_cache(maxsize=2)
@torch.inference_mode(False)  # another caller's backward may need them
def _side_by_side(
    starts: tuple[int, ...], device: torch.device
) -> tuple[list[tuple[Tensor, int]], Tensor]:
    """For each group of sequences the rows [N * L] that it takes, with L; and where each of the R
    rows is in all groups together. Every layer of a step asks the same."""
    sizes = [(b - a, a) for a, b in itertools.pairwise(starts) if b > a]
    sizes.sort(key=lambda size: (-size[0], size[1]))
    groups = []
    back = torch.empty(starts[-1], dtype=torch.int64)
    done = first = 0
    while first < len(sizes):
        length = sizes[first][0]
        last = first
        while last < len(sizes) and sizes[last][0] >= LEAST_FILLED * length:
            last += 1
        own = torch.tensor(sizes[first:last])
        count, begin = own[:, :1], own[:, 1:]
        place = torch.arange(length)[None]
        real = place < count
        rows = begin + torch.minimum(place, count - 1)
        slots = done + torch.arange(rows.numel()).view_as(rows)
        back[rows[real]] = slots[real]
        groups.append((rows.flatten().to(device), length))
        done, first = done + rows.numel(), last
    return groups, back.to(device)


def _attend(
    q_NLHK: Tensor, k_NLGK: Tensor, v_NLGV: Tensor, *, scale: float, window: int | None
) -> Tensor:
    """[N, L, H, V], in memory that grows with L, or with L times window."""
    q, k, v = (x.transpose(1, 2) for x in (q_NLHK, k_NLGK, v_NLGV))
    grouped = q.shape[1] != k.shape[1]
    length = q.shape[2]
    if window is None or length <= window:
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)
    parts = []
    block = max(window, LEAST_QUERIES)
    for begin in range(0, length, block):
        end, first = min(begin + block, length), max(0, begin - window + 1)
        at = torch.arange(begin, end, device=q.device)[:, None]
        key = torch.arange(first, end, device=q.device)
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, begin:end],
                k[:, :, first:end],
                v[:, :, first:end],
                attn_mask=(key <= at) & (key > at - window),
                scale=scale,
                enable_gqa=grouped,
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2)
