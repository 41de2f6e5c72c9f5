"""The processed law against the plain reference, row by row and in mixed batches."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from decoding_reference import law

from skimp.decoding import PenaltyState, RowState, SamplingParams, process
from skimp.decoding.process import truncate_largest, truncate_sorted

V = 16
EOS = (2,)


def make_row(
    kwargs: dict[str, Any], prompt: list[int], output: list[int], vocab: int = V
) -> RowState:
    row = RowState(SamplingParams(**kwargs), vocab_size=vocab, prompt_ids=prompt, eos_ids=EOS)
    row.commit(output)
    return row


def random_case(seed: int) -> tuple[dict[str, Any], list[int], list[int]]:
    r = random.Random(seed)
    kwargs: dict[str, Any] = {}

    def maybe(name: str, *values: Any) -> None:
        if r.random() < 0.4:
            kwargs[name] = r.choice(values)

    maybe("temperature", 0.0, 0.3, 0.7, 1.5, 20.0)
    maybe("top_k", 1, 2, 5, 15, 16, 40)
    maybe("top_p", 0.05, 0.5, 0.9, 0.999)
    maybe("min_p", 0.02, 0.2, 1.0)
    maybe("presence_penalty", -1.5, 0.5, 2.0)
    maybe("frequency_penalty", -0.5, 0.25, 2.0)
    maybe("repetition_penalty", 0.7, 1.3, 5.0)
    maybe("logit_bias", {1: 3.0, 5: -100.0}, {2: 100.0})
    maybe("bad_words", [[4]], [[4], [1, 7], [1, 2, 3]])
    maybe("min_tokens", 3, 6)
    maybe("stop_token_ids", [9, 10])
    maybe("ignore_eos", True)
    prompt = [r.randrange(V) for _ in range(r.randrange(6))]
    output = r.choice([[], [1], [1, 2], [5, 1], [1, 1, 1, 8], [0, 3, 1, 2, 1, 2]])
    return kwargs, prompt, list(output)


def test_law_equals_the_reference_alone_and_in_a_batch() -> None:
    cases = [random_case(seed) for seed in range(600)]
    logits = torch.randn(len(cases), V, generator=torch.Generator().manual_seed(0)) * 3
    rows = [make_row(*case) for case in cases]
    together = process(logits, rows).probabilities()
    assert together.dtype == torch.float64
    for i, (kwargs, prompt, output) in enumerate(cases):
        want = law(logits[i].tolist(), prompt=prompt, output=output, eos=EOS, **kwargs)
        alone = process(logits[i : i + 1], rows[i : i + 1]).probabilities()[0]
        np.testing.assert_allclose(alone.numpy(), want, atol=2e-6, err_msg=str(cases[i]))
        # zeros must be exact, and a batch must not change a bit
        assert (alone == 0).tolist() == [w == 0 for w in want], cases[i]
        assert torch.equal(alone, together[i]), cases[i]


def test_exact_without_penalties() -> None:
    """Temperature and filters alone are float64: rounding of the sum only."""
    logits = torch.randn(40, V, generator=torch.Generator().manual_seed(1)) * 4
    for i, kwargs in enumerate(
        [{"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.1}]
    ):
        for line in logits[10 * i : 10 * i + 10]:
            got = process(line[None], [make_row(kwargs, [], [])]).probabilities()[0]
            np.testing.assert_allclose(got.numpy(), law(line.tolist(), **kwargs), atol=1e-15)


@pytest.mark.parametrize("scale", [0.01, 0.5, 3.0])
@pytest.mark.parametrize("steps", [None, 4, 0])
def test_filters_on_a_wide_vocabulary(scale: float, steps: int | None) -> None:
    """Nuclei of every size, with many ties (``steps`` per unit) or nothing but ties (0)."""
    vocab = 3000
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(2)) * scale
    if steps is not None:
        logits = (logits * steps).round() / max(steps, 1)
    for kwargs in (
        {"top_k": 50},
        {"top_k": 63},
        {"top_k": 64},
        {"top_k": 1023},
        {"top_k": 2999},
        {"top_k": 5000},
        {"top_p": 0.01},
        {"top_p": 0.9},
        {"top_p": 0.9999},
        {"top_k": 100, "top_p": 0.7},
        {"top_k": 2000, "top_p": 0.95, "temperature": 2.0},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.3},
    ):
        got = process(logits, [make_row(kwargs, [], [], vocab)]).probabilities()[0]
        np.testing.assert_allclose(
            got.numpy(), law(logits[0].tolist(), **kwargs), atol=1e-14, err_msg=str(kwargs)
        )


@pytest.mark.parametrize("steps", [None, 4])
def test_sorting_whole_rows_keeps_the_same(steps: int | None) -> None:
    """What a GPU does, which waits for no number, against what the CPU does."""
    generator = torch.Generator().manual_seed(7)
    for vocab in (3, 50, 5000):
        logits = torch.randn(90, vocab, generator=generator) * 3
        if steps is not None:
            logits = (logits * steps).round() / steps  # many ties
        logits[torch.rand(logits.shape, generator=generator) < 0.1] = float("-inf")
        logits[:, 1] = 0.5
        r = random.Random(vocab)
        params = [
            SamplingParams(
                temperature=r.choice([0.5, 1.0, 4.0]),
                top_k=r.choice([0, 1, 2, 7, vocab, 6000]),
                top_p=r.choice([1.0, 0.999, 0.9, 0.5, 1e-6]),
            )
            for _ in logits
        ]
        rows = [RowState(p, vocab_size=vocab, prompt_ids=[1], eos_ids=EOS) for p in params]
        temperature = torch.tensor([[p.temperature] for p in params], dtype=torch.float64)
        weights = ((logits.double() - logits.amax(1, keepdim=True)) / temperature).exp()
        kept = weights.clone()
        filtered = [i for i, p in enumerate(params) if p.has_filters]
        truncate_sorted(kept, logits, filtered, rows)
        truncate_largest(weights, logits, filtered, rows)
        assert torch.equal(kept, weights)


def test_ties() -> None:
    line = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0, 2.0]])

    def kept(**kwargs: Any) -> list[int]:
        found = process(line, [make_row(kwargs, [], [], 6)]).probabilities()[0]
        return found.nonzero().view(-1).tolist()

    assert kept(temperature=0.0) == [1]  # lowest id
    assert kept(top_k=1) == kept(top_k=2) == [1, 2, 4]  # every tie of the k-th
    assert kept(top_k=4) == [1, 2, 3, 4, 5]
    assert kept(top_p=0.2) == [1]  # in order of id
    assert kept(top_p=0.5) == [1, 2]
    assert kept(min_p=1.0) == [1, 2, 4]


def test_untouched_logits_are_not_copied_and_never_written() -> None:
    logits = torch.randn(2, V)
    before = logits.clone()
    plain = [make_row({"temperature": 0.0}, [], []), make_row({"top_k": 3, "top_p": 0.5}, [], [])]
    assert process(logits, plain).logits is logits
    changed = [make_row({"presence_penalty": 1.0, "bad_words": [[1]]}, [1], [2, 3])] * 2
    assert process(logits, changed).logits is not logits
    assert torch.equal(logits, before)


def test_extreme_temperatures_and_logits_stay_finite() -> None:
    line = torch.tensor([[3e38, -3e38, 0.0, 3e38]])
    for temperature in (1e-300, 1e-5, 100.0):
        got = process(line, [make_row({"temperature": temperature}, [], [], 4)]).probabilities()
        assert got.tolist() == [[0.5, 0.0, 0.0, 0.5]]


def test_bad_rows_do_not_touch_their_neighbours() -> None:
    nan, inf = float("nan"), float("inf")
    kwargs = {"top_k": 3, "top_p": 0.9, "presence_penalty": 0.5}
    logits = torch.randn(7, V, generator=torch.Generator().manual_seed(3))
    good = [i for i in range(7) if i % 2 == 0]
    rows = [make_row(kwargs, [1, 2], [3]) for _ in range(7)]
    rows[5] = make_row({**kwargs, "bad_words": [[t] for t in range(V)]}, [1, 2], [3])
    clean = process(logits[good], [rows[i] for i in good]).probabilities()
    logits[1, 4], logits[3, 0] = nan, inf
    logits[3, 1] = -inf
    found = process(logits, rows)
    assert [e is not None for e in found.errors] == [False, True] * 3 + [False]
    assert "non-finite" in str(found.errors[1]) and "masked" in str(found.errors[5])
    assert torch.equal(found.probabilities()[good], clean)
    assert found.probabilities()[1].isnan().all()


def test_non_finite_logits_are_found_behind_masks_and_in_greedy_rows() -> None:
    for value, wrong in ((float("nan"), True), (float("inf"), True), (float("-inf"), False)):
        for kwargs in ({"temperature": 0.0}, {}, {"bad_words": [[3]]}, {"logit_bias": {3: -100}}):
            line = torch.zeros(1, V)
            line[0, 3] = value
            assert (process(line, [make_row(kwargs, [], [])]).errors[0] is not None) is wrong
    everything = torch.full((1, V), float("-inf"))
    assert process(everything, [make_row({}, [], [])]).errors[0] is not None


def test_a_grammar_mask() -> None:
    row = make_row({"temperature": 0.5}, [], [])
    row.allowed = torch.zeros(V, dtype=torch.bool)
    row.allowed[[3, 5]] = True
    got = process(torch.zeros(1, V), [row]).probabilities()[0]
    assert got[3] == got[5] == 0.5


def test_drafted_views_equal_committed_rows() -> None:
    """Row i of a speculative block must see x_<i in penalties, bad words and min_tokens."""
    kwargs = {
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.4,
        "presence_penalty": 0.2,
        "bad_words": [[6, 7], [5, 6, 8]],
        "min_tokens": 4,
    }
    base = make_row(kwargs, [1, 1, 9], [5])
    draft = [6, 9, 9, 12, 5, 6]
    logits = torch.randn(len(draft) + 1, V, generator=torch.Generator().manual_seed(4))
    views = [base.drafted(draft[:i]) for i in range(len(draft) + 1)]
    got = process(logits, views).probabilities()
    for i in range(len(draft) + 1):
        plain = make_row(kwargs, [1, 1, 9], [5, *draft[:i]])
        assert torch.equal(got[i], process(logits[i : i + 1], [plain]).probabilities()[0])
        assert views[i].position == plain.position == 1 + i
    assert base.position == 1 and base.draft == ()  # the views changed nothing
    assert views[2].drafted(draft[2:3]).draft == tuple(draft[:3])


def test_penalty_state_counts() -> None:
    r = random.Random(0)
    prompt, output = [r.randrange(500) for _ in range(300)], [r.randrange(500) for _ in range(900)]
    state = PenaltyState(prompt)
    for token in output:
        state.extend([token])
    draft = [prompt[0], 501, 501, output[0]]
    for extra in ([], draft):
        ids, counts = state.seen(extra)
        want = {t: [*output, *extra].count(t) for t in {*prompt, *output, *extra}}
        assert dict(zip(ids.tolist(), counts.tolist())) == want
    assert 501 not in state.seen()[0]


def test_shape_mismatches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2, V\]"):
        process(torch.zeros(1, V), [make_row({}, [], [])] * 2)
    with pytest.raises(ValueError, match="V = 16"):
        process(torch.zeros(1, V + 1), [make_row({}, [], [])])
