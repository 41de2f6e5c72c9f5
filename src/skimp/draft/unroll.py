"""A draft head as it goes on from its own guesses, all rows of many documents at once.

EAGLE-3's training-time test. At step 0 row s of a document sees token s and the target's feature
of row s - 1; at step i > 0 token s + i and what the head itself made of this row at step i - 1.
That is what the head will do when it serves: the target has computed all rows before s, and the
head guesses on. So at step i row s attends to the step-0 keys of rows up to s of its document, and
to its own keys of the steps 1 .. i. Row 0 has no feature: rows begin at 1.

Shape legend: R rows of the target's forward, P rows of the head, D hidden size, N documents, L
rows of the longest, H query heads, G key-value heads, K numbers of a key.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from skimp.kernels.ops import AttentionParams, StepBounds, StepInputs
from skimp.kernels.plain import PlainOps, apply_rope
from skimp.kernels.whole import BACKENDS, _side_by_side, attend_whole
from skimp.model.decoder import Decoder
from skimp.model.draft_head import DraftHead, Fusion

QUERIES: Final = 128  # rows whose own keys stand side by side in one product


@dataclass(frozen=True)
class HeadRows:
    """Rows of the head in a packed forward of the target, for documents of at least two tokens.

    ``rows`` int64 [P]: the row of the target whose token step 0 sees; ``ends`` int64 [P]: the end
    of its document; ``starts``: the first of each document's P rows, then P. All on the CPU.
    """

    rows: np.ndarray
    ends: np.ndarray
    starts: tuple[int, ...]

    def within(self, step: int) -> np.ndarray:
        """bool [P]: whose token of this step is still in the document."""
        inside: np.ndarray = self.rows + step < self.ends
        return inside


def head_rows(starts: Sequence[int]) -> HeadRows:
    """``starts``: the first row of each document of the target's forward, then R."""
    pairs = [(a, b) for a, b in pairwise(starts) if b - a >= 2]
    counts = [b - a - 1 for a, b in pairs]
    return HeadRows(
        rows=np.concatenate([np.arange(a + 1, b) for a, b in pairs]),
        ends=np.repeat([b for _, b in pairs], counts),
        starts=(0, *accumulate(counts)),
    )


def taps_and_states(
    target: Decoder, taps: Sequence[int], step: StepInputs, ops: PlainOps
) -> tuple[list[Tensor], Tensor]:
    """float32 [R, D] where the target's stream enters each of ``taps``, and where it leaves the
    last layer. Nothing is kept for a backward."""
    found = []
    with torch.no_grad():
        x_RD = target.embed(step, ops)
        for index, layer in enumerate(target.layers):
            if index in taps:
                found.append(x_RD)
            x_RD = layer(x_RD, ops, step)
        if len(target.layers) in taps:
            found.append(x_RD)
    return found, x_RD


def fused(fusion: Fusion, tapped: Sequence[Tensor], rows: Tensor, ops: PlainOps) -> Tensor:
    """Features float32 [P, D] of ``rows`` of what was tapped."""
    features: Tensor | None = None
    for layer, x_RD in zip(fusion.taps, tapped):
        features = fusion.add(layer, x_RD.index_select(0, rows), features, ops)
    assert features is not None
    return features.float()


def unroll(
    head: DraftHead, ops: UnrolledOps, step: StepInputs, at: HeadRows, features: Tensor, count: int
) -> list[Tensor]:
    """The head's streams float32 [P, D] behind ``count`` steps, before its last norm.

    ``step`` is the target's, ``features`` float32 [P, D] those of the rows before. Rows that are
    no longer :meth:`HeadRows.within` their document hold nothing of use.
    """
    device = step.token_ids.device

    def tensor(values: Any, dtype: Any = np.int64) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=dtype)).to(device)

    positions = step.positions.index_select(0, tensor(at.rows))
    nobody = tensor([], np.int32)
    found = []
    ops.begin(at.starts)
    for index in range(count):
        tokens = tensor(np.minimum(at.rows + index, at.ends - 1))
        own = StepInputs(
            token_ids=step.token_ids.index_select(0, tokens),
            positions=positions + index,
            row_seq=nobody,
            kv_end=nobody,
            seq_starts=nobody,
            logit_rows=nobody,
            bounds=StepBounds(rows=len(at.rows), context=len(at.rows), whole=at.starts),
            features=features,
        )
        head(own, ops)
        assert head.features is not None
        features = head.features
        found.append(features)
    ops.begin(at.starts)  # the keys go
    return found


class UnrolledOps(PlainOps):
    """Plain products, and the attention of unrolled rows: each call is one step further, until
    :meth:`begin`."""

    def begin(self, starts: tuple[int, ...]) -> None:
        """Forget all keys; documents begin at ``starts``."""
        self._starts = starts
        self._past: list[tuple[Tensor, Tensor]] = []

    def attention(self, qkv: Tensor, params: AttentionParams, step: StepInputs) -> Tensor:
        spec = params.spec
        q, k, v = qkv.float().split((spec.q_dim, spec.kv_dim, spec.kv_dim), dim=-1)
        q, k, v = (x.unflatten(-1, (-1, spec.head_dim)) for x in (q, k, v))
        if params.rope is not None and spec.rope is not None:
            rows = step.positions.to(torch.int64)
            cos, sin = (table[rows] for table in params.rope)
            turn = spec.rope.interleaved
            q, k = (apply_rope(x, cos, sin, interleaved=turn) for x in (q, k))
        q, k, v = (x.to(self.dtype) for x in (q, k, v))
        self._past.append((k, v))
        if len(self._past) == 1:
            out = attend_whole(q, k, v, self._starts, scale=spec.scale, window=spec.window)
        else:
            out = _attend_unrolled(q, self._past, self._starts, spec.scale)
        return out.flatten(1)


def _attend_unrolled(
    q_PHK: Tensor,
    past: Sequence[tuple[Tensor, Tensor]],
    starts: tuple[int, ...],
    scale: float,
) -> Tensor:
    """[P, H, K]: over the keys and values [P, G, K] of step 0 of the rows up to a row in its
    document, and over the row's own of the later steps. Differentiable."""
    groups, back = _side_by_side(starts, q_PHK.device)
    outs = []
    on_gpu = q_PHK.device.type != "cpu"
    with sdpa_kernel(BACKENDS) if on_gpu else contextlib.nullcontext():
        for rows, length in groups:
            q, *keys_values = (
                x.index_select(0, rows).unflatten(0, (-1, length)).transpose(1, 2)
                for x in (q_PHK, *(part for pair in past for part in pair))
            )
            keys, values = keys_values[0::2], keys_values[1::2]
            parts = [
                _block(q, keys, values, begin, min(begin + QUERIES, length), scale)
                for begin in range(0, length, QUERIES)
            ]
            outs.append(torch.cat(parts, dim=2).transpose(1, 2).flatten(0, 1))
    return torch.cat(outs).index_select(0, back)


def _block(
    q_NHLK: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    begin: int,
    end: int,
    scale: float,
) -> Tensor:
    """Queries ``begin`` .. ``end``: [N, H, end - begin, K]. Each of ``keys`` is [N, G, L, K]."""
    count, later = end - begin, len(keys) - 1
    at = torch.arange(begin, end, device=q_NHLK.device)
    earlier = torch.arange(end, device=q_NHLK.device) <= at[:, None]
    own = torch.eye(count, dtype=torch.bool, device=q_NHLK.device).repeat(1, later)
    group = q_NHLK.shape[1] // keys[0].shape[1]

    def beside(parts: Sequence[Tensor]) -> Tensor:
        whole = [parts[0][:, :, :end], *(part[:, :, begin:end] for part in parts[1:])]
        # Not ``enable_gqa``: with a mask, no GPU kernel but the slowest takes it.
        return torch.cat(whole, dim=2).repeat_interleave(group, dim=1)

    return F.scaled_dot_product_attention(
        q_NHLK[:, :, begin:end],
        beside(keys),
        beside(values),
        attn_mask=torch.cat((earlier, own), dim=1),
        scale=scale,
    )
