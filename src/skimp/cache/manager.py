"""The one way tokens enter a cache: ``append(n)``, a forward that writes them, ``commit(k)``."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from skimp.cache.arena import Arena, GroupUse
from skimp.cache.layout import CacheLayout
from skimp.cache.prefix import Node, PageHash, PrefixStats, PrefixTree, page_hash


@dataclass(frozen=True, kw_only=True)
class CacheStats:
    """What the cache holds now."""

    budget_bytes: int
    chunk_bytes: int
    chunks: int
    chunks_free: int
    groups: tuple[GroupUse, ...]
    prefix_pages: tuple[int, ...]  # per group, pages that only the prefix tree keeps
    passed_pages: tuple[int, ...]  # per group, pages of open sequences that windows have left
    sequences: int
    prefix: PrefixStats | None  # None: prefix reuse is off

    @property
    def saved_bytes(self) -> int:
        """Bytes that open sequences would hold besides if no layer had a window."""
        return sum(pages * use.page_bytes for pages, use in zip(self.passed_pages, self.groups))


class CacheSequence:
    """One sequence's place in the cache. Read ``length``, ``pending`` and ``reuse_note``; only
    :class:`CacheManager` changes anything."""

    __slots__ = (
        "_asked",
        "_boundary",
        "_capacity",
        "_first",
        "_node",
        "_shared_tail",
        "_tail",
        "_version",
        "closed",
        "length",
        "pages",
        "pending",
        "reuse_note",
    )

    def __init__(self, groups: int, page_tokens: int) -> None:
        self.length = 0  # tokens committed
        self.pending = 0  # tokens appended and not yet committed
        self.pages = [array("i") for _ in range(groups)]  # per group, address or 0
        self.reuse_note = ""  # why no more of the prompt was reused; empty: nothing was missed
        self.closed = False
        self._asked = 0  # prompt tokens whose reuse is not yet in the statistics
        self._first = [0] * groups  # per group, entries before this one are 0
        self._capacity = 0  # positions reserved
        self._boundary = page_tokens  # length at which pages are reviewed
        self._shared_tail = False  # the page of the next position may have another owner
        self._tail: list[int] = []  # committed tokens after the last registered page
        self._node: Node | None = None  # None: this sequence registers nothing
        self._version = 0  # moves with every change of ``pages``


class BlockTables:
    """Block tables of a batch, kept up to date at the price of what changed.

    Row i describes ``seqs[i]``. A sequence that keeps its row costs nothing but a comparison
    until one of its pages changes. Entries of absent pages are 0.
    """

    def __init__(self, tables: Sequence[np.ndarray]) -> None:
        """``tables``: per group int32 [S, width]; views of tensors are fine. They are zeroed, and
        must be written by nobody else."""
        self.tables = tables
        self._rows: list[CacheSequence | None] = [None] * len(tables[0])
        self._versions = [-1] * len(tables[0])
        self._written = [[0] * len(tables[0]) for _ in tables]
        for table in self.tables:
            assert table.dtype == np.int32 and len(table) == len(self._rows)
            table[:] = 0

    def update(self, seqs: Sequence[CacheSequence]) -> list[int]:
        """Bring rows 0 .. len(seqs) - 1 up to date, after the last ``append`` of a step and
        before its forward. Returns the rows that changed.

        Raises ValueError if there are more sequences than rows or pages than columns.
        """
        rows, versions = self._rows, self._versions
        if len(seqs) > len(rows):
            raise ValueError(f"{len(seqs)} sequences, but block tables have {len(rows)} rows")
        changed = []
        for i, seq in enumerate(seqs):
            if versions[i] == seq._version and rows[i] is seq:
                continue
            self._write(i, seq)
            rows[i] = seq
            versions[i] = seq._version
            changed.append(i)
        return changed

    def _write(self, row: int, seq: CacheSequence) -> None:
        for table, written, pages in zip(self.tables, self._written, seq.pages):
            n = len(pages)
            if n > table.shape[1]:
                raise ValueError(f"{n} pages, but block tables have {table.shape[1]} columns")
            entries = table[row]
            entries[:n] = pages
            if n < written[row]:
                entries[n : written[row]] = 0
            written[row] = n


class CacheManager:
    """Sequences, their pages, and what is kept of them. See the package's contract."""

    def __init__(
        self,
        layout: CacheLayout,
        arena: Arena,
        enable_prefix: bool = True,
        page_hash: PageHash = page_hash,
    ) -> None:
        self.layout = layout
        self.arena = arena
        self._page = layout.page_tokens
        self._tree = PrefixTree(layout, arena, page_hash) if enable_prefix else None
        self._sequences: dict[CacheSequence, None] = {}

    # -- a sequence's life ------------------------------------------------------------------------

    def open(self, token_ids: Sequence[int], salt: Hashable = None) -> CacheSequence:
        """A sequence that will begin with ``token_ids``; ``length`` tells how many of them are
        cached already. The last one never is: its logits are needed.

        ``salt`` separates what must not be shared: tenants, adapters, anything besides the token
        ids that changes keys and values.
        """
        seq = CacheSequence(len(self.layout.groups), self._page)
        self._sequences[seq] = None
        if self._tree is None:
            seq.reuse_note = "prefix reuse is off"
            return seq
        ids = np.asarray(token_ids, dtype=np.int32)
        limit = max(0, len(ids) - 1) // self._page
        root = self._tree.start(salt)
        seq._node, tables, seq.reuse_note = self._tree.match(root, ids.tobytes(), limit)
        seq.pages = [array("i", pages) for pages in tables]
        seq.length = seq._capacity = seq._node.depth * self._page
        seq._first = [group.first_page(seq.length) for group in self.layout.groups]
        seq._boundary = seq.length + self._page
        seq._asked = len(ids)
        return seq

    def append(self, seq: CacheSequence, n: int) -> bool:
        """Reserve pages for positions [length, length + n) in every group, evicting idle prefix
        pages if need be. Tokens appended before are to be committed first.

        False if the budget does not allow it; then nothing has changed.
        """
        assert n > 0 and not seq.pending, "append after append, or of nothing"
        end = seq.length + n
        if (end > seq._capacity or seq._shared_tail) and not self._reserve(seq, end):
            return False
        seq.pending = n
        return True

    def extend(self, seq: CacheSequence, n: int) -> int:
        """Reserve up to ``n`` more positions for a step whose ``append`` is open, for guesses: of
        what is free, and nothing is evicted or moved for them. Returns how many."""
        assert n > 0 and seq.pending, "extend is of an open append"
        end = seq.length + seq.pending
        fresh = -(-(end + n) // self._page) - seq._capacity // self._page
        if fresh > 0 and not self.arena.can_alloc([fresh] * len(seq.pages)):
            n = seq._capacity - end
        elif fresh > 0:
            self._reserve(seq, end + n)
        seq.pending += n
        return n

    def commit(self, seq: CacheSequence, k: int, token_ids: Sequence[int]) -> None:
        """Keep the first ``k`` of the appended tokens, whose ids begin ``token_ids``; roll the
        others back and return the pages that only they used.

        Raises ValueError if k is not in [0, appended] or token_ids are fewer than k.
        """
        if not 0 <= k <= seq.pending or len(token_ids) < k:
            raise ValueError(
                f"commit of {k} tokens with {seq.pending} appended and {len(token_ids)} ids given"
            )
        seq.pending = 0
        length = seq.length = seq.length + k
        if seq._node is not None:
            if k == 1:
                seq._tail.append(token_ids[0])
            else:
                seq._tail.extend(token_ids[:k])
        if length >= seq._boundary or seq._capacity - length >= self._page:
            self._settle(seq)

    def fork(self, seq: CacheSequence) -> CacheSequence:
        """Another sequence with the same tokens, sharing all pages until one of them writes."""
        assert not seq.pending and not seq.closed, "fork between append and commit"
        twin = CacheSequence(len(seq.pages), self._page)
        twin.length = seq.length
        twin.pages = [array("i", pages) for pages in seq.pages]
        twin._first = list(seq._first)
        twin._capacity = seq._capacity
        twin._boundary = seq._boundary
        twin._tail = list(seq._tail)
        twin._node = seq._node
        if seq._node is not None:
            seq._node.pins += 1
        for pages, first in zip(seq.pages, seq._first):
            for page in pages[first:]:
                self.arena.retain(page)
        seq._shared_tail = twin._shared_tail = seq.length % self._page != 0
        self._sequences[twin] = None
        return twin

    def close(self, seq: CacheSequence) -> None:
        """End a sequence, finished or not, and return its pages. Complete pages stay reusable for
        as long as nobody needs the room, so opening a sequence with the same tokens resumes where
        possible: that is how one is preempted. Closing twice is harmless."""
        if seq.closed:
            return
        release = self.arena.release if self._tree is None else self._tree.release
        for pages, first in zip(seq.pages, seq._first):
            for i in range(len(pages) - 1, first - 1, -1):  # deepest first: see PrefixTree
                release(pages[i])
            del pages[:]
        if seq._node is not None and self._tree is not None:
            self._tree.unpin(seq._node)
        seq._node = None
        seq.length = seq.pending = seq._capacity = 0
        seq.closed = True
        seq._version += 1
        del self._sequences[seq]

    # -- planning ---------------------------------------------------------------------------------

    def pages_needed(self, length: int, step: int = 1) -> tuple[int, ...]:
        """Per group, the most pages one sequence holds at once on its way to ``length`` tokens,
        appending at most ``step`` at a time."""
        return self.layout.pages_needed(length, step)

    def fits(self, max_length: int, step: int = 1) -> bool:
        """Whether a sequence alone in the cache can always reach ``max_length`` tokens. What does
        not fit is to be refused: it can never finish."""
        return self.arena.could_hold(self.pages_needed(max_length, step))

    # -- looking ----------------------------------------------------------------------------------

    def stats(self) -> CacheStats:
        """Exact use of the budget."""
        arena, tree = self.arena, self._tree
        groups = range(len(self.layout.groups))
        return CacheStats(
            budget_bytes=arena.budget_bytes,
            chunk_bytes=arena.chunk_bytes,
            chunks=len(arena.chunks),
            chunks_free=arena.free_chunks,
            groups=tuple(arena.use(g) for g in groups),
            prefix_pages=tuple(0 if tree is None else tree.idle_pages(g) for g in groups),
            passed_pages=tuple(sum(seq._first[g] for seq in self._sequences) for g in groups),
            sequences=len(self._sequences),
            prefix=None if tree is None else tree.stats,
        )

    def audit(self) -> None:
        """Recompute every reference count and invariant from scratch; for tests.

        Raises AssertionError on a mismatch.
        """
        refs: Counter[int] = Counter()
        ends: Counter[int] = Counter()
        for seq in self._sequences:
            assert seq._capacity % self._page == 0
            assert seq.length + seq.pending <= seq._capacity
            assert seq._capacity - seq.length - seq.pending < self._page
            for group, pages, first in zip(self.layout.groups, seq.pages, seq._first):
                assert len(pages) == seq._capacity // self._page
                assert not any(pages[:first]) and all(pages[first:])
                assert first <= group.first_page(seq.length)
                assert all(self.arena.group_of(page) == group.index for page in pages[first:])
                bound = group.max_pages(seq.length + seq.pending, max(1, seq.pending))
                assert len(pages) - first <= bound, "more pages than planned for"
                refs.update(pages[first:])
            if seq._node is not None:
                ends[id(seq._node)] += 1
                assert seq._node.depth * self._page + len(seq._tail) == seq.length
        if self._tree is not None:
            for node in self._tree.nodes():
                refs.update(page for page in node.pages if page)
            self._tree.audit(ends)
        assert refs == self.arena.refs, "reference counts differ"
        self.arena.audit()

    def clear_prefix(self) -> None:
        """Forget every prefix that no sequence uses."""
        if self._tree is not None:
            self._tree.clear()

    # -- inside -----------------------------------------------------------------------------------

    def _reserve(self, seq: CacheSequence, end: int) -> bool:
        """Pages up to position ``end``, and a tail of its own for a sequence that shares it.
        False, with nothing changed, if there is no room."""
        assert not seq.closed, "append to a closed sequence"
        arena, page_tokens = self.arena, self._page
        groups = range(len(seq.pages))
        fresh = -(-end // page_tokens) - seq._capacity // page_tokens
        tail = seq.length // page_tokens
        shared = [seq._shared_tail and arena.refs[seq.pages[g][tail]] > 1 for g in groups]
        needs = [fresh + copied for copied in shared]
        if not arena.can_alloc(needs) and not self._make_room(needs):
            return False
        for g, copied in enumerate(shared):
            pages = seq.pages[g]
            if copied:
                page = arena.alloc(g)
                arena.copy(g, pages[tail], page)
                arena.release(pages[tail])
                pages[tail] = page
            for _ in range(fresh):
                pages.append(arena.alloc(g))
        seq._shared_tail = False
        seq._capacity += fresh * page_tokens
        seq._version += 1
        if seq._asked and self._tree is not None:
            self._tree.record(seq._asked, seq.length, seq.reuse_note)
            seq._asked = 0
        return True

    def _make_room(self, needs: list[int]) -> bool:
        """Make ``arena.can_alloc(needs)`` true: evict until the pages would fit if packed, then
        pack. False, having done nothing, if that is not enough."""
        arena, tree = self.arena, self._tree
        groups = range(len(needs))
        held = [arena.pages_used(g) - (tree.idle_pages(g) if tree else 0) for g in groups]
        if not arena.could_hold([n + need for n, need in zip(held, needs)]):
            return False
        while not arena.can_alloc(needs):
            if arena.could_hold([arena.pages_used(g) + needs[g] for g in groups]):
                self._rename(arena.compact(needs))
                break
            assert tree is not None
            tree.evict(next(g for g in groups if arena.use(g).pages_free < needs[g]))
        return True

    def _rename(self, moved: dict[int, int]) -> None:
        if self._tree is not None:
            self._tree.rename(moved)
        for seq in self._sequences:
            for pages in seq.pages:
                for i, page in enumerate(pages):
                    if page in moved:
                        pages[i] = moved[page]
                        seq._version += 1

    def _settle(self, seq: CacheSequence) -> None:
        """After a commit that filled a page or left one unused: register complete pages, let go
        of those out of reach, return those past the end."""
        tree, page_tokens = self._tree, self._page
        release = self.arena.release if tree is None else tree.release
        if tree is not None and seq._node is not None and len(seq._tail) >= page_tokens:
            self._register(tree, seq)
        keep = -(-seq.length // page_tokens)
        for g, group in enumerate(self.layout.groups):
            pages, first = seq.pages[g], seq._first[g]
            for page in pages[max(keep, first) :]:
                release(page)
            del pages[keep:]
            needed = min(group.first_page(seq.length), keep)
            if needed > first:
                for i in range(first, needed):
                    release(pages[i])
                    pages[i] = 0
                seq._first[g] = needed
        seq._capacity = keep * page_tokens
        seq._boundary = (seq.length // page_tokens + 1) * page_tokens
        seq._version += 1

    def _register(self, tree: PrefixTree, seq: CacheSequence) -> None:
        page_tokens, tail, start = self._page, seq._tail, 0
        while seq._node is not None and len(tail) - start >= page_tokens:
            tokens = array("i", tail[start : start + page_tokens]).tobytes()
            index = seq._node.depth
            entries = [pages[index] for pages in seq.pages]
            seq._node = tree.extend(seq._node, tokens, entries)
            for pages, page in zip(seq.pages, entries):
                pages[index] = page
            start += page_tokens
        seq._tail = tail[start:] if seq._node is not None else []
