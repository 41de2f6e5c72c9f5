"""Divergence, paired differences, and the readers of logits behind them, against plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from meter_models import Bytes, noisy_decoder, plain_logits, tiny_engine

from skimp.engine import Engine, EngineOptions
from skimp.errors import RequestError
from skimp.meter.divergence import (
    PairedDifference,
    _aligned,
    compare_all,
    compare_quality,
    divergence,
)
from skimp.meter.quality import Block, bootstrap, evaluate, windows

WORDS = "the king hurried off down the road to open parliament and nobody was at home. "
TEXT = "\n<|endoftext|>\n".join([WORDS * 9, "short", WORDS[::-1] * 4])


def by_hand(noise: float, context: int) -> np.ndarray:
    """Bits of base and of other, KL and agreement of every token of TEXT: [4, T]."""
    base, other = noisy_decoder(), noisy_decoder(noise)
    rows: list[np.ndarray] = []
    for text in TEXT.split("\n<|endoftext|>\n"):
        sequence = [0, *Bytes().encode(text)]
        for start, done, end in windows(len(sequence), context):
            window = sequence[start:end]
            p = plain_logits(base, window).log_softmax(-1)[done - 1 - start : -1]
            q = plain_logits(other, window).log_softmax(-1)[done - 1 - start : -1]
            ids = torch.tensor(sequence[done:end])
            kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
            own = [-m[torch.arange(len(ids)), ids] / math.log(2) for m in (p, q)]
            rows.append(torch.stack([*own, kl, (p.argmax(-1) == q.argmax(-1)).double()]).numpy())
    return np.concatenate(rows, axis=1)


@pytest.mark.parametrize("context", [64, 255])
@pytest.mark.parametrize("backend", ["native", "plain"])
def test_kl_equals_an_independent_computation(context: int, backend: str) -> None:
    base, other = tiny_engine(backend=backend), tiny_engine(0.1, backend=backend)
    found = compare_quality(base, other, TEXT, context=context)
    want = by_hand(0.1, context)
    size = sum(len(part) for part in TEXT.split("\n<|endoftext|>\n"))
    assert found.divergence.tokens == want.shape[1] == size
    assert found.divergence.kl == pytest.approx(want[2].mean(), rel=1e-3)
    assert found.divergence.kl > 1e-3
    assert found.divergence.top1 == pytest.approx(want[3].mean(), abs=2 / size)
    assert found.base.bits_per_byte == pytest.approx(want[0].mean(), rel=1e-5)
    assert found.other.bits_per_byte == pytest.approx(want[1].mean(), rel=1e-5)
    assert found.paired.bits_per_byte == pytest.approx((want[1] - want[0]).mean(), abs=1e-4)
    low, high = found.divergence.ci95
    assert low < found.divergence.kl < high


def test_both_halves_are_what_eval_says_alone() -> None:
    base, other = tiny_engine(), tiny_engine(0.1)
    found = compare_quality(base, other, TEXT, context=100, max_bytes=700)
    for engine, one in ((base, found.base), (other, found.other)):
        alone = evaluate(engine, TEXT, context=100, max_bytes=700).as_dict()
        for name, value in one.as_dict().items():
            assert value == pytest.approx(alone[name], rel=1e-5), name


@pytest.mark.parametrize("same", [True, False])
def test_a_model_does_not_diverge_from_itself(same: bool) -> None:
    base = tiny_engine(deterministic=True)
    other = base if same else tiny_engine(deterministic=True)
    found = compare_quality(base, other, TEXT, context=100)
    assert found.divergence.kl == 0.0
    assert found.divergence.ci95 == (0.0, 0.0)
    assert found.divergence.top1 == 1.0
    assert found.paired == PairedDifference(bits_per_byte=0.0, ci95=(0.0, 0.0))
    assert found.paired.inside_noise


def test_more_noise_diverges_more_and_engines_may_cut_steps_differently() -> None:
    base = tiny_engine()
    few, many = (divergence(base, tiny_engine(n, token_budget=37), TEXT) for n in (0.03, 0.2))
    assert few.kl < many.kl / 4
    assert few.top1 > many.top1
    assert few.ci95[1] < many.ci95[0]


def test_the_paired_interval_is_tighter_and_covers() -> None:
    """Passages of very different difficulty, a loss of 0.02 that varies little."""
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(40):
        hard = rng.normal(150, 40, 80)
        loss = rng.normal(2, 3, 80)
        low, high = bootstrap([Block(amount=float(a), size=100.0) for a in loss], seed=seed)
        separate = bootstrap([Block(amount=float(a), size=100.0) for a in hard + loss], seed=seed)
        inside += low <= 0.02 <= high
        assert high - low < 0.2 * (separate[1] - separate[0])
    assert 34 <= inside <= 40


def test_inside_the_noise() -> None:
    assert PairedDifference(bits_per_byte=0.001, ci95=(-0.001, 0.003)).inside_noise
    assert not PairedDifference(bits_per_byte=0.002, ci95=(0.001, 0.003)).inside_noise
    assert not PairedDifference(bits_per_byte=-0.002, ci95=(-0.003, -0.001)).inside_noise


def test_what_a_small_change_costs_is_seen_through_the_pairing() -> None:
    found = compare_quality(tiny_engine(), tiny_engine(0.02), TEXT)
    paired = found.paired.ci95[1] - found.paired.ci95[0]
    alone = found.other.ci95[1] - found.other.ci95[0]
    assert paired < alone / 3


def test_models_that_cannot_be_compared_are_refused() -> None:
    base = tiny_engine()

    class Letters(Bytes):
        def encode(self, text: str, **options: bool) -> list[int]:
            return [b + 2 for b in text.encode()]

    other = Engine(noisy_decoder(), Letters(), EngineOptions(max_batch=2, max_context=128))
    with pytest.raises(ValueError, match="tokenizer"):
        divergence(base, other, TEXT)
    other.tokenizer = base.tokenizer
    other.spec = other.spec.__class__(**{**vars(other.spec), "vocab_size": 7})
    with pytest.raises(ValueError, match=r"vocab_size: 320 .* 7"):
        divergence(base, other, TEXT)
    other.spec = base.spec.__class__(**{**vars(base.spec), "bos_token_id": 9})
    with pytest.raises(ValueError, match="bos_token_id"):
        divergence(base, other, TEXT)


def test_the_shorter_context_is_the_default() -> None:
    assert divergence(tiny_engine(), tiny_engine(max_context=128), WORDS).context == 127


def test_rows_cut_in_different_places_are_paired() -> None:
    rows = torch.arange(10.0)[:, None]

    def cut(*edges: int) -> Iterator[torch.Tensor]:
        yield from (rows[a:b] for a, b in zip((0, *edges), (*edges, 10)))

    found = list(_aligned([cut(3, 4, 9), cut(4, 5), cut(1, 8)]))
    assert all(torch.equal(p, q) and torch.equal(p, r) for p, q, r in found)
    assert torch.equal(torch.cat([p for p, _, _ in found]), rows)


def test_several_models_are_compared_in_one_pass_of_the_base(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, others = tiny_engine(), [tiny_engine(0.02), tiny_engine(0.1)]
    alone = [compare_quality(base, other, TEXT, context=64) for other in others]
    windows: list[int] = []
    logits = base.logits
    monkeypatch.setattr(base, "logits", lambda ids: windows.append(len(ids)) or logits(ids))
    assert compare_all(base, others, TEXT, context=64) == alone
    together = len(windows)
    compare_quality(base, others[0], TEXT, context=64)
    assert len(windows) == 2 * together


# ---- Engine.logits and Engine.score_batch


@pytest.mark.parametrize("backend", ["native", "plain"])
@pytest.mark.parametrize("length", [1, 2, 17, 200])
def test_logits_of_every_row(length: int, backend: str) -> None:
    engine = tiny_engine(backend=backend)
    tokens = [(7 * i) % 300 + 1 for i in range(length)]
    chunks = list(engine.logits(tokens))
    assert all(chunk.shape[0] <= engine.options.token_budget for chunk in chunks)
    assert sum(chunk.shape[0] for chunk in chunks) == length - 1
    if length > 1:
        want = plain_logits(noisy_decoder(), tokens)[:-1].float()
        torch.testing.assert_close(torch.cat(chunks), want, atol=2e-4, rtol=1e-4)
    assert not engine.has_unfinished()


def test_logits_left_early_and_beside_another_request() -> None:
    engine = tiny_engine()
    other = engine.add_request([1, 2, 3])
    next(engine.logits(list(range(1, 200))))
    assert not any(name != other for name in engine._requests)
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    assert {out.request_id for out in outputs} == {other}
    engine.cache.audit()


def test_scores_in_a_batch_reuse_what_lies_before_them() -> None:
    engine = tiny_engine()
    stem = [(5 * i) % 250 + 1 for i in range(120)]
    prompts = [[*stem, 9, 8, 7], [*stem, 3], [*stem[:50], 4, 4], [6]]
    starts = [119, 119, 20, 0]
    first = engine.score_batch(prompts, starts)
    reused = engine.cache.stats().prefix.tokens_reused
    again = engine.score_batch(prompts, starts)
    assert engine.cache.stats().prefix.tokens_reused >= reused + 2 * 112 + 16
    for scores in (first, again):
        for prompt, start, score in zip(prompts, starts, scores):
            rows = plain_logits(noisy_decoder(), prompt).log_softmax(-1)
            want = [float(rows[i, prompt[i + 1]]) for i in range(start, len(prompt) - 1)]
            np.testing.assert_allclose(score.logprobs, want, atol=2e-4)
            best = rows.argmax(-1)[start:-1].tolist()
            assert score.greedy.tolist() == [b == t for b, t in zip(best, prompt[start + 1 :])]


def test_scores_refuse_what_does_not_fit() -> None:
    engine = tiny_engine()
    with pytest.raises(RequestError, match=r"starts\[1\]"):
        engine.score_batch([[1, 2], [1, 2]], [0, 2])
    with pytest.raises(RequestError, match="context"):
        engine.score_batch([[1] * 256], [0])
    with pytest.raises(RequestError, match="context"):
        list(engine.logits([1] * 256))
    assert not engine.has_unfinished()
