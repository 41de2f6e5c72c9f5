from __future__ import annotations

import random

import numpy as np
import pytest
from fake_model import World, chain, spec

from skimp.cache import BlockTables, CacheManager

FULL, NEAR = spec(), spec(horizon=6)


def world(specs=(FULL, NEAR), pages: int = 200, page_tokens: int = 4, **more) -> World:
    """``pages`` pages of 64 bytes for each layer."""
    budget = pages * 64 * len(specs) + 128
    return World(specs, page_tokens=page_tokens, budget=budget, chunk_bytes=64, **more)


def held(text) -> list[int]:
    return [sum(p != 0 for p in pages) for pages in text.cache.pages]


def test_the_last_prompt_token_is_always_computed() -> None:
    w = world()
    for n, reused in ((8, 4), (9, 8), (4, 0), (1, 0), (0, 0)):
        first = w.open(list(range(n)))
        if n:
            assert w.feed(first, first.tokens[first.cache.length :])
        again = w.open(list(range(n)))
        assert again.cache.length == reused
        w.audit()
        w.close(first), w.close(again)
        w.cache.clear_prefix()


def test_rollback_returns_pages_of_rejected_tokens_only() -> None:
    w = world()
    text = w.open([1, 2, 3])
    w.append(text, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert held(text) == [3, 3]
    w.forward([text])
    w.commit(text, 3)
    assert held(text) == [1, 1] and text.cache.length == 3
    w.append(text, [7])
    w.forward([text])
    w.commit(text, 0)
    assert text.cache.length == 3
    w.append(text, [8, 9])
    w.commit(text, 0)
    assert held(text) == [1, 1]
    w.audit()
    with pytest.raises(ValueError, match="1 tokens with 0 appended"):
        w.cache.commit(text.cache, 1, [1])
    w.append(text, [4])
    with pytest.raises(ValueError, match="0 ids given"):
        w.cache.commit(text.cache, 1, [])


def test_window_pages_out_of_reach_are_freed() -> None:
    w = world(prefix=False)
    text = w.open([])
    for i in range(100):
        assert w.feed(text, [i % 7])
        full, near = held(text)
        assert full == -(-(i + 1) // 4) and near <= 3
        w.audit()
    stats = w.cache.stats()
    assert stats.groups[1].pages_used <= 3
    assert stats.passed_pages[0] == 0
    assert stats.passed_pages[1] + stats.groups[1].pages_used == stats.groups[0].pages_used
    assert stats.saved_bytes == stats.passed_pages[1] * 64
    w.close(text)
    assert w.cache.stats().saved_bytes == 0


def test_forks_share_until_they_write() -> None:
    w = world(prefix=False)
    text = w.open([])
    w.feed(text, [1, 2, 3, 4, 5, 6])
    twins = [w.fork(text) for _ in range(3)]
    assert w.arena.pages_used(0) == 2
    for i, twin in enumerate(twins):
        w.feed(twin, [10 + i])
        w.audit()
    assert w.arena.pages_used(0) == 5
    w.feed(text, [9])  # the last owner of the original page writes in place
    assert w.arena.pages_used(0) == 5
    for each in (text, *twins):
        assert w.feed(each, [1, 2, 3])
    w.audit()


def test_equal_pages_are_kept_once() -> None:
    w = world()
    texts = [w.open([1, 2, 3, 4, 5]) for _ in range(3)]
    for text in texts:
        w.append(text, text.tokens)
    assert w.arena.pages_used(0) == 6
    w.forward(texts)
    for text in texts:
        w.commit(text, 5)
        w.audit()
    assert w.arena.pages_used(0) == 4  # one first page, three second ones
    for text in texts:
        assert w.feed(text, [6])


def test_salt_separates_tenants() -> None:
    w = world()
    text = w.open([1] * 9, salt="a")
    w.feed(text, [1] * 9)
    assert w.open([1] * 9, salt="b").cache.length == 0
    assert w.open([1] * 9).cache.length == 0
    assert w.open([1] * 9, salt="a").cache.length == 8
    w.audit()


def test_a_collision_costs_a_miss_and_nothing_else() -> None:
    w = world(hasher=lambda parent, tokens: 1)
    first = w.open([1] * 9)
    w.feed(first, [1] * 9)
    other = w.open([2] * 9)
    assert other.cache.length == 0
    w.feed(other, [2] * 9)
    w.audit()
    assert w.open([2] * 9).cache.length == 0
    assert w.open([1] * 9).cache.length == 4  # the second page collided with the first
    stats = w.cache.stats().prefix
    assert stats is not None and stats.collisions == 2


def test_reuse_needs_the_window_and_says_so() -> None:
    w = world(pages=30)
    text = w.open([])
    tokens = [i % 5 for i in range(80)]
    for token in tokens:
        assert w.feed(text, [token])
    early = w.open(tokens[:41])
    assert early.cache.length == 40  # the tree keeps what the window left behind
    w.close(early)
    filler = w.open([9] * 60)
    assert w.feed(filler, [9] * 60), "idle window pages were not evicted"
    w.audit()
    stats = w.cache.stats().prefix
    assert stats is not None and stats.pages_evicted > 0
    again = w.open(tokens)
    assert again.cache.length == 76  # the end of the running sequence is whole
    assert w.open(tokens[:41]).cache.length == 40  # used lately
    middle = w.open(tokens[:25])
    assert middle.cache.length < 24
    assert "window" in middle.cache.reuse_note and "group 1" in middle.cache.reuse_note
    w.audit()


def test_eviction_takes_the_oldest_branch_from_its_end() -> None:
    w = world((FULL,), pages=12)
    for branch in (1, 2, 3):
        text = w.open([branch] * 13)
        assert w.feed(text, [branch] * 13)
        w.close(text)
    assert w.cache.stats().prefix_pages == (9,)
    w.close(w.open([1] * 13))  # recently used
    text = w.open([4] * 20)
    assert w.feed(text, [4] * 20)
    w.audit()
    assert [w.open([b] * 13).cache.length for b in (1, 2, 3)] == [12, 4, 12]


def test_refused_appends_do_not_empty_the_prefix_cache() -> None:
    w = world((FULL,), pages=10)
    kept = w.open([1] * 17)
    w.feed(kept, [1] * 17)
    w.close(kept)
    running = w.open([2] * 8)
    w.feed(running, [2] * 8)
    assert not w.append(w.open([3] * 60), [3] * 60)
    assert w.cache.stats().prefix_pages == (4,)


@pytest.mark.parametrize("seed", range(40))
def test_what_fits_can_always_finish_alone(seed: int) -> None:
    """However fragmented the arena is when everybody else has left."""
    rng = random.Random(seed)
    specs = [FULL, *(spec(rng.choice((None, 3, 7, 12)), rng.choice("ab")) for _ in range(4))]
    w = World(specs, page_tokens=4, budget=5 * 64 * 12 + 128, chunk_bytes=5 * 64)
    length = max(n for n in range(200) if w.cache.fits(n, step=3))
    crowd = [w.open([]) for _ in range(8)]
    for _ in range(100):
        text = rng.choice(crowd)
        n = rng.randint(1, 3)
        if text.cache.length + n <= length:
            w.append(text, [rng.randint(0, 9) for _ in range(n)]) and w.forward([text])
            w.commit(text, text.cache.pending)
    survivor = rng.choice(crowd)
    for text in crowd:
        if text is not survivor:
            w.close(text)
    while survivor.cache.length < length:
        n = min(3, length - survivor.cache.length)
        assert w.feed(survivor, [5] * n), "stuck"
        w.audit()
    assert not w.cache.fits(10**6)


def test_block_tables_write_only_what_changed() -> None:
    w = world()
    a, b = w.open([1] * 6), w.open([2] * 3)
    tables = [np.full((3, 8), 7, np.int32) for _ in range(2)]
    w.feed(a, a.tokens), w.feed(b, b.tokens)
    write = BlockTables(tables).update
    assert write([a.cache, b.cache]) == [0, 1]
    assert all((t[2] == 0).all() for t in tables)
    assert write([a.cache, b.cache]) == []
    w.append(b, [2])
    assert write([a.cache, b.cache]) == []  # the page was there
    w.commit(b, 1)
    w.append(b, [2])
    assert write([a.cache, b.cache]) == [1]
    assert write([b.cache]) == [0]
    w.close(a)
    w.commit(b, 0)
    c = w.open([3])
    w.append(c, [3])
    assert write([c.cache, b.cache]) == [0, 1]
    assert tables[0][0].tolist() == [*c.cache.pages[0], *[0] * 7]
    with pytest.raises(ValueError, match="3 rows"):
        write([b.cache] * 4)
    long = w.open([0] * 40)
    w.append(long, [0] * 40)
    with pytest.raises(ValueError, match="8 columns"):
        write([long.cache])


def test_stats_account_for_every_page() -> None:
    w = world(pages=50)
    text = w.open([1] * 10)
    assert w.cache.stats().prefix.queries == 0  # not until it is admitted
    w.feed(text, [1] * 10)
    stats = w.cache.stats()
    assert [g.pages_used for g in stats.groups] == [3, 3] and stats.prefix_pages == (0, 1)
    assert stats.groups[0].bytes_used == 3 * 64 and stats.chunks_free == stats.chunks - 6
    w.close(text)
    stats = w.cache.stats()
    assert stats.sequences == 0 and stats.prefix_pages == (2, 2)
    again = w.open([1] * 10)
    w.feed(again, [1] * 2)
    prefix = w.cache.stats().prefix
    assert (prefix.queries, prefix.hits, prefix.tokens_asked, prefix.tokens_reused) == (2, 1, 20, 8)
    off = CacheManager(w.layout, w.arena, enable_prefix=False)
    assert off.stats().prefix is None and off.open([1] * 9).reuse_note == "prefix reuse is off"


def test_the_fake_model_depends_on_salt_and_past() -> None:
    assert chain("a", [1, 2, 3])[2] != chain("b", [1, 2, 3])[2] != chain("b", [2, 2, 3])[2]


def test_eviction_spares_anchors_while_windows_can_give() -> None:
    w = world(pages=100)
    text = w.open([])
    for i in range(40):  # window pages fall out of reach one by one and stay for reuse
        assert w.feed(text, [i % 5])
    w.close(text)
    full, near = w.cache.stats().prefix_pages
    assert (full, near) == (10, 10)
    tree = w.cache._tree
    assert tree is not None
    for _ in range(4):  # the full group is short, but these window pages were left longer ago
        tree.evict(0)
    assert w.cache.stats().prefix_pages == (10, 6)
    for _ in range(5):  # the window group is short
        tree.evict(1)
    assert w.cache.stats().prefix_pages == (10, 1)
    tree.evict(0)  # now the end of the branch is the oldest
    assert w.cache.stats().prefix_pages == (9, 1)
    w.audit()
    tree.evict(1)
    tree.evict(1)  # only chunks emptied by the full group can help now
    assert w.cache.stats().prefix_pages == (8, 0)
    w.audit()
