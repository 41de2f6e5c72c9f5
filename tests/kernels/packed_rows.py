"""Rows of several sequences as one step, for the tests of attention."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from skimp.kernels.ops import StepInputs

Rows = tuple[int, int, int]  # sequence, first position, number; a negative position is padding


def packed_step(
    rows: Sequence[Rows], ends: Tensor | None, arena: Tensor, tables: tuple[Tensor, ...]
) -> StepInputs:
    """``ends``: what each row sees, if not itself and all before it."""
    positions = torch.cat(
        [torch.arange(p, p + n) if p >= 0 else torch.full((n,), -1) for _, p, n in rows]
    ).int()
    starts = torch.tensor([0, *itertools.accumulate(n for _, _, n in rows)], dtype=torch.int32)
    return StepInputs(
        token_ids=positions,
        positions=positions,
        row_seq=torch.cat([torch.full((n,), seq) for seq, _, n in rows]).int(),
        kv_end=positions + 1 if ends is None else ends.int(),
        seq_starts=starts,
        logit_rows=starts,
        arena=arena,
        block_tables=tables,
    )
