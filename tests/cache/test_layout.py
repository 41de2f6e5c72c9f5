from __future__ import annotations

import pytest
from fake_model import spec
from hypothesis import given, settings
from hypothesis import strategies as st

from skimp.cache import Arena, CacheLayout, CacheSpec

FULL, NEAR = spec(), spec(horizon=5)
sizes = st.lists(
    st.tuples(st.integers(1, 5000), st.none() | st.integers(1, 300)), min_size=1, max_size=6
)


def layout_of(layers: list[tuple[int, int | None]], page_tokens: int = 16) -> CacheLayout:
    return CacheLayout.from_specs(
        [CacheSpec(kind="kv", bytes_per_token=b, horizon=h) for b, h in layers], page_tokens
    )


def test_equal_specs_share_a_group_and_lie_one_after_another() -> None:
    layout = CacheLayout.from_specs([NEAR, FULL, NEAR, NEAR, FULL], page_tokens=3)
    near, full = layout.groups
    assert near.layers == (0, 2, 3) and full.layers == (1, 4)
    assert near.layer_bytes == 64 and near.page_bytes == 192  # 48 bytes, rounded up to 64
    places = [layout.layer_cache(i) for i in range(5)]
    assert [p.group for p in places] == [0, 1, 0, 0, 1]
    assert [p.offset for p in places] == [0, 0, 64, 128, 64]
    assert all(p.page_tokens == 3 for p in places)


@pytest.mark.parametrize(
    ("specs", "page_tokens", "message"),
    [
        ([], 16, "empty"),
        ([FULL], 0, "page_tokens"),
        ([CacheSpec(kind="kv", bytes_per_token=0)], 16, "bytes_per_token"),
        ([spec(horizon=0)], 16, "horizon"),
        ([CacheSpec(kind="state", bytes_per_token=1, atomic=True)], 16, "atomic"),
        ([CacheSpec(kind="state", bytes_per_token=1, bytes_per_sequence=9)], 16, "bytes_per_seq"),
    ],
)
def test_refusals(specs: list[CacheSpec], page_tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CacheLayout.from_specs(specs, page_tokens)


@given(sizes, st.integers(1, 20), st.integers(1, 4000), st.integers(1, 600), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_a_budget_of_bytes_needed_is_enough(
    layers: list[tuple[int, int | None]], page_tokens: int, length: int, step: int, sequences: int
) -> None:
    layout = layout_of(layers, page_tokens)
    budget = layout.bytes_needed(length, step, sequences)
    arena = Arena(layout, budget)
    pages = layout.pages_needed(length, step)
    assert arena.could_hold([sequences * n for n in pages])
    least = sum(sequences * n * g.page_bytes for n, g in zip(pages, layout.groups))
    assert budget <= 2 * least + 16 * max(g.page_bytes for g in layout.groups) * len(pages)


@given(sizes, st.integers(1 << 22, 1 << 34))
@settings(max_examples=200, deadline=None)
def test_chunks_waste_little(layers: list[tuple[int, int | None]], budget: int) -> None:
    layout = layout_of(layers)
    chunk = layout.choose_chunk_bytes(budget)
    largest = max(g.page_bytes for g in layout.groups)
    assert chunk >= largest
    for group in layout.groups:
        usable = budget // chunk * (chunk // group.page_bytes) * group.page_bytes
        # A few large pages in a small budget cannot be cut evenly.
        assert usable >= (0.9 if budget > 400 * largest else 0.4) * budget


@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 200), st.integers(1, 90))
@settings(max_examples=300, deadline=None)
def test_window_pages_are_bounded(horizon: int, page: int, start: int, n: int) -> None:
    group = layout_of([(4, horizon)], page).groups[0]
    # Reach was last reviewed when a page filled; the step then reserves n more.
    first = group.first_page(start // page * page)
    held = -(-(start + n) // page) - first
    assert held <= group.max_pages(start + n, n)
    assert group.max_pages(start + n) <= -(-horizon // page) + 1
    visible = max(0, start - horizon + 1)
    assert group.first_page(start) == visible // page
