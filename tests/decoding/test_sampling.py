"""The drawn tokens against their exact law, seeds, errors and log-probabilities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from decoding_reference import law

from skimp.decoding import RowState, Sampler, SamplingParams, draw, prompt_logprobs, uniform
from skimp.decoding.rng import Purpose

V = 12
DRAWS = 6000


def chi_square_passes(counts: np.ndarray, p: np.ndarray) -> bool:
    """Exact zeros stay zero; otherwise df + 10 sqrt(2 df), about ten sigma, on fixed seeds."""
    if counts[p == 0].any():
        return False
    p, counts = p[p > 0], counts[p > 0]
    expected = p * counts.sum()
    small = expected < 5
    if small.any():
        expected = np.append(expected[~small], expected[small].sum())
        counts = np.append(counts[~small], counts[small].sum())
    df = max(len(expected) - 1, 1)
    statistic = ((counts - expected) ** 2 / np.maximum(expected, 1e-12)).sum()
    return bool(statistic < df + 10 * math.sqrt(2 * df))


CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 4},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"top_k": 6, "top_p": 0.9, "min_p": 0.05, "temperature": 1.4},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"repetition_penalty": 1.5, "top_p": 0.95},
    {"logit_bias": {0: 2.0, 3: -100.0}},
    {"bad_words": [[5], [7, 1]], "min_tokens": 4},
    {"temperature": 0.0},
]


@pytest.mark.parametrize("kwargs", CASES, ids=[str(c) for c in CASES])
@pytest.mark.parametrize("axis", ["seed", "position"])
def test_draws_follow_the_law(kwargs: dict[str, Any], axis: str) -> None:
    """Over seeds at one position, and over positions of one seed (same law by construction)."""
    logits = torch.randn(V, generator=torch.Generator().manual_seed(5)) * 2
    prompt, output = [1, 2, 2], [3, 4, 7]
    want = np.array(law(logits.tolist(), prompt=prompt, output=output, eos=[9], **kwargs))
    rows = []
    for i in range(DRAWS):
        row = RowState(
            SamplingParams(seed=i if axis == "seed" else 99, **kwargs),
            vocab_size=V, prompt_ids=prompt, eos_ids=[9],
        )  # fmt: skip
        row.commit(output)
        if axis == "position":
            # only the stream may move, so the counts are left where they are
            row.outputs = [0] * i + output if "min_tokens" not in kwargs else output
            row.key += 0 if "min_tokens" not in kwargs else i
        rows.append(row)
    batch = Sampler().sample(logits.expand(DRAWS, V), rows)
    counts = np.bincount(batch.token_ids, minlength=V)
    assert chi_square_passes(counts, want)


def test_the_chi_square_has_power() -> None:
    p = np.full(8, 1 / 8)
    rng = np.random.default_rng(0)
    assert chi_square_passes(rng.multinomial(DRAWS, p), p)
    off = p + 0.03 * np.array([1, -1] * 4)  # total variation 0.12
    assert not chi_square_passes(rng.multinomial(DRAWS, off), p)


def test_inverse_cdf_at_the_edges() -> None:
    weights = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64)
    for u, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (1 - 2**-53, 4)):
        assert draw(weights, torch.tensor([u], dtype=torch.float64)).item() == token


def test_a_draw_depends_on_seed_and_position_only() -> None:
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(6))

    def row(seed: int | None, **kwargs: Any) -> RowState:
        return RowState(SamplingParams(seed=seed, **kwargs), vocab_size=500)

    others = torch.randn(30, 500)
    sampler = Sampler()
    target, alone = row(7, top_p=0.97), []
    for step in range(40):
        alone.append(sampler.sample(logits + step % 5, [target]).token_ids[0])
        target.commit(alone[-1:])
    target, crowd = row(7, top_p=0.97), []
    for step in range(40):
        rows = [row(None, top_k=5), row(3), target, row(7, temperature=0.0), row(1, min_p=0.2)]
        rows += [row(i, presence_penalty=1.0) for i in range(step % 20)]
        lines = torch.cat([others[:2], logits + step % 5, others[2 : len(rows) - 1]])
        crowd.append(sampler.sample(lines, rows).token_ids[2])
        target.commit(crowd[-1:])
    assert alone == crowd
    assert len(set(alone)) > 10


def test_unseeded_requests_differ_and_n_samples_differ() -> None:
    logits = torch.zeros(2, 1000)
    two = [RowState(SamplingParams(), vocab_size=1000) for _ in range(2)]
    outcomes = []
    for _ in range(8):
        tokens = Sampler().sample(logits, two).token_ids
        outcomes.append(tokens)
        for row, token in zip(two, tokens):
            row.commit([token])
    assert [a for a, _ in outcomes] != [b for _, b in outcomes]
    params = SamplingParams(seed=3, n=64)
    rows = [RowState(params, vocab_size=1000, sample_index=i) for i in range(64)]
    tokens = Sampler().sample(torch.zeros(64, 1000), rows).token_ids
    assert len(set(tokens)) > 50
    again = [RowState(params, vocab_size=1000, sample_index=i) for i in range(64)]
    assert Sampler().sample(torch.zeros(64, 1000), again).token_ids == tokens


def test_the_draw_uses_the_documented_stream() -> None:
    row = RowState(SamplingParams(seed=11), vocab_size=1000)
    row.commit([1, 2, 3])
    u = uniform(11, 3, Purpose.SAMPLE)
    assert Sampler().sample(torch.zeros(1, 1000), [row]).token_ids == [int(u * 1000)]


def test_bad_words_never_appear() -> None:
    row = RowState(SamplingParams(seed=0, bad_words=[[1], [2, 3], [4, 4, 4]]), vocab_size=6)
    for _ in range(3000):
        row.commit(Sampler().sample(torch.zeros(1, 6), [row]).token_ids)
    text = "".join(map(str, row.outputs))
    assert "1" not in text and "23" not in text and "444" not in text
    assert "2" in text and "3" in text and "44" in text


def test_errors_leave_the_neighbours_alone() -> None:
    logits = torch.randn(32, 100, generator=torch.Generator().manual_seed(8))
    rows = [RowState(SamplingParams(seed=i, logprobs=2), vocab_size=100) for i in range(32)]
    clean = Sampler().sample(logits, rows)
    for value in (float("nan"), float("inf")):
        logits[13, 50] = value
        found = Sampler().sample(logits, rows)
        assert found.token_ids[13] == -1 and found.logprobs[13] is None
        assert found.errors[13] is not None and "non-finite" in found.errors[13]
        for i in range(32):
            if i != 13:
                assert found.token_ids[i] == clean.token_ids[i]
                assert found.logprobs[i] == clean.logprobs[i]
                assert found.errors[i] is None


def test_logprobs_raw_and_processed() -> None:
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(9)) * 2
    kwargs = {"temperature": 0.5, "top_k": 5, "seed": 1, "logprobs": 4}
    rows = [RowState(SamplingParams(**kwargs), vocab_size=V) for _ in range(2)]
    rows.append(RowState(SamplingParams(temperature=0.0), vocab_size=V))
    for mode in ("raw", "processed"):
        batch = Sampler(logprobs_mode=mode).sample(logits, rows)  # type: ignore[arg-type]
        assert batch.logprobs[2] is None
        for i in range(2):
            settings = {} if mode == "raw" else kwargs
            p = np.array(law(logits[i].tolist(), **settings))
            entry = batch.logprobs[i]
            assert entry is not None
            assert entry.token_id == batch.token_ids[i]
            assert math.isclose(entry.logprob, math.log(p[entry.token_id]), abs_tol=1e-12)
            assert entry.rank == 1 + int((p > p[entry.token_id]).sum())
            best = sorted(range(V), key=lambda t: (-p[t], t))[:4]
            assert [t for t, _ in entry.top] == best
            np.testing.assert_allclose(
                [value for _, value in entry.top], np.log(p[best]), atol=1e-12
            )


def test_logprobs_ties_count_and_zero() -> None:
    row = RowState(SamplingParams(temperature=0.0, logprobs=3), vocab_size=5)
    entry = Sampler().sample(torch.zeros(1, 5), [row]).logprobs[0]
    assert entry is not None
    assert [t for t, _ in entry.top] == [0, 1, 2] and entry.rank == 1
    row = RowState(SamplingParams(temperature=0.0, logprobs=0), vocab_size=5)
    entry = Sampler().sample(torch.zeros(1, 5), [row]).logprobs[0]
    assert entry is not None
    assert entry.top == () and math.isclose(entry.logprob, -math.log(5))
    row = RowState(SamplingParams(temperature=0.0, logprobs=20), vocab_size=5)
    entry = Sampler().sample(torch.zeros(1, 5), [row]).logprobs[0]
    assert entry is not None and len(entry.top) == 5


def test_prompt_logprobs() -> None:
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(10))
    targets = [3, 0, 11, 5]
    found = prompt_logprobs(logits, targets, 2)
    want = torch.log_softmax(logits.double(), -1)
    for t, (entry, target) in enumerate(zip(found, targets)):
        assert entry.token_id == target
        assert math.isclose(entry.logprob, want[t, target].item(), abs_tol=1e-12)
        assert [i for i, _ in entry.top] == want[t].topk(2).indices.tolist()
    with pytest.raises(ValueError, match="4 rows of logits for 3"):
        prompt_logprobs(logits, targets[:3], 2)
    logits[2, 2] = float("nan")
    with pytest.raises(ValueError, match="position 2"):
        prompt_logprobs(logits, targets, 2)


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match="logprobs_mode"):
        Sampler(logprobs_mode="both")  # type: ignore[arg-type]
