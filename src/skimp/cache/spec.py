"""What one layer remembers, in bytes. Planner, arena, meter and cost model read this object."""

from __future__ import annotations

from dataclasses import dataclass, replace

FORMAT_BITS = {"int8": 8, "fp8": 8, "int4": 4}  # bits of one stored number
SCALE_BYTES = 2  # one bfloat16 scale for each stored vector of head_dim numbers
# Newest tokens kept at full precision unless the user says: eight bits lose nothing measurable,
# and at four bits the newest tokens, which are looked at most, carry much of the loss.
DEFAULT_RECENT = {"fp8": 0, "int8": 0, "int4": 64}


def vector_bytes(head_dim: int, format: str) -> int:
    """Bytes of one head's key (or value) of one token: its codes and their scale."""
    return head_dim * FORMAT_BITS[format] // 8 + SCALE_BYTES


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

    ``dtype`` is that of the arithmetic, and of the stored numbers unless ``format`` (``int8``,
    ``fp8`` or ``int4``, see ``cache/formats.py``) says they are rounded further; their scales are
    part of ``bytes_per_token``. ``hadamard``: queries, keys and values are turned before they are
    stored and used. ``recent`` is a second memory of the same layer, at full precision, for the
    newest tokens: a query at position p reads those after p - recent.horizon there, the rest here.

    Layers with equal specs form one cache group and share one block table.
    """

    kind: str
    bytes_per_token: int
    bytes_per_sequence: int = 0
    horizon: int | None = None
    atomic: bool = False
    dtype: str = "bfloat16"
    shape: tuple[int, ...] = ()
    format: str | None = None
    hadamard: bool = False
    recent: CacheSpec | None = None

    def rounded(self, format: str, *, recent: int = 0, hadamard: bool = False) -> CacheSpec:
        """This memory of full-precision keys and values with all but the ``recent`` newest
        tokens rounded; a window within those needs no rounded ones and stays as it is."""
        assert self.kind == "kv" and self.format is None
        if self.horizon is not None and self.horizon <= recent:
            return self
        heads, head_dim = self.shape
        full = replace(self, hadamard=hadamard)
        return replace(
            full,
            bytes_per_token=2 * heads * vector_bytes(head_dim, format),
            format=format,
            recent=replace(full, horizon=recent) if recent else None,
        )

    def tokens_read(self, context: int) -> int:
        """Remembered tokens that one query at position ``context - 1`` reads."""
        return context if self.horizon is None else min(context, self.horizon)

    def bytes_read(self, context: int) -> int:
        """Bytes one generated token reads from this layer's cache at ``context`` tokens."""
        tokens, newest = self.tokens_read(context), 0
        if self.recent is not None:
            tokens -= self.recent.tokens_read(context)
            newest = self.recent.bytes_read(context)
        return tokens * self.bytes_per_token + newest + self.bytes_per_sequence
