"""What one layer remembers, in bytes. Planner, arena, meter and cost model read this object."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """Cache demand of one layer for one sequence.

    ``bytes_per_token`` counts what each remembered token adds, ``bytes_per_sequence`` what a
    sequence holds whatever its length (a recurrent state). ``horizon`` is None when the whole past
    is read, else the number of latest tokens, the current one included, that a query can see.
    ``atomic`` marks a state that cannot be cut at a token: it rolls back and is shared only at
    checkpoints. ``kind`` and ``shape`` tell a kernel how to read a page: for ``kind="kv"`` the
    shape is (kv_heads, head_dim) of one token's keys, and a page stores keys then values,
    in an order of its backend's own: nothing else may look inside.

    Layers with equal specs form one cache group and share one block table.
    """

    kind: str
    bytes_per_token: int
    bytes_per_sequence: int = 0
    horizon: int | None = None
    atomic: bool = False
    dtype: str = "bfloat16"
    shape: tuple[int, ...] = ()

    def tokens_read(self, context: int) -> int:
        """Remembered tokens that one query at position ``context - 1`` reads."""
        return context if self.horizon is None else min(context, self.horizon)

    def bytes_read(self, context: int) -> int:
        """Bytes one generated token reads from this layer's cache at ``context`` tokens."""
        return self.tokens_read(context) * self.bytes_per_token + self.bytes_per_sequence
