"""One byte budget, cut into chunks that are lent to cache groups and come back when empty.

Ownership::

    arena ── chunks ──┬── common pool (free)
                      └── lent to a group ── pages of that group's native size
                                              └── reference count: sequences and prefix nodes

A page is named by its address: byte offset / 64, the number that stands in block tables. Address 0
is never a page. A chunk whose last page is freed returns to the pool at once, so no split between
groups is fixed; new pages come from the fullest chunk that has room, so the others can empty.
The content of a fresh page is undefined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from skimp.cache.layout import ALIGN, OVERHEAD, CacheLayout

MOST_BYTES = (ALIGN << 31) - 1  # what 32-bit addresses reach


@dataclass(frozen=True, kw_only=True)
class GroupUse:
    """Use of one group. Bytes count pages in use; a partly used chunk is wholly lent."""

    pages_used: int
    pages_free: int  # in chunks lent to this group
    bytes_used: int
    chunks: int
    pages_per_chunk: int
    page_bytes: int


class _Chunk:
    __slots__ = ("base", "free", "fresh", "group", "used")

    def __init__(self, base: int) -> None:
        self.base = base  # address of its first byte
        self.group = -1
        self.used = 0  # pages
        self.fresh = 0  # pages ever handed out since it was lent
        self.free: list[int] = []  # handed out and returned


class _Pool:
    """Chunks lent to one group, sorted by how many pages each has left."""

    __slots__ = ("chunks", "mask", "page_bytes", "per_chunk", "room", "units", "used")

    def __init__(self, page_bytes: int, chunk_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.units = page_bytes // ALIGN
        self.per_chunk = chunk_bytes // page_bytes
        self.room: list[dict[_Chunk, None]] = [{} for _ in range(self.per_chunk + 1)]
        self.mask = 0  # bit n set: room[n] is not empty, n >= 1
        self.chunks = 0
        self.used = 0  # pages

    def put(self, chunk: _Chunk) -> None:
        n = self.per_chunk - chunk.used
        if n:
            self.room[n][chunk] = None
            self.mask |= 1 << n

    def remove(self, chunk: _Chunk) -> None:
        n = self.per_chunk - chunk.used
        if n:
            bucket = self.room[n]
            del bucket[chunk]
            if not bucket:
                self.mask &= ~(1 << n)


class Arena:
    """Pages of every group of a layout out of one allocation of ``budget_bytes``."""

    def __init__(
        self,
        layout: CacheLayout,
        budget_bytes: int,
        device: str | torch.device = "cpu",
        chunk_bytes: int | None = None,
    ) -> None:
        """Allocate the budget once, on ``device``; nothing is allocated later.

        ``chunk_bytes`` is chosen by the layout unless given, and rounded down to
        64. Raises ValueError if the budget cannot give each group one chunk, or exceeds the
        128 GiB that 32-bit addresses in units of 64 bytes can name.
        """
        if budget_bytes > MOST_BYTES:
            raise ValueError(
                f"budget_bytes {budget_bytes} exceeds 128 GiB, the reach of an address"
            )
        self.layout = layout
        self.budget_bytes = budget_bytes
        largest = max(group.page_bytes for group in layout.groups)
        if chunk_bytes is None:
            chunk_bytes = layout.choose_chunk_bytes(budget_bytes)
        chunk_bytes -= chunk_bytes % ALIGN
        if chunk_bytes < largest:
            raise ValueError(f"chunk_bytes {chunk_bytes} is below the largest page, {largest}")
        least = len(layout.groups) * chunk_bytes + OVERHEAD
        if budget_bytes < least:
            raise ValueError(
                f"budget_bytes {budget_bytes} is too small: {len(layout.groups)} cache groups "
                f"with pages of up to {largest} bytes need at least {least}"
            )
        whole = torch.zeros(budget_bytes, dtype=torch.uint8, device=device)
        shift = -whole.data_ptr() % ALIGN
        self.data = whole[shift:]
        self.chunk_bytes = chunk_bytes
        self._chunk_units = chunk_bytes // ALIGN
        count = (budget_bytes - OVERHEAD) // chunk_bytes
        self.chunks = [_Chunk(1 + i * self._chunk_units) for i in range(count)]
        self._idle_chunks = self.chunks[::-1]
        self._pools = [_Pool(group.page_bytes, chunk_bytes) for group in layout.groups]
        self.refs: dict[int, int] = {}  # page in use -> owners; read-only outside this class

    def alloc(self, group: int) -> int:
        """A page of a group with one reference, or 0 if none is left."""
        pool = self._pools[group]
        mask = pool.mask
        if mask:
            n = (mask & -mask).bit_length() - 1  # fullest chunk with room
            bucket = pool.room[n]
            chunk = bucket.popitem()[0]
            if not bucket:
                pool.mask = mask & ~(1 << n)
        elif self._idle_chunks:
            chunk = self._idle_chunks.pop()
            chunk.group = group
            pool.chunks += 1
        else:
            return 0
        if chunk.free:
            page = chunk.free.pop()
        else:
            page = chunk.base + chunk.fresh * pool.units
            chunk.fresh += 1
        chunk.used += 1
        pool.used += 1
        pool.put(chunk)
        self.refs[page] = 1
        return page

    def retain(self, page: int) -> None:
        """One more owner of a page in use."""
        self.refs[page] += 1

    def release(self, page: int) -> int:
        """One owner fewer; the page is free when none is left. Returns the owners left."""
        left = self.refs[page] - 1
        if left:
            self.refs[page] = left
            return left
        del self.refs[page]
        chunk = self.chunks[(page - 1) // self._chunk_units]
        pool = self._pools[chunk.group]
        pool.remove(chunk)
        pool.used -= 1
        chunk.used -= 1
        if chunk.used:
            chunk.free.append(page)
            pool.put(chunk)
        else:
            chunk.group = -1
            chunk.fresh = 0
            chunk.free.clear()
            pool.chunks -= 1
            self._idle_chunks.append(chunk)
        return 0

    def copy(self, group: int, source: int, target: int) -> None:
        """Copy the bytes of a page, in stream order on the arena's device."""
        size = self._pools[group].page_bytes
        self.data[target * ALIGN : target * ALIGN + size] = self.data[
            source * ALIGN : source * ALIGN + size
        ]

    def can_alloc(self, needs: Sequence[int]) -> bool:
        """Whether ``needs[g]`` pages of every group g can be had at once, as things lie."""
        chunks = 0
        for pool, need in zip(self._pools, needs):
            short = need - (pool.chunks * pool.per_chunk - pool.used)
            if short > 0:
                chunks += -(-short // pool.per_chunk)
        return chunks <= len(self._idle_chunks)

    def could_hold(self, pages: Sequence[int]) -> bool:
        """Whether the whole arena, packed, holds ``pages[g]`` pages of every group g."""
        chunks = sum(-(-n // pool.per_chunk) for pool, n in zip(self._pools, pages))
        return chunks <= len(self.chunks)

    def pages_used(self, group: int) -> int:
        return self._pools[group].used

    def group_of(self, page: int) -> int:
        """The group a page in use belongs to."""
        return self.chunks[(page - 1) // self._chunk_units].group

    def compact(self, needs: Sequence[int]) -> dict[int, int]:
        """Move pages out of sparse chunks until :meth:`can_alloc` (needs) holds.

        Requires ``could_hold(used + needs)``. Returns old -> new address of every moved page,
        bytes copied and reference counts carried over; the caller must rename them wherever they
        are held before anything else happens.
        """
        moved: dict[int, int] = {}
        while not self.can_alloc(needs):
            for group, pool in enumerate(self._pools):
                spare = pool.chunks * pool.per_chunk - pool.used
                if spare - needs[group] >= pool.per_chunk:
                    break
            else:
                raise AssertionError("compact called without room")
            # Pages go to the fullest chunks and leave the emptiest, so none moves twice.
            self._vacate(group, next(iter(pool.room[pool.mask.bit_length() - 1])), moved)
        return moved

    def _vacate(self, group: int, chunk: _Chunk, moved: dict[int, int]) -> None:
        pool = self._pools[group]
        last = chunk.base + chunk.fresh * pool.units
        pages = [p for p in range(chunk.base, last, pool.units) if p in self.refs]
        pool.remove(chunk)  # so that alloc cannot hand out its own pages
        for page in pages:
            target = self.alloc(group)
            self.copy(group, page, target)
            self.refs[target] = self.refs[page]
            self.refs[page] = 1
            moved[page] = target
        pool.put(chunk)
        for page in pages:
            self.release(page)

    @property
    def free_chunks(self) -> int:
        """Chunks lent to no group."""
        return len(self._idle_chunks)

    def use(self, group: int) -> GroupUse:
        """What one group holds now."""
        pool = self._pools[group]
        return GroupUse(
            pages_used=pool.used,
            pages_free=pool.chunks * pool.per_chunk - pool.used,
            bytes_used=pool.used * pool.page_bytes,
            chunks=pool.chunks,
            pages_per_chunk=pool.per_chunk,
            page_bytes=pool.page_bytes,
        )

    def audit(self) -> None:
        """Recount everything from the reference counts. Raises AssertionError on a mismatch."""
        used: dict[int, list[int]] = {}
        for page, count in self.refs.items():
            assert count > 0, f"page {page} has {count} references"
            used.setdefault((page - 1) // self._chunk_units, []).append(page)
        chunks, pages_used, masks = ([0] * len(self._pools) for _ in range(3))
        for index, chunk in enumerate(self.chunks):
            pages = used.get(index, [])
            assert chunk.used == len(pages), f"chunk {index}: {chunk.used} used, {len(pages)} found"
            if chunk.group < 0:
                assert not pages and not chunk.free and not chunk.fresh
                continue
            pool = self._pools[chunk.group]
            slots = set(range(chunk.base, chunk.base + chunk.fresh * pool.units, pool.units))
            assert pages, f"chunk {index} is empty but lent"
            assert chunk.fresh <= pool.per_chunk
            assert len(chunk.free) == len(set(chunk.free))
            assert slots == set(pages) | set(chunk.free) and not set(pages) & set(chunk.free)
            end = (chunk.base + self._chunk_units) * ALIGN
            assert (max(slots) * ALIGN) + pool.page_bytes <= end <= self.data.numel()
            room = pool.per_chunk - chunk.used
            assert not room or chunk in pool.room[room]
            chunks[chunk.group] += 1
            pages_used[chunk.group] += chunk.used
            masks[chunk.group] |= (1 << room) & ~1
        for g, pool in enumerate(self._pools):
            assert (pool.chunks, pool.used, pool.mask) == (chunks[g], pages_used[g], masks[g])
            assert sum(map(len, pool.room)) <= pool.chunks
        assert len(self._idle_chunks) == sum(c.group < 0 for c in self.chunks)
        assert self.data.numel() <= self.budget_bytes
