"""Philox against its published vectors, and the independence of its streams."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from skimp.decoding.rng import (
    Purpose,
    make_key,
    philox4x32,
    philox4x32_many,
    plain_uniforms,
    uniform,
    uniforms,
)

# Random123 1.x, kat_vectors, lines "philox4x32 10"
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, int, int, int]
) -> None:
    assert philox4x32(counter, key) == words
    many = philox4x32_many(
        np.array([counter] * 3, dtype=np.uint32), np.array([key] * 3, dtype=np.uint32)
    )
    assert many.tolist() == [list(words)] * 3


def test_scalar_and_vector_agree_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    keys = [int(k) for k in rng.integers(0, 2**64, 500, dtype=np.uint64)]
    positions = [int(p) for p in rng.integers(0, 2**40, 500)]
    leads = [int(lead) for lead in rng.integers(0, 16, 500)]
    for purpose in Purpose:
        one = [uniform(k, p, purpose, lead) for k, p, lead in zip(keys, positions, leads)]
        assert uniforms(keys, positions, purpose, leads) == one
        assert plain_uniforms(keys, positions, leads, purpose) == one
        # few rows take another path
        assert plain_uniforms(keys[:3], positions[:3], leads[:3], purpose) == one[:3]


def test_uniforms_are_uniform_along_each_axis() -> None:
    n = 20_000
    key = make_key(1)
    along_position = uniforms([key] * n, list(range(n)), Purpose.SAMPLE)
    along_key = uniforms([make_key(s) for s in range(n)], [0] * n, Purpose.SAMPLE)
    for draws in (along_position, along_key):
        assert min(draws) >= 0.0 and max(draws) < 1.0
        assert stats.kstest(draws, "uniform").pvalue > 1e-4


def test_streams_are_pairwise_independent() -> None:
    """16 x 16 contingency tables of neighbouring keys, positions and all pairs of purposes."""
    n = 20_000
    keys, positions = [make_key(s) for s in range(n)], list(range(n))
    base = uniforms(keys, positions, Purpose.SAMPLE)
    others = [
        uniforms(keys, [p + 1 for p in positions], Purpose.SAMPLE),
        uniforms([make_key(s + 1) for s in range(n)], positions, Purpose.SAMPLE),
        *(uniforms(keys, positions, p) for p in Purpose if p is not Purpose.SAMPLE),
    ]
    for other in others:
        table = np.histogram2d(base, other, bins=16, range=[[0, 1], [0, 1]])[0]
        assert stats.chi2_contingency(table).pvalue > 1e-4
        assert not np.any(np.equal(base, other))


def test_keys() -> None:
    assert make_key(5) == 5
    assert make_key(-1) == 2**64 - 1
    derived = {make_key(5, i) for i in range(128)}
    assert len(derived) == 128
    assert make_key(5, 3) == make_key(5, 3) != make_key(6, 3)
    assert len({make_key(None) for _ in range(100)}) == 100
