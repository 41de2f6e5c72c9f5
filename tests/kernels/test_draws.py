"""Laws and draws: both forms against float64 numpy, on every instruction set."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from native_support import ISAS, needs_native
from torch import Tensor

from skimp.kernels import native
from skimp.kernels.draws import (
    NativeRows,
    PlainRows,
    Rows,
    draw,
    find_laws,
    guess_tokens,
    plain_draw,
    plain_find_laws,
    plain_temper,
    rows_of,
    temper,
)
from skimp.kernels.native.library import library

INF = math.inf
WIDTHS = [1, 2, 7, 8, 63, 64, 65, 127, 1000, 8192]
NEXT_TO_ONE = 1.0 - 2.0**-53
FORMS = [PlainRows, pytest.param(NativeRows, marks=needs_native)]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.instruction_set(request.param):
        yield request.param


def logits_of(width: int, seed: int = 0) -> Tensor:
    """Rows of several kinds; in the last columns of a wider buffer."""
    rng = np.random.default_rng([seed, width])
    rows = rng.normal(size=(6, width)) * 4
    rows[1] = rng.integers(0, 3, width)
    rows[2, rng.permutation(width)[: width // 2]] = -INF
    rows[3] = -INF
    rows[3, rng.integers(width)] = 2.5
    rows[4] *= 1e5
    rows[5] = 0.0
    whole = torch.zeros(6, width + 5)
    whole[:, 5:] = torch.from_numpy(rows)
    return whole[:, 5:]


def exact(logits: Tensor, scales: list[float]) -> np.ndarray:
    values = logits.double().numpy()
    values = values - values.max(axis=1, keepdims=True)
    return np.exp(values * np.array(scales)[:, None])


def first_beyond(weights: np.ndarray, number: float) -> int:
    """In whole numbers, which weights of few bits are exactly."""
    units = [int(weight * 2**40) for weight in weights]
    assert all(unit == weight * 2**40 for unit, weight in zip(units, weights))
    target, mass = int(number * 2**60) * sum(units), 0
    for token, unit in enumerate(units):
        mass += unit
        if mass * 2**60 > target:
            return token
    raise AssertionError("a number below 1")


@needs_native
@pytest.mark.parametrize("width", WIDTHS)
def test_weights_are_exponentials(isa: str, width: int) -> None:
    logits = logits_of(width)
    tops = logits.amax(dim=1)
    for scales in ([1.0] * 6, [0.3, 1.0, 1.7, 5.0, 1e300, 1e-9]):
        weights = temper(logits, tops, scales)
        want = exact(logits, scales)
        normal = want > 1e-300
        assert np.abs(weights.numpy()[normal] / want[normal] - 1.0).max() < 4.5e-16
        assert np.abs(weights.numpy() - want).max() < 4.5e-16
        assert (weights.numpy()[want == 0.0] == 0.0).all()
        assert weights.amax(dim=1).tolist() == [1.0] * 6
        assert torch.equal(weights == 1.0, plain_temper(logits, tops, scales) == 1.0)
        other = torch.tensor(scales, dtype=torch.float64)
        assert torch.equal(weights, temper(logits, tops, other))


@needs_native
def test_weights_reach_down_to_where_they_are_nothing(isa: str) -> None:
    logits = torch.cat([torch.zeros(1), -torch.logspace(-8, 4, 5000), -torch.arange(700.0, 760.0)])
    logits = torch.cat([logits, torch.tensor([-1418.0, -1419.0, -3e38, -INF])])[None]
    weights = temper(logits, torch.zeros(1), [1.0])[0].numpy()
    want = np.exp(logits[0].double().numpy())
    assert np.abs(weights - want).max() < 2.3e-16
    below = want < 1e-290
    assert np.abs(weights[below] - want[below]).max() < 1e-305
    assert (weights[want == 0.0] == 0.0).all() and ((weights > 0.0) == (want > 0.0)).all()


@needs_native
def test_bits_are_the_same_on_every_cpu() -> None:
    logits, scales = logits_of(1000), [0.3, 1.0, 1.7, 5.0, 2.0, 1.0]
    found = []
    for level in ("scalar", library().best_isa()):
        with native.instruction_set(level):
            tops, best, weights = find_laws(logits, scales)
            found.append((tops, best, weights.tolist(), NativeRows([weights]).sums()))
    assert found[0] == found[1]


@needs_native
@pytest.mark.parametrize("width", WIDTHS)
def test_laws_of_rows(isa: str, width: int) -> None:
    logits = torch.cat([logits_of(width), logits_of(width, 1)])
    logits[3] = -INF
    logits[4, width // 2] = float("nan")
    logits[7, width - 1] = INF
    logits[8] = torch.where(logits[8] == 0.0, -0.0, logits[8])
    scales = [1.0, 0.5, 0.0] * 4
    tops, best, weights = find_laws(logits, scales)
    plain_tops, plain_best, plain_weights = plain_find_laws(logits, scales)
    assert np.array_equal(tops, plain_tops, equal_nan=True)
    finite = [i for i, top in enumerate(tops) if top == top]
    assert [best[i] for i in finite] == [plain_best[i] for i in finite]
    assert torch.equal(weights, temper(logits, logits.amax(1), scales)[_sampled(tops, scales)])
    assert torch.allclose(weights, plain_weights, rtol=1e-15, atol=0.0)


def _sampled(tops: list[float], scales: list[float]) -> list[int]:
    return [i for i, top in enumerate(tops) if scales[i] > 0.0 and math.isfinite(top)]


def test_the_lowest_of_equals_is_the_best() -> None:
    logits = torch.zeros(3, 200)
    logits[0, [70, 130]] = 1.0
    logits[1] = -5.0
    logits[2, 0], logits[2, 1] = -0.0, 0.0
    for form in (find_laws, plain_find_laws):
        assert form(logits, [0.0] * 3)[:2] == ([1.0, -5.0, 0.0], [70, 0, 0])


@needs_native
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("pruned", [False, True], ids=["all words", "some words"])
def test_a_guess_in_one_call_is_the_one_in_steps(isa: str, width: int, pruned: bool) -> None:
    rng = np.random.default_rng(width)
    logits = torch.cat([logits_of(width), logits_of(width, 1)])
    logits[3] = -INF
    logits[4, width // 2] = float("nan")
    size = 3 * width if pruned else width
    words = torch.from_numpy(rng.permutation(size)[:width]) if pruned else None
    whole = torch.full((12, size), -INF)
    whole[:, slice(None) if words is None else words] = logits
    for scales in ([1.0, 0.5, 0.0] * 4, [0.0] * 12):
        numbers = rng.random(12).tolist()
        numbers[0], numbers[1] = 0.0, NEXT_TO_ONE
        laws = [torch.empty(3, size, dtype=torch.float64) if scale else None for scale in scales]
        places = [i % 3 for i in range(12)]
        tops, tokens = guess_tokens(logits, words, scales, numbers, laws, places)
        want_tops, want, weights = find_laws(whole, scales)
        assert np.array_equal(tops, want_tops, equal_nan=True)
        sampled = _sampled(tops, scales)
        if sampled:
            rows = rows_of([weights])
            for i, token in zip(sampled, rows.draw([numbers[i] for i in sampled])):
                want[i] = token
            normal = torch.empty_like(weights)
            rows.normalise([normal])
            for i, row in zip(sampled, normal):
                law = laws[i]
                assert law is not None and torch.equal(law[places[i]], row)
        right = [i for i, top in enumerate(tops) if math.isfinite(top)]
        assert [tokens[i] for i in right] == [want[i] for i in right]
        assert all(0 <= token < size for token in tokens)


# ---- draws --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", WIDTHS)
def test_draws_are_the_first_beyond(form: type[Rows], width: int) -> None:
    """Of weights whose sums are exact, so that there is one answer."""
    rng = np.random.default_rng(width)
    for _ in range(20):
        weights = np.floor(rng.random((4, width)) * 64) / 64
        weights[1, rng.permutation(width)[: width - 1]] = 0.0
        weights[2, rng.random(width) < 0.9] = 0.0
        weights[:, rng.integers(width)] = 1.0
        numbers = [0.0, NEXT_TO_ONE, float(rng.integers(2**20)) / 2**20, 0.5]
        rows = form([torch.from_numpy(weights)])
        assert rows.sums() == weights.sum(axis=1).tolist()
        for number in numbers:
            want = [first_beyond(row, number) for row in weights]
            assert rows.draw([number] * 4) == want


@pytest.mark.parametrize("form", FORMS)
def test_no_draw_has_weight_0(form: type[Rows]) -> None:
    """Where sums are rounded, at both ends and at the edges of every token."""
    rng = np.random.default_rng(3)
    for width in (5, 64, 200, 1000):
        weights = rng.random((1, width)) ** 8
        weights[0, rng.random(width) < 0.5] = 0.0
        weights[0, [0, width - 1]] = 0.0
        weights[0, width // 2] = 1.0
        edges = np.cumsum(weights[0]) / weights.sum()
        numbers = [0.0, NEXT_TO_ONE, *edges, *np.nextafter(edges, 0.0), *np.nextafter(edges, 1.0)]
        numbers = [float(number) for number in numbers if 0.0 <= number < 1.0]
        many = form([torch.from_numpy(weights)]).select([0] * len(numbers))
        found = np.array(many.draw(numbers))
        assert (weights[0, found] > 0.0).all()
        before, after = edges[found] - weights[0, found] / weights.sum(), edges[found]
        assert (np.array(numbers) > before - 1e-12).all() and (
            np.array(numbers) < after + 1e-12
        ).all()


@needs_native
def test_forms_draw_alike(isa: str) -> None:
    rng = np.random.default_rng(5)
    weights = plain_temper(*_case(rng, 300, 1000))
    numbers = rng.random(300).tolist()
    on_device = torch.tensor(numbers, dtype=torch.float64)
    found = NativeRows([weights[:100], weights[100:]]).draw(numbers)
    assert found == draw(weights, on_device).tolist() == PlainRows([weights]).draw(numbers)
    assert found == plain_draw(weights, on_device).tolist()


def _case(rng: np.random.Generator, rows: int, width: int) -> tuple[Tensor, Tensor, list[float]]:
    logits = torch.from_numpy(np.float32(rng.normal(size=(rows, width)) * 3))
    return logits, logits.amax(dim=1), [1.0] * rows


@pytest.mark.parametrize("form", FORMS)
def test_what_is_no_law_gives_some_token(form: type[Rows]) -> None:
    for fill in (0.0, float("nan")):
        rows = form([torch.full((2, 70), fill, dtype=torch.float64)])
        assert all(0 <= token < 70 for token in rows.draw([0.0, 0.7]))


# ---- what a draft leaves ------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", WIDTHS)
def test_what_is_left(form: type[Rows], width: int) -> None:
    rng = np.random.default_rng(width)
    p, q = (np.floor(rng.random((5, width)) * 64) / 64 for _ in range(2))
    scales = [1.0, 0.5, 0.25, 0.0, 4.0]
    p[0], q[1] = q[0], 4.0  # nothing is left
    p[:, width // 2] = 1.0
    left = np.maximum(np.array(scales)[:, None] * p - q, 0.0)
    targets, laws = form([torch.from_numpy(p)]), form([torch.from_numpy(q)])
    assert targets.sums_left(laws, scales) == left.sum(axis=1).tolist()
    rows = [rest if rest.sum() > 0.0 else whole for rest, whole in zip(left, p)]
    for number in (0.0, 0.25, 0.75, NEXT_TO_ONE):
        want = [first_beyond(row, number) for row in rows]
        assert targets.draw_left(laws, scales, [number] * 5) == want


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_many_tensors(form: type[Rows]) -> None:
    whole = torch.from_numpy(np.random.default_rng(0).random((9, 77)))
    rows = form([whole[:2], whole[2:2], whole[2:7], whole[7:]])
    ids = list(range(0, 72, 8))
    assert rows.chosen(ids) == [whole[i, token].item() for i, token in enumerate(ids)]
    some = [8, 0, 3, 3]
    assert rows.select(some).chosen([5] * 4) == whole[some, 5].tolist()
    assert np.allclose(rows.select(some).sums(), whole[some].sum(1), rtol=1e-15, atol=0.0)
    laws = torch.zeros(6, 77, dtype=torch.float64)
    rows.select(some).normalise([laws[4:5], laws[:2], laws[2:3]])
    want = whole[some] / whole[some].sum(1, keepdim=True)
    assert torch.allclose(laws[[4, 0, 1, 2]], want, rtol=1e-15, atol=0.0)
    assert not laws[[3, 5]].any()
    factors = [1.0 / total for total in rows.select(some).sums()]
    assert laws[[4, 0, 1, 2], 5].tolist() == [
        weight * factor for weight, factor in zip(whole[some, 5].tolist(), factors)
    ]
