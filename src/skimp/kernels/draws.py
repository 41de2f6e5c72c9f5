"""Laws of tokens in float64 and draws from them: in PyTorch, and in few passes on a CPU.

Sums may be of another order natively than in PyTorch, so what is to agree has to come from one of
them: on a CPU that is the native form wherever it was built.

Shapes: N rows, V vocabulary. Numbers to draw with are in [0, 1).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from skimp.kernels import native
from skimp.kernels.native.library import library


def is_native(rows: Tensor) -> bool:
    return rows.is_cpu and native.available()


def temper(logits: Tensor, tops: Tensor, scales: Tensor | Sequence[float]) -> Tensor:
    """exp((logits - tops) * scales), float64 [N, V]: 1 for the top, 0 for -inf.

    ``logits`` [N, V] and their maxima ``tops`` [N] are float32, ``scales`` float64 [N].
    """
    if not is_native(logits):
        return plain_temper(logits, tops, scales)
    count, width = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    tops = tops.contiguous()
    factors = array("d", scales.tolist() if isinstance(scales, Tensor) else scales)
    assert len(tops) == len(factors) == len(logits)
    weights = torch.empty(count, width, dtype=torch.float64)
    library().temper(
        logits.data_ptr(),
        logits.stride(0),
        tops.data_ptr(),
        factors,
        count,
        width,
        weights.data_ptr(),
    )
    return weights


def plain_temper(logits: Tensor, tops: Tensor, scales: Tensor | Sequence[float]) -> Tensor:
    # The maximum is taken off first, so no temperature overflows.
    weights = logits.double().sub_(tops.double()[:, None])
    if isinstance(scales, Tensor):
        weights.mul_(scales[:, None])
    elif len(set(scales)) == 1:  # a GPU is spared a copy from the host, which would wait for it
        weights.mul_(scales[0])
    else:
        weights.mul_(torch.tensor(scales, dtype=torch.float64, device=logits.device)[:, None])
    return weights.exp_()


def find_laws(logits: Tensor, scales: Sequence[float]) -> tuple[list[float], list[int], Tensor]:
    """Of each row of float32 [N, V] the largest (NaN if it has one) and of its places the first;
    and, as :func:`temper`, the weights of the S rows with a finite one and a scale above 0."""
    if not is_native(logits):
        return plain_find_laws(logits, scales)
    count, width = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    factors = array("d", scales)
    assert len(factors) == count
    tops, best = array("d", factors), array("q", bytes(8 * count))
    weights = torch.empty(count - scales.count(0.0), width, dtype=torch.float64)
    library().find_laws(
        logits.data_ptr(),
        logits.stride(0),
        factors,
        count,
        width,
        tops,
        best,
        weights.data_ptr(),
    )
    highest = tops.tolist()
    found = _with_law(highest, scales)
    return highest, best.tolist(), weights if len(found) == len(weights) else weights[: len(found)]


def plain_find_laws(
    logits: Tensor, scales: Sequence[float]
) -> tuple[list[float], list[int], Tensor]:
    if logits.device.type == "cpu":
        # numpy's argmax is vectorised and several times quicker than torch's max with indices
        values = logits.numpy()
        places = values.argmax(axis=-1)
        best = torch.from_numpy(places)
        top = torch.from_numpy(values[np.arange(len(places)), places])
    else:
        top, best = logits.max(dim=-1)
    highest = top.tolist()
    found = _with_law(highest, scales)
    if 0 < len(found) < len(logits):
        index = torch.tensor(found, device=logits.device)
        logits, top = logits[index], top[index]
    if found:
        weights = plain_temper(logits, top, [scales[i] for i in found])
    else:
        weights = logits.new_empty(0, logits.shape[1], dtype=torch.float64)
    return highest, best.tolist(), weights


def guess_tokens(
    logits: Tensor,
    words: Tensor | None,
    scales: Sequence[float],
    numbers: Sequence[float],
    laws: Sequence[Tensor | None],
    places: Sequence[int],
) -> tuple[list[float], list[int]]:
    """Natively, the largest of each row of float32 [N, W] and a token: the best where the scale is
    0, else drawn by its number from :func:`temper`'s weights, which are left, as a law that sums to
    1, in row ``places[i]`` of ``laws[i]`` float64 [k, V]. Column i is token ``words[i]`` int64 [W]
    (None: i); others have no chance. The same tokens and laws as in single steps."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    count, width = logits.shape
    assert len(scales) == len(numbers) == len(laws) == count
    rows, law_width = array("q"), width
    for law, place in zip(laws, places, strict=True):
        if law is None:
            rows.append(0)
            continue
        law_width = law.shape[1]
        assert law.is_contiguous() and law.dtype == torch.float64 and place < len(law)
        rows.append(law.data_ptr() + 8 * law_width * place)
    assert law_width == width if words is None else len(words) == width
    tops, tokens = array("d", numbers), array("q", rows)
    library().guess_tokens(
        logits.data_ptr(),
        logits.stride(0),
        0 if words is None else words.data_ptr(),
        array("d", scales),
        array("d", numbers),
        count,
        width,
        law_width,
        rows,
        tops,
        tokens,
    )
    return tops.tolist(), tokens.tolist()


def random_numbers(
    keys: Sequence[int], positions: Sequence[int], leads: Sequence[int], purpose: int
) -> list[float]:
    """Philox4x32-10 as ``decoding/rng.py`` has it, natively."""
    assert len(keys) == len(positions) == len(leads)
    found = array("d", bytes(8 * len(keys)))
    library().random_numbers(
        array("Q", keys), array("q", positions), array("q", leads), purpose, len(keys), found
    )
    return found.tolist()


def _with_law(tops: Sequence[float], scales: Sequence[float]) -> list[int]:
    return [i for i, top in enumerate(tops) if scales[i] > 0.0 and math.isfinite(top)]


def draw(weights: Tensor, numbers: Tensor) -> Tensor:
    """The first token of each row whose cumulative weight exceeds ``number * sum``; int64 [N].

    ``weights`` float64 [N, V] are not normalised; ``numbers`` float64 [N]. A token of weight 0 is
    never returned. Of a row whose sum is 0 or no number, some token.
    """
    if not is_native(weights):
        return plain_draw(weights, numbers)
    return torch.tensor(NativeRows((weights,)).draw(numbers.tolist()))


def plain_draw(weights: Tensor, numbers: Tensor) -> Tensor:
    mass = weights.cumsum(dim=-1)
    target = numbers[:, None] * mass[:, -1:]
    found = torch.searchsorted(mass, target, right=True).squeeze(1)
    return found.clamp_(max=weights.shape[1] - 1)


class Rows(ABC):
    """Weights of N rows, float64 and not normalised, to ask for a few numbers at a time."""

    @abstractmethod
    def select(self, which: Sequence[int]) -> Rows: ...

    @abstractmethod
    def sums(self) -> list[float]: ...

    @abstractmethod
    def normalise(self, laws: Sequence[Tensor]) -> None:
        """Into ``laws``, tensors [n, V] of N rows together: rows that each sum to 1, times the
        reciprocal of the sum."""

    @abstractmethod
    def chosen(self, ids: Sequence[int]) -> list[float]:
        """Of row i the weight of token ``ids[i]``."""

    @abstractmethod
    def draw(self, numbers: Sequence[float]) -> list[int]:
        """As :func:`draw`."""

    @abstractmethod
    def sums_left(self, laws: Rows, scales: Sequence[float]) -> list[float]:
        """The sum of (scale * weight - law)+ of each row."""

    @abstractmethod
    def draw_left(self, laws: Rows, scales: Sequence[float], numbers: Sequence[float]) -> list[int]:
        """:func:`draw` from (scale * weight - law)+, or from the weights where nothing is left."""


def rows_of(parts: Sequence[Tensor]) -> Rows:
    """The rows of tensors float64 [n, V], one after another."""
    return NativeRows(parts) if is_native(parts[0]) else PlainRows(parts)


class PlainRows(Rows):
    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.weights = parts[0] if len(parts) == 1 else torch.cat(list(parts))

    def select(self, which: Sequence[int]) -> PlainRows:
        return PlainRows([self.weights[torch.tensor(which, device=self.weights.device)]])

    def sums(self) -> list[float]:
        return _floats(self.weights.sum(dim=-1))

    def normalise(self, laws: Sequence[Tensor]) -> None:
        factors = self.weights.sum(dim=-1, keepdim=True).reciprocal_()
        first = 0
        for law in laws:
            part = slice(first, first + len(law))
            torch.mul(self.weights[part], factors[part], out=law)
            first += len(law)

    def chosen(self, ids: Sequence[int]) -> list[float]:
        index = torch.tensor(ids, device=self.weights.device)
        return _floats(self.weights.gather(1, index[:, None])[:, 0])

    def draw(self, numbers: Sequence[float]) -> list[int]:
        return _draw(self.weights, numbers)

    def sums_left(self, laws: Rows, scales: Sequence[float]) -> list[float]:
        return _floats(self._left(laws, scales).sum(dim=-1))

    def draw_left(self, laws: Rows, scales: Sequence[float], numbers: Sequence[float]) -> list[int]:
        left = self._left(laws, scales)
        empty = left.sum(dim=-1) <= 0.0
        return _draw(torch.where(empty[:, None], self.weights, left), numbers)

    def _left(self, laws: Rows, scales: Sequence[float]) -> Tensor:
        assert isinstance(laws, PlainRows)
        column = torch.tensor(scales, dtype=torch.float64, device=self.weights.device)[:, None]
        return (self.weights * column).sub_(laws.weights).clamp_(min=0.0)


class NativeRows(Rows):
    """By where each row lies in memory; nothing is copied."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = parts  # kept alive
        self._width = parts[0].shape[1]
        self._places = array("q")
        for part in parts:
            assert part.dtype == torch.float64 and part.shape[1] == self._width
            assert part.stride(1) == 1 and part.device.type == "cpu"
            first, step = part.data_ptr(), 8 * part.stride(0)
            self._places.extend([first + step * i for i in range(len(part))])

    def select(self, which: Sequence[int]) -> NativeRows:
        rows = object.__new__(NativeRows)
        rows._parts, rows._width = self._parts, self._width
        rows._places = array("q", [self._places[i] for i in which])
        return rows

    def sums(self) -> list[float]:
        places, found = self._places, array("d", self._places)
        library().sum_weights(places, len(places), self._width, found)
        return found.tolist()

    def normalise(self, laws: Sequence[Tensor]) -> None:
        places = self._places
        library().normalise(places, len(places), self._width, self._like(NativeRows(laws)))

    def chosen(self, ids: Sequence[int]) -> list[float]:
        places, found = self._places, array("d", self._places)
        assert len(ids) == len(places) and min(ids) >= 0 and max(ids) < self._width
        library().pick_weights(places, array("q", ids), len(places), found)
        return found.tolist()

    def draw(self, numbers: Sequence[float]) -> list[int]:
        places, found = self._places, array("q", self._places)
        library().draw_tokens(places, self._given(numbers), len(places), self._width, found)
        return found.tolist()

    def sums_left(self, laws: Rows, scales: Sequence[float]) -> list[float]:
        places, found = self._places, array("d", self._places)
        library().sum_left(
            places, self._like(laws), self._given(scales), len(places), self._width, found
        )
        return found.tolist()

    def draw_left(self, laws: Rows, scales: Sequence[float], numbers: Sequence[float]) -> list[int]:
        places, found = self._places, array("q", self._places)
        library().draw_left(
            places,
            self._like(laws),
            self._given(scales),
            self._given(numbers),
            len(places),
            self._width,
            found,
        )
        return found.tolist()

    def _given(self, values: Sequence[float]) -> array[float]:
        assert len(values) == len(self._places)
        return array("d", values)

    def _like(self, laws: Rows) -> array[int]:
        assert isinstance(laws, NativeRows) and laws._width == self._width
        assert len(laws._places) == len(self._places)
        return laws._places


def _draw(weights: Tensor, numbers: Sequence[float]) -> list[int]:
    on_device = torch.tensor(numbers, dtype=torch.float64, device=weights.device)
    tokens: list[int] = plain_draw(weights, on_device).tolist()
    return tokens


def _floats(values: Tensor) -> list[float]:
    found: list[float] = values.tolist()
    return found
