"""Random numbers as a function of (key, position, purpose): Philox4x32-10.

Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. There is no
state to advance, so what a request draws cannot depend on its neighbours in the batch or on
preemption, nor, where guesses are compared, on how many there were; and two purposes at one
position are independent, which a shared noise vector is not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from skimp.kernels import native
from skimp.kernels.draws import random_numbers

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_VECTOR_FROM = 12  # below that many counters plain integers are faster than numpy calls


class Purpose(IntEnum):
    """What a draw is for; part of the counter, so purposes never share numbers."""

    SAMPLE = 0  # the token of a plain step, or the bonus token of a speculative one
    DRAFT = 1  # the proposer's token
    ACCEPT = 2  # how many drafted tokens stand; at the position of the first
    RESIDUAL = 3  # the token after a refusal
    KEY = 4  # deriving the key of sample i of n


def philox4x32(
    counter: tuple[int, int, int, int], key: tuple[int, int]
) -> tuple[int, int, int, int]:
    """One block: four 32-bit words from a 128-bit counter and a 64-bit key, least word first."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0 = _M0 * c0
        p1 = _M1 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0 = (k0 + _W0) & _MASK
        k1 = (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def philox4x32_many(counters: NDArray[np.uint32], keys: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """:func:`philox4x32` on [N, 4] counters and [N, 2] keys; returns [N, 4]."""
    c0, c1, c2, c3 = (counters[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = (keys[:, i].astype(np.uint64) for i in range(2))
    low, shift = np.uint64(_MASK), np.uint64(32)
    for _ in range(_ROUNDS):
        p0 = np.uint64(_M0) * c0
        p1 = np.uint64(_M1) * c2
        c0, c1 = (p1 >> shift) ^ c1 ^ k0, p1 & low
        c2, c3 = (p0 >> shift) ^ c3 ^ k1, p0 & low
        k0 = (k0 + np.uint64(_W0)) & low
        k1 = (k1 + np.uint64(_W1)) & low
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def make_key(seed: int | None, sample_index: int = 0) -> int:
    """The 64-bit key of sample ``sample_index`` of a request.

    Sample 0 uses the seed itself (two's complement), so ``n = 1`` and the first of ``n`` agree;
    later samples use a Philox output of it. Without a seed the key comes from the system.
    """
    if seed is None:
        return int.from_bytes(os.urandom(8), "little")
    key = seed & 0xFFFFFFFFFFFFFFFF
    if sample_index == 0:
        return key
    words = philox4x32((sample_index & _MASK, sample_index >> 32, Purpose.KEY, 0), _split(key))
    return words[0] | words[1] << 32


def uniform(key: int, position: int, purpose: Purpose, lead: int = 0) -> float:
    """One float64 in [0, 1) with 53 random bits.

    ``lead`` is how far a draft reached ahead of what was certain. A position that is drafted again,
    from nearer by, needs a number of its own: the refusal of the first draft knew the first one.
    """
    counter = (position & _MASK, position >> 32, int(purpose), lead)
    w0, w1, _, _ = philox4x32(counter, _split(key))
    return ((w0 >> 5) * 67108864 + (w1 >> 6)) * 2.0**-53


def uniforms(
    keys: Sequence[int],
    positions: Sequence[int],
    purpose: Purpose,
    leads: Sequence[int] | None = None,
) -> list[float]:
    """:func:`uniform` for [N] keys, positions and leads (None: 0). Equal to it bit for bit."""
    leads = [0] * len(keys) if leads is None else leads
    numbers = random_numbers if native.available() else plain_uniforms
    return numbers(keys, positions, leads, purpose)


def plain_uniforms(
    keys: Sequence[int], positions: Sequence[int], leads: Sequence[int], purpose: Purpose
) -> list[float]:
    """:func:`uniforms` without the native kernels."""
    if len(keys) < _VECTOR_FROM:
        rows = zip(keys, positions, leads, strict=True)
        return [uniform(k, p, purpose, lead) for k, p, lead in rows]
    key = np.array(keys, dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    counters = np.zeros((len(keys), 4), dtype=np.uint32)
    low, shift = np.uint64(_MASK), np.uint64(32)
    counters[:, 0], counters[:, 1] = position & low, position >> shift
    counters[:, 2], counters[:, 3] = int(purpose), leads
    words = philox4x32_many(counters, np.stack([key & low, key >> shift], 1).astype(np.uint32))
    w0, w1 = words[:, 0].astype(np.uint64), words[:, 1].astype(np.uint64)
    mixed = (w0 >> np.uint64(5)) * np.uint64(67108864) + (w1 >> np.uint64(6))
    found: list[float] = (mixed.astype(np.float64) * 2.0**-53).tolist()
    return found


def _split(key: int) -> tuple[int, int]:
    return key & _MASK, key >> 32
