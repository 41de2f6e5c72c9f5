"""Will it fit: bytes of weights and cache, and the largest batch or context in a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from skimp.cost.work import ModelWork


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes needed to serve ``batch`` sequences of ``context`` tokens."""

    batch: int
    context: int
    weight_bytes: float
    cache_bytes: float
    workspace_bytes: float

    @property
    def total_bytes(self) -> float:
        return self.weight_bytes + self.cache_bytes + self.workspace_bytes


def memory_plan(
    work: ModelWork, *, batch: int, context: int, page_tokens: int = 16, step_tokens: int = 512
) -> MemoryPlan:
    """Bytes for ``batch`` sequences of ``context`` tokens, in cache pages of ``page_tokens``.

    The workspace is what one step of ``step_tokens`` rows holds at once: the widest product's
    input and output, or a mixer's own numbers beside them, and float32 logits of every sequence.
    """
    if batch < 1:
        raise ValueError(f"batch: at least 1, not {batch}")
    if context < 1:
        raise ValueError(f"context: at least 1 token, not {context}")
    rows = max(batch, step_tokens)
    # A row is there once for each expert it goes to.
    widths = (m.used * (m.in_features + m.out_features) for m in work.matrices if not m.head)
    widest = max(widths, default=0) + max((m.row_numbers for m in work.mixers), default=0)
    return MemoryPlan(
        batch=batch,
        context=context,
        weight_bytes=work.resident_weight_bytes,
        cache_bytes=float(batch * work.cache_bytes(context, page_tokens=page_tokens)),
        workspace_bytes=float(rows * widest * 4 + batch * work.embedding_rows * 4),
    )


def max_batch(work: ModelWork, *, context: int, budget_bytes: float, page_tokens: int = 16) -> int:
    """Most sequences of ``context`` tokens that fit; 0 if not even one does."""

    def fits(batch: int) -> bool:
        plan = memory_plan(work, batch=batch, context=context, page_tokens=page_tokens)
        return plan.total_bytes <= budget_bytes

    return largest(fits, 1 << 24)


def max_context(work: ModelWork, *, batch: int, budget_bytes: float, page_tokens: int = 16) -> int:
    """Longest context that ``batch`` sequences can have, at most the model's own; 0 if none."""

    def fits(context: int) -> bool:
        plan = memory_plan(work, batch=batch, context=context, page_tokens=page_tokens)
        return plan.total_bytes <= budget_bytes

    return largest(fits, work.max_positions)


def largest(fits: Callable[[int], bool], ceiling: int) -> int:
    """The largest number from 1 to ``ceiling`` that ``fits``, if all below it do; 0 for none."""
    if not fits(1):
        return 0
    low, high = 1, ceiling
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
