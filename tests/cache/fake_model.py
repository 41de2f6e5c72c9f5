"""A model that remembers, for the cache to be judged by: what it stores at a position of a layer is
a function of the layer and of every token up to there, and of nothing else."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from zlib import crc32

import numpy as np

from skimp.cache import Arena, BlockTables, CacheLayout, CacheManager, CacheSequence, CacheSpec
from skimp.cache.prefix import PageHash, page_hash

HALF = 8  # bytes of one token's keys in one layer; its values take as many
TABLE_ROWS = 12


def spec(horizon: int | None = None, kind: str = "kv") -> CacheSpec:
    return CacheSpec(kind=kind, bytes_per_token=2 * HALF, horizon=horizon)


def chain(salt: Hashable, tokens: Sequence[int]) -> list[int]:
    """Per position a number that depends on all tokens up to it."""
    out, state = [], crc32(repr(salt).encode())
    for token in tokens:
        state = crc32(token.to_bytes(4, "little"), state) ^ (state >> 3)
        out.append(state)
    return out


class Text:
    """A sequence as the model knows it."""

    def __init__(self, cache: CacheSequence, salt: Hashable, tokens: list[int]) -> None:
        self.cache = cache
        self.salt = salt
        self.tokens = tokens  # at least those cached


class World:
    """A cache, and sequences whose every visible position is checked at every step."""

    def __init__(
        self,
        specs: Sequence[CacheSpec],
        *,
        page_tokens: int,
        budget: int,
        chunk_bytes: int | None = None,
        prefix: bool = True,
        hasher: PageHash = page_hash,
    ) -> None:
        self.layout = CacheLayout.from_specs(specs, page_tokens)
        self.arena = Arena(self.layout, budget, chunk_bytes=chunk_bytes)
        self.cache = CacheManager(self.layout, self.arena, prefix, hasher)
        self.layers = [self.layout.layer_cache(i) for i in range(len(specs))]
        self.texts: list[Text] = []
        self.memory = self.arena.data.numpy()
        self.tables = [np.zeros((TABLE_ROWS, 64), np.int32) for _ in self.layout.groups]
        self.block_tables = BlockTables(self.tables)

    def open(self, tokens: list[int], salt: Hashable = None) -> Text:
        text = Text(self.cache.open(tokens, salt), salt, list(tokens))
        assert text.cache.length < max(1, len(tokens))
        self.texts.append(text)
        return text

    def fork(self, text: Text) -> Text:
        twin = Text(self.cache.fork(text.cache), text.salt, list(text.tokens))
        self.texts.append(twin)
        return twin

    def close(self, text: Text) -> None:
        self.cache.close(text.cache)
        self.texts.remove(text)

    def append(self, text: Text, new: Sequence[int]) -> bool:
        """Append tokens, ``text`` continuing with ``new``; a refusal must change nothing."""
        before = self.snapshot()
        start = text.cache.length
        assert list(new[: len(text.tokens) - start]) == text.tokens[start : start + len(new)]
        if not self.cache.append(text.cache, len(new)):
            assert self.snapshot() == before, "a refused append changed something"
            return False
        text.tokens[start : start + len(new)] = new
        return True

    def extend(self, text: Text, new: Sequence[int]) -> int:
        """Lengthen an open append by what is free: nobody else may notice."""
        before = self.snapshot()
        idle = [self.cache.stats().prefix_pages, self.cache.stats().prefix]
        end = text.cache.length + text.cache.pending
        room = self.cache.extend(text.cache, len(new))
        text.tokens[end : end + room] = new[:room]
        after = self.snapshot()
        place = self.texts.index(text)
        for a, b in zip(before[:2], after[:2]):
            assert a[:place] == b[:place] and a[place + 1 :] == b[place + 1 :]
        assert [self.cache.stats().prefix_pages, self.cache.stats().prefix] == idle
        return room

    def snapshot(self) -> tuple:
        pages = [[list(p) for p in text.cache.pages] for text in self.texts]
        lengths = [(text.cache.length, text.cache.pending) for text in self.texts]
        return pages, lengths, dict(self.arena.refs)

    def forward(self, batch: Sequence[Text]) -> None:
        """Write every appended position through the block tables, as a kernel would, and read
        back every position that a query of this step sees."""
        self.block_tables.update([text.cache for text in batch])
        for row, text in enumerate(batch):
            for group, table in enumerate(self.tables):
                pages = list(text.cache.pages[group])
                assert table[row].tolist() == pages + [0] * (table.shape[1] - len(pages))
            states = np.array(chain(text.salt, text.tokens), np.int64)
            start, end = text.cache.length, text.cache.length + text.cache.pending
            for layer in range(len(self.layers)):
                self._cells(layer, row, start, end, states[start:end])
        for row, text in enumerate(batch):
            states = np.array(chain(text.salt, text.tokens), np.int64)
            start, end = text.cache.length, text.cache.length + text.cache.pending
            for layer, place in enumerate(self.layers):
                horizon = place.spec.horizon
                first = 0 if horizon is None else max(0, start - horizon + 1)
                keys, values = self._cells(layer, row, first, end)
                expected = states[first:end] * 1000 + layer
                assert (keys == expected).all(), f"layer {layer}: wrong keys"
                assert (values == -expected).all(), f"layer {layer}: wrong values"

    def _cells(
        self, layer: int, row: int, first: int, end: int, states: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        place = self.layers[layer]
        positions = np.arange(first, end)
        table = self.tables[place.group]
        pages = table[row, positions // place.page_tokens].astype(np.int64)
        assert pages.all(), "a visible position has no page"
        keys = pages * 64 + place.offset + positions % place.page_tokens * HALF
        values = keys + place.page_tokens * HALF
        width = np.arange(HALF)
        out = []
        for cells, sign in ((keys, 1), (values, -1)):
            where = cells[:, None] + width
            if states is not None:
                content = sign * (states * 1000 + layer)
                self.memory[where] = content.view(np.uint8).reshape(-1, HALF)
            out.append(self.memory[where].reshape(-1).view(np.int64))
        return out[0], out[1]

    def commit(self, text: Text, k: int) -> None:
        start = text.cache.length
        self.cache.commit(text.cache, k, text.tokens[start : start + k])
        assert text.cache.length == start + k
        if start + k < len(text.tokens):
            del text.tokens[start + k :]

    def feed(self, text: Text, new: Sequence[int]) -> bool:
        """Append, forward, commit all."""
        if not self.append(text, new):
            return False
        self.forward([text])
        self.commit(text, len(new))
        return True

    def audit(self) -> None:
        self.cache.audit()
        page = self.layout.page_tokens
        for text in self.texts:
            for group, pages in zip(self.layout.groups, text.cache.pages):
                horizon = group.spec.horizon
                if horizon is not None and not text.cache.pending:
                    held = sum(p != 0 for p in pages)
                    assert held <= -(-horizon // page) + 1, "window pages out of reach are held"


def phrase(rng: random.Random, n: int) -> list[int]:
    """Tokens of a poor vocabulary, so that sequences coincide often and then part."""
    return [rng.choice((1, 1, 1, 1, 2)) for _ in range(n)]
