"""Draws that stay on the device: the next step reads them there before the host has seen them.

Only what needs nothing of the host's knowledge is drawn so: greedy rows, and laws with a
temperature, top-k, top-p and min-p. The arithmetic is that of ``process`` and ``sampler``, without
a question whose answer the host would have to wait for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from skimp.decoding.process import inverse_temperature, judge, to_device, unwaited_weights
from skimp.decoding.proposal import Accepted
from skimp.decoding.rng import Purpose, uniforms
from skimp.decoding.rows import RowState
from skimp.kernels.draws import draw


def deferrable(row: RowState, ahead: int) -> bool:
    """Whether the row can be drawn without the host, ``ahead`` tokens past those committed."""
    return not row.touched(ahead) and row.params.logprobs is None


@dataclass(frozen=True, kw_only=True)
class DeferredDraws:
    """Tokens on their way to the host: int32 [2, L] of ids, and the bits of the rows' maxima."""

    host: Tensor
    arrived: torch.cuda.Event | None

    def wait(self) -> list[Accepted]:
        """One token a row, or why it has none."""
        if self.arrived is not None:
            self.arrived.synchronize()
        tokens = self.host[0].tolist()
        tops = self.host[1].view(torch.float32).tolist()
        errors = [judge(top, top) for top in tops]
        return [
            Accepted([token], [None]) if error is None else Accepted([], [], error)
            for token, error in zip(tokens, errors)
        ]


@dataclass(frozen=True, kw_only=True)
class DeviceDraws:
    """One token a row, int32 or int64 [L], and what it was drawn from, all on the device: the rows'
    maxima float32 [L], and of the rows ``sampled`` the laws, float64 [S, V], not normalised."""

    tokens: Tensor
    top: Tensor
    sampled: list[int]
    weights: Tensor | None


@dataclass(frozen=True, kw_only=True)
class DrawTable:
    """What a draw needs to know of ``rows`` on the device: of those ``sampled``, float64 [3, S] of
    their numbers in [0, 1), inverse temperatures and min-p; ``index`` int64 [S] if not all are."""

    rows: Sequence[RowState]
    sampled: list[int]
    numbers: Tensor
    index: Tensor | None


def draw_tables(
    draws: Sequence[tuple[Sequence[RowState], Sequence[float]]], device: torch.device
) -> list[DrawTable]:
    """A table for each of several draws, of rows and their numbers, in one copy to the device."""
    sampled = [
        [i for i, row in enumerate(rows) if row.params.temperature != 0.0] for rows, _ in draws
    ]
    columns = [
        (numbers[i], inverse_temperature(rows[i].params), rows[i].params.min_p)
        for (rows, numbers), some in zip(draws, sampled)
        for i in some
    ]
    table = to_device(np.array(columns, dtype=np.float64).reshape(-1, 3).T.copy(), device)
    parts = table.split([len(some) for some in sampled], dim=1)
    found = []
    for (rows, _), some, part in zip(draws, sampled, parts):
        partial = 0 < len(some) < len(rows)
        index = to_device(np.array(some, dtype=np.int64), device) if partial else None
        found.append(DrawTable(rows=rows, sampled=some, numbers=part, index=index))
    return found


def draw_on_device(
    logits: Tensor, table: DrawTable, highest: tuple[Tensor, Tensor] | None = None
) -> DeviceDraws:
    """Draw one token for each row of ``logits`` [L, V] float32 without waiting. A row that cannot
    be drawn from gets some token. ``highest``: the rows' maxima and where they are, if the backend
    has found them already."""
    top, tokens = logits.max(dim=-1) if highest is None else highest
    sampled, index = table.sampled, table.index
    if not sampled:
        return DeviceDraws(tokens=tokens, top=top, sampled=sampled, weights=None)
    part, most = (logits, top) if index is None else (logits[index], top[index])
    numbers, scales, floors = table.numbers
    chosen = [table.rows[i] for i in sampled]
    weights = unwaited_weights(part, most, scales, floors, chosen)
    found = draw(weights, numbers).to(tokens.dtype)
    tokens = found if index is None else tokens.index_copy(0, index, found)
    return DeviceDraws(tokens=tokens, top=top, sampled=sampled, weights=weights)


def draw_deferred(
    logits: Tensor,
    rows: Sequence[RowState],
    ahead: Sequence[int],
    drawn: Tensor,
    highest: tuple[Tensor, Tensor] | None = None,
) -> DeferredDraws:
    """:func:`draw_on_device` into ``drawn`` int32 [>= L], from where the next step reads.

    ``ahead[i]`` is 1 if the row's last token is itself still on its way. A row that cannot be drawn
    from gets an error when its token arrives.
    """
    count = len(rows)
    host, arrived = None, None
    if logits.is_cuda:  # what can fail comes before ``drawn`` is written
        host = torch.empty(2, count, dtype=torch.int32, pin_memory=True)
        arrived = torch.cuda.Event()
    positions = [row.position + late for row, late in zip(rows, ahead)]
    numbers = uniforms([row.key for row in rows], positions, Purpose.SAMPLE)
    (table,) = draw_tables([(rows, numbers)], logits.device)
    found = draw_on_device(logits, table, highest)
    result = torch.stack((found.tokens.to(torch.int32), found.top.view(torch.int32)))
    drawn[:count] = result[0]
    if host is None or arrived is None:
        return DeferredDraws(host=result, arrived=None)
    host.copy_(result, non_blocking=True)
    arrived.record()
    return DeferredDraws(host=host, arrived=arrived)
