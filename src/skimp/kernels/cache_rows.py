"""Where the plain backend keeps what attention reads: [planes, heads, page_tokens] vectors a page
and layer, each as ``CacheSpec`` says: ``dtype`` numbers, or the bytes of ``cache/formats.py``.

Keys and values of heads are two planes; a latent and its rotated key are one vector of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from skimp.cache.formats import dequantize, quantize
from skimp.cache.spec import CacheSpec, vector_bytes
from skimp.kernels.ops import LayerCache, StepInputs


@dataclass(frozen=True, kw_only=True)
class CachedRows:
    """T keys and values of one sequence, some of which a row may not see.

    ``recent`` marks those at full precision, which stand in for the rounded ones of the same
    positions where a row is near enough; None: each position is here once.
    """

    keys: Tensor  # [T, G, K]; of latents [T, 1, latent_dim + rope_dim]
    values: Tensor  # [T, G, K]; of latents the same again
    positions: Tensor  # [T]
    recent: Tensor | None = None  # bool [T]


def write(planes: Sequence[Tensor], cache: LayerCache, step: StepInputs) -> None:
    """Store the step's vectors [R, heads, size] at their rows' positions."""
    assert step.arena is not None
    flat, width = _flat(step.arena, cache.spec)
    index = _index(cache, step, step.row_seq, step.positions, width)
    heads, _ = _vectors(cache.spec)
    for plane, x in enumerate(planes):
        stored = x if cache.spec.format is None else quantize(x, cache.spec.format)
        flat[index + plane * heads * width * cache.page_tokens] = stored.to(flat.dtype)
    if cache.recent is not None:
        write(planes, cache.recent, step)


def read(cache: LayerCache, step: StepInputs, rows: slice, block: int) -> CachedRows:
    """What the rows of one sequence see, each kind of memory from a multiple of ``block``."""
    end = int(step.kv_end[rows].max())
    if cache.recent is None:
        return _range(cache, step, rows, block, end)
    assert cache.recent.spec.horizon is not None
    edge = int(step.positions[rows].max()) + 1 - cache.recent.spec.horizon  # of the last row
    newest = _range(cache.recent, step, rows, block, end)
    if edge <= 0:
        return CachedRows(
            keys=newest.keys,
            values=newest.values,
            positions=newest.positions,
            recent=torch.ones_like(newest.positions, dtype=torch.bool),
        )
    past = _range(cache, step, rows, block, min(edge, end))
    pad = -past.positions.shape[0] % block
    positions = F.pad(past.positions, (0, pad), value=end)  # padding: ahead of what a row sees
    kinds = torch.arange(positions.shape[0] + newest.positions.shape[0], device=positions.device)
    return CachedRows(
        keys=torch.cat((F.pad(past.keys, (0, 0, 0, 0, 0, pad)), newest.keys)),
        values=torch.cat((F.pad(past.values, (0, 0, 0, 0, 0, pad)), newest.values)),
        positions=torch.cat((positions, newest.positions)),
        recent=kinds >= positions.shape[0],
    )


def _range(cache: LayerCache, step: StepInputs, rows: slice, block: int, end: int) -> CachedRows:
    """Positions from the first that any of the rows can see up to ``end``."""
    assert step.arena is not None
    first, horizon = int(step.positions[rows][0]), cache.spec.horizon
    low = 0 if horizon is None else max(0, first - horizon + 1)
    low -= low % block  # blocks lie at absolute positions, whatever the step asks for
    positions = torch.arange(low, max(end, low), device=step.positions.device)
    flat, width = _flat(step.arena, cache.spec)
    # Pages before a window may have been freed: their stale entries are masked, never used.
    seq = step.row_seq[rows][:1].expand(positions.shape[0])
    index = _index(cache, step, seq, positions, width)
    heads, _ = _vectors(cache.spec)
    keys = values = flat[index]
    if cache.spec.kind != "latent":
        values = flat[index + heads * width * cache.page_tokens]
    if cache.spec.format is not None:
        keys = dequantize(keys, cache.spec.format)
        values = dequantize(values, cache.spec.format)
    if horizon is not None:
        hidden = (positions <= first - horizon)[:, None, None]
        keys, values = keys.masked_fill(hidden, 0), values.masked_fill(hidden, 0)
    return CachedRows(keys=keys, values=values, positions=positions)


def _vectors(spec: CacheSpec) -> tuple[int, int]:
    """How many vectors a plane has of a token, and of how many numbers."""
    if spec.kind == "latent":
        return 1, sum(spec.shape)
    heads, size = spec.shape
    return heads, size


def _flat(arena: Tensor, spec: CacheSpec) -> tuple[Tensor, int]:
    """The arena as elements of a stored vector, and how many of them make one."""
    dtype = getattr(torch, spec.dtype) if spec.format is None else torch.uint8
    _, size = _vectors(spec)
    width = vector_bytes(size, spec.format) if spec.format else size
    return arena[: arena.numel() - arena.numel() % dtype.itemsize].view(dtype), width


def _index(
    cache: LayerCache, step: StepInputs, seq: Tensor, positions: Tensor, width: int
) -> Tensor:
    """[rows, heads, width]: where the elements of each (seq, position)'s first plane lie."""
    tokens, device = cache.page_tokens, positions.device
    itemsize = 1 if cache.spec.format else getattr(torch, cache.spec.dtype).itemsize
    table = step.block_tables[cache.group]
    pages = table[seq.to(torch.int64), (positions // tokens).to(torch.int64)].to(torch.int64)
    base = (pages * 64 + cache.offset) // itemsize + (positions % tokens) * width
    heads = torch.arange(_vectors(cache.spec)[0], device=device)[:, None] * (tokens * width)
    return base[:, None, None] + heads + torch.arange(width, device=device)
