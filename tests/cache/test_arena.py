from __future__ import annotations

import random
from itertools import pairwise

import pytest
from fake_model import spec

from skimp.cache import Arena, CacheLayout

# Pages of 64, 128 and 192 bytes.
LAYOUT = CacheLayout.from_specs(
    [spec(), *[spec(horizon=4)] * 2, *[spec(horizon=8)] * 3], page_tokens=4
)


def arena(chunks: int, chunk_bytes: int = 384) -> Arena:
    return Arena(LAYOUT, chunks * chunk_bytes + 128, chunk_bytes=chunk_bytes)


def test_every_byte_can_go_to_any_group() -> None:
    for group, per_chunk in ((0, 6), (1, 3), (2, 2)):
        a = arena(5)
        pages = [a.alloc(group) for _ in range(5 * per_chunk)]
        assert 0 not in pages and a.alloc(group) == 0
        size = LAYOUT.groups[group].page_bytes
        spans = sorted((64 * p, 64 * p + size) for p in pages)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert spans[0][0] > 0 and spans[-1][1] <= a.data.numel() <= a.budget_bytes
        assert a.data.data_ptr() % 64 == 0
        a.audit()


def test_chunks_return_to_the_pool_and_change_hands() -> None:
    a = arena(4)
    small = [a.alloc(0) for _ in range(24)]
    assert not a.can_alloc([0, 1, 0])
    for page in small[6:12]:
        a.release(page)
    assert a.free_chunks == 1 and a.use(0).chunks == 3
    assert a.can_alloc([0, 3, 0]) and not a.can_alloc([0, 1, 1]) and not a.can_alloc([1, 1, 0])
    assert [bool(a.alloc(1)) for _ in range(4)] == [True, True, True, False]
    a.audit()


def test_new_pages_come_from_the_fullest_chunk() -> None:
    a = arena(3)
    pages = [a.alloc(0) for _ in range(18)]
    for page in [*pages[0:5], *pages[6:8], *pages[12:16]]:  # 1, 4 and 2 left in use
        a.release(page)
    refilled = {(a.alloc(0) - 1) // 6 for _ in range(2)}
    assert refilled == {(pages[6] - 1) // 6}
    a.release(pages[5])
    assert a.free_chunks == 1
    a.audit()


def test_references_are_counted() -> None:
    a = arena(3)
    page = a.alloc(0)
    a.retain(page)
    assert a.release(page) == 1 and a.free_chunks == 2
    assert a.release(page) == 0 and a.free_chunks == 3
    a.audit()


def test_copy_copies_a_whole_page_and_nothing_else() -> None:
    a = arena(3)
    pages = [a.alloc(2) for _ in range(4)]
    for value, page in enumerate(pages):
        a.data[64 * page : 64 * page + 192] = value
    a.copy(2, pages[0], pages[2])
    contents = [set(a.data[64 * p : 64 * p + 192].tolist()) for p in pages]
    assert contents == [{0}, {1}, {0}, {3}]


@pytest.mark.parametrize("seed", range(50))
def test_compaction_makes_room_and_keeps_content(seed: int) -> None:
    rng = random.Random(seed)
    a = arena(12)
    pages: dict[int, int] = {}  # page -> content
    while any(fresh := [a.alloc(g) for g in (0, 1, 2)]):
        for page in filter(None, fresh):
            pages[page] = len(pages)
    for page in rng.sample(list(pages), len(pages) // 2):
        a.release(page)
        del pages[page]
    for page, content in pages.items():
        group = LAYOUT.groups[a.group_of(page)]
        a.data[64 * page : 64 * page + group.page_bytes] = content
        if rng.random() < 0.3:
            a.retain(page)
    refs = sorted(a.refs.values())
    used = [a.pages_used(g) for g in range(3)]
    needs = [0, 0, 0]
    while True:  # as much as fits if packed
        more = list(needs)
        more[rng.randrange(3)] += 1
        if not a.could_hold([n + m for n, m in zip(used, more)]):
            break
        needs = more
    moved = a.compact(needs)
    a.audit()
    assert a.can_alloc(needs) and sorted(a.refs.values()) == refs
    assert {moved.get(p, p) for p in pages} == set(a.refs)
    for page, content in pages.items():
        at = moved.get(page, page)
        size = LAYOUT.groups[a.group_of(at)].page_bytes
        assert set(a.data[64 * at : 64 * at + size].tolist()) == {content}
    for g, n in enumerate(needs):
        assert all(a.alloc(g) for _ in range(n))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="too small"):
        Arena(LAYOUT, 3 * 192 + 127)
    with pytest.raises(ValueError, match="largest page"):
        Arena(LAYOUT, 4096, chunk_bytes=128)
    with pytest.raises(ValueError, match="128 GiB"):
        Arena(LAYOUT, 1 << 37)
