"""Speculation leaves the law as it is: enumerated exactly, counted in draws, and with thirteen
known mistakes that the enumeration must find."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
import torch
from joint_laws import Floats, Law, Prefix, chi_square, plain_law
from speculation_reference import (
    FAULTS,
    GAMMA,
    KINDS,
    Outcome,
    Toy,
    V,
    by_hand,
    drafts,
    joint,
    normal,
    siblings,
    total_variation,
)

from skimp.decoding.accept import (
    RULES,
    Block,
    Chain,
    DrawAndCompare,
    RatioTest,
    Rule,
    RuleName,
)
from skimp.decoding.params import SamplingParams
from skimp.decoding.process import process
from skimp.decoding.proposal import Draft
from skimp.decoding.rng import Purpose, uniforms
from skimp.decoding.rows import RowState
from skimp.decoding.sampler import Sampler
from skimp.kernels.draws import PlainRows, Rows, rows_of

FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "penalties": {
        "frequency_penalty": 0.7,
        "presence_penalty": -0.4,
        "repetition_penalty": 1.3,
    },
}
PENALISED = FILTERS["penalties"]


TEMPERATURES = {"greedy": 0.0, "T 0.7": 0.7, "T 1.3": 1.3}
TRUNCATIONS = {"all": {}, "top_k": {"top_k": 4}, "top_p": {"top_p": 0.8}, "min_p": {"min_p": 0.15}}
FEATURES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "presence": {"presence_penalty": 0.9},
    "frequency": {"frequency_penalty": -0.7},
    "repetition": {"repetition_penalty": 1.4},
    "logit_bias": {"logit_bias": {1: 2.0, 5: -3.0}},
    "min_tokens": {"min_tokens": 2, "stop_token_ids": (2, 6)},
    "bad_words": {"bad_words": ((3,), (1, 4))},
}


def block_law(law: Law) -> Floats:
    """Of a block's first tokens as the target alone draws them."""
    return plain_law(law, GAMMA + 1)


class Laws:
    """The laws of skimp's own ``process`` after every prefix."""

    def __init__(self, toy: Toy, which: str, asked: dict[str, Any]) -> None:
        self._toy, self._which, self._row = toy, which, row_of(asked, size=toy.size)
        self._kept: dict[Prefix, Floats] = {}

    def __call__(self, prefix: Prefix) -> Floats:
        if prefix not in self._kept:
            logits = torch.tensor([self._toy.logits(self._which, prefix)])
            law = process(logits, [self._row.drafted(prefix)]).probabilities()
            self._kept[prefix] = law[0].numpy()
        return self._kept[prefix]


def row_of(asked: dict[str, Any], seed: int = 0, size: int = V) -> RowState:
    return RowState(SamplingParams(seed=seed, ignore_eos=True, **asked), vocab_size=size)


def by_rule(toy: Toy, rule: Rule, q: Law, p: Law) -> Iterator[Outcome]:
    """What a rule of skimp makes of every draft."""
    for tokens, chance in drafts(toy, q):
        pl = np.stack([p(tokens[:i]) for i in range(GAMMA + 1)])
        ql = np.stack([q(tokens[:i]) for i in range(GAMMA)])
        ids = list(tokens)
        shares = rule.shares(pl[range(GAMMA), ids] / ql[range(GAMMA), ids])
        rests = np.maximum(np.array(shares[:-1])[:, None] * pl[:-1] - ql, 0.0)
        left = rests.sum(-1)
        chances = np.array(rule.chances(pl[range(GAMMA), ids] / ql[range(GAMMA), ids], left))
        after = [normal(rest, whole) for rest, whole in zip(rests, pl)]
        assert chances.min() >= 0.0 and abs(chances.sum() - 1.0) < 1e-12
        for i in range(GAMMA + 1):
            if chances[i] > 0.0:
                yield chance * chances[i], tokens[:i], after[i] if i < GAMMA else pl[GAMMA]


def check_rule(toy: Toy, rule: Rule, drafts_ask: dict[str, Any]) -> None:
    p = Laws(toy, "p", toy.asked)
    found = joint(p, by_rule(toy, rule, Laws(toy, "q", drafts_ask), p))
    wrong = total_variation(found, block_law(p))
    assert wrong <= 1e-12, (toy.kind, toy.seed, toy.asked, drafts_ask, wrong)
    # Logits are float32, which the law written by hand is not.
    assert total_variation(found, block_law(toy.p)) <= 1e-6


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_rules_keep_the_joint_law(name: str, kind: str) -> None:
    """50 seeds a kind; the filters take turns, on both laws or on the target's alone."""
    filters = list(FILTERS.values())
    for seed in range(50):
        asked = filters[seed % len(filters)]
        toy = Toy(kind, seed, asked)
        check_rule(toy, RULES[name], asked if seed // len(filters) % 2 else {})


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("what", FILTERS)
def test_rules_keep_the_joint_law_under_every_filter(name: str, what: str) -> None:
    asked = FILTERS[what]
    for seed, kind in enumerate(KINDS):
        toy = Toy(kind, 1000 + seed, asked)
        for own in (asked, {}):
            check_rule(toy, RULES[name], own)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_of_a_request(name: str, temperature: str, feature: str) -> None:
    """8 tokens, laws that depend on the last two; what masks and penalties leave is the law."""
    for number, truncation in enumerate(TRUNCATIONS.values()):
        asked = {"temperature": TEMPERATURES[temperature], **truncation, **FEATURES[feature]}
        toy = Toy("plain", 300 + number, asked, size=8, memory=2)
        check_rule(toy, RULES[name], asked if number % 2 else {})


def test_block_keeps_at_least_as_many_tokens() -> None:
    def mean(toy: Toy, rule: Rule) -> float:
        return sum(chance * len(kept) for chance, kept, _ in by_rule(toy, rule, toy.q, toy.p))

    pairs = [(mean(t, Block()), mean(t, Chain())) for t in (Toy("plain", s) for s in range(20))]
    assert all(block >= chain - 1e-12 for block, chain in pairs)
    assert np.mean([block for block, _ in pairs]) > 1.02 * np.mean([chain for _, chain in pairs])


def fixture(fault: str, seed: int) -> Toy:
    """One that gives the fault something to get wrong."""
    if fault == FAULTS[3]:
        return Toy("plain", seed, PENALISED)
    if fault == FAULTS[12]:  # drafts stand often enough to need the last row
        return Toy("same", seed, {"top_k": 3})
    return Toy("plain", seed)


def test_by_hand_is_right_without_a_fault() -> None:
    for asked in ({}, {"top_k": 3}, PENALISED):
        for seed, kind in enumerate(KINDS):
            toy = Toy(kind, seed, asked)
            for outcomes in (by_hand(toy), siblings(toy, right=True)):
                assert total_variation(joint(toy.p, outcomes), block_law(toy.p)) <= 1e-12


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_found(fault: str, record_property: Any) -> None:
    """The largest total variation over a few seeds is far beyond what a right sampler shows."""
    worst = 0.0
    for seed in range(5):
        toy = fixture(fault, seed)
        worst = max(worst, total_variation(joint(toy.p, by_hand(toy, fault)), block_law(toy.p)))
    record_property("total_variation", worst)
    assert worst > 0.01


def test_halves_of_two_rules_do_not_fit() -> None:
    """The counts of one rule with the residual of the other is a fault that the suite finds."""

    class Mixed(Chain):
        def shares(self, ratios: Sequence[float]) -> list[float]:
            return Block().shares(ratios)

    toy = Toy("plain", 0)
    found = joint(toy.p, by_rule(toy, Mixed(), toy.q, toy.p))
    assert total_variation(found, block_law(toy.p)) > 0.01


# ---- the code that ships -----------------------------------------------------------------------


class Drawer:
    """Speculates whole sequences of GAMMA + 1 tokens with the acceptor that the engine uses."""

    def __init__(self, toy: Toy, acceptor: RatioTest, device: str = "cpu") -> None:
        self._toy, self._acceptor, self._device = toy, acceptor, device
        self._p: dict[Prefix, list[float]] = {}
        self._q: dict[Prefix, Floats] = {}
        self.stood = 0

    def draft(self, rows: list[RowState], length: int) -> list[Draft]:
        keys = [row.key for row in rows]
        tokens: list[list[int]] = [[] for _ in rows]
        laws = []
        for lead in range(length):
            law = np.stack([self._law((*r.outputs, *t)) for r, t in zip(rows, tokens)])
            positions = [row.position + lead for row in rows]
            numbers = uniforms(keys, positions, Purpose.DRAFT, [lead] * len(rows))
            laws.append(torch.from_numpy(law))
            for own, token in zip(tokens, rows_of([laws[-1]]).draw(numbers)):
                own.append(token)
        stacked = torch.stack(laws, dim=1).to(self._device)
        return [Draft(tuple(own), law) for own, law in zip(tokens, stacked)]

    def _law(self, prefix: Prefix) -> Floats:
        if prefix not in self._q:
            self._q[prefix] = self._toy.q(prefix)
        return self._q[prefix]

    def sequences(self, seeds: range) -> list[Prefix]:
        """Drafts are of all lengths, in one batch."""
        rows = [row_of(self._toy.asked, seed) for seed in seeds]
        running = list(rows)
        while running:
            drafted = [
                one.cut(GAMMA if row.key % 2 else (row.key // 2 + row.position) % (GAMMA + 1))
                for row, one in zip(running, self.draft(running, GAMMA))
            ]
            lines = [
                self._toy.logits("p", (*row.outputs, *one.tokens[:i]))
                for row, one in zip(running, drafted)
                for i in range(len(one.tokens) + 1)
            ]
            logits = torch.tensor(lines, device=self._device)
            for row, gain in zip(running, self._acceptor.accept(logits, running, drafted)):
                assert gain.error is None
                self.stood += len(gain.tokens) - 1
                row.commit(gain.tokens)
            running = [row for row in running if row.position < GAMMA + 1]
        return [tuple(row.outputs[: GAMMA + 1]) for row in rows]


def counts(drawer: Drawer, seeds: range, batch: int = 2048) -> Floats:
    found = np.zeros((V,) * (GAMMA + 1))
    for first in range(seeds.start, seeds.stop, batch):
        tokens = np.array(drawer.sequences(range(first, min(first + batch, seeds.stop))))
        np.add.at(found, tuple(tokens.T), 1)
    return found


SHIPPED = [("plain", {}), ("zeros", {"top_p": 0.8}), ("ties", PENALISED)]


def shipped(case: int) -> Toy:
    kind, asked = SHIPPED[case]
    return Toy(kind, 77 + case, asked)


def drawn(name: RuleName, case: int, device: str, seeds: range) -> tuple[Floats, int]:
    """Counts of whole sequences, and how many guesses stood."""
    drawer = Drawer(shipped(case), RatioTest(Sampler(), RULES[name]), device)
    return counts(drawer, seeds), drawer.stood


def check_drawn(
    name: RuleName, case: int, blocks: int, device: str = "cpu", workers: int = 1
) -> None:
    parts = [range(i * blocks // workers, (i + 1) * blocks // workers) for i in range(workers)]
    if workers == 1:
        found = [drawn(name, case, device, parts[0])]
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            found = list(pool.map(partial(drawn, name, case, device), parts))
    total = np.sum([counted for counted, _ in found], axis=0)
    assert total.sum() == blocks
    assert chi_square(total, block_law(shipped(case).p)) > 1e-5
    assert sum(stood for _, stood in found) > blocks / 4


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("case", range(len(SHIPPED)))
def test_drawn_sequences_follow_the_law(name: RuleName, case: int) -> None:
    check_drawn(name, case, 6_000)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("case", "blocks"), [(0, 1_300_000), (1, 60_000), (2, 150_000)])
def test_many_drawn_sequences_follow_the_law(name: RuleName, case: int, blocks: int) -> None:
    check_drawn(name, case, blocks)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", RULES)
def test_1_300_000_sequences_on_a_gpu(name: RuleName) -> None:
    check_drawn(name, 0, 1_300_000, "cuda", workers=min(12, os.cpu_count() or 1))


def test_counting_finds_a_wrong_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_p(rows: Rows, laws: Rows, scales: list[float], numbers: list[float]) -> list[int]:
        return rows.draw(numbers)

    monkeypatch.setattr(type(rows_of([torch.ones(1, 1, dtype=torch.float64)])), "draw_left", from_p)
    drawer = Drawer(Toy("plain", 77), RatioTest(Sampler(), Chain()))
    assert chi_square(counts(drawer, range(10_000)), block_law(Toy("plain", 77).p)) < 1e-9


# ---- rows of other kinds beside them ------------------------------------------------------------


def test_greedy_rows_and_guesses_beside_drawn_drafts() -> None:
    """Each row is as if the others were not there; greedy rows and lookups are plain generation."""
    acceptor, plain = RatioTest(Sampler(), Block()), DrawAndCompare(Sampler())
    toy = Toy("plain", 5)
    rows = [row_of({"temperature": 0.0 if i % 3 == 0 else 1.0}, 40 + i) for i in range(9)]
    drawn = Drawer(toy, acceptor).draft(rows, GAMMA)
    mixed = [Draft(one.tokens) if i % 3 == 1 else one for i, one in enumerate(drawn)]
    mixed[4] = Draft()
    logits = [
        torch.tensor([toy.logits("p", one.tokens[:i]) for i in range(len(one.tokens) + 1)])
        for one in mixed
    ]
    together = acceptor.accept(torch.cat(logits), rows, mixed)
    for row, one, lines, gain in zip(rows, mixed, logits, together):
        assert acceptor.accept(lines, [row], [one]) == [gain]
        if one.laws is None or row.params.temperature == 0.0:
            assert plain.accept(lines, [row], [one]) == [gain]


def test_a_row_that_is_no_number_ends_its_block_alone() -> None:
    acceptor, toy = RatioTest(Sampler(), Block()), Toy("same", 5)
    rows = [row_of({}, seed) for seed in range(4)]
    drafted = Drawer(toy, acceptor).draft(rows, GAMMA)
    logits = torch.tensor(
        [toy.logits("p", d.tokens[:i]) for d in drafted for i in range(GAMMA + 1)]
    )
    right = acceptor.accept(logits, rows, drafted)
    assert all(len(gain.tokens) == GAMMA + 1 for gain in right), "equal laws refuse nothing"
    logits[4 * 1 + 2] = float("nan")
    logits[4 * 2] = float("nan")
    found = acceptor.accept(logits, rows, drafted)
    assert [found[0], found[3]] == [right[0], right[3]]
    assert found[1].tokens == list(drafted[1].tokens[:2]) and "non-finite" in str(found[1].error)
    assert found[2].tokens == [] and "non-finite" in str(found[2].error)
    assert len(found[1].logprobs) == 2


def test_a_draft_that_falls_before_a_bad_line_never_meets_it() -> None:
    toy = Toy("plain", 5)
    rows = [row_of({}, seed) for seed in range(400)]
    for acceptor in (RatioTest(Sampler(), Block()), DrawAndCompare(Sampler())):
        drafted = Drawer(toy, RatioTest(Sampler(), Chain())).draft(rows, GAMMA)
        lines = [toy.logits("p", d.tokens[:i]) for d in drafted for i in range(GAMMA + 1)]
        logits = torch.tensor(lines)
        logits[GAMMA :: GAMMA + 1] = float("nan")
        met = 0
        for one, gain in zip(drafted, acceptor.accept(logits, rows, drafted)):
            assert -1 not in gain.tokens and len(gain.logprobs) == len(gain.tokens)
            met += gain.error is not None
            if gain.error is not None:
                assert gain.tokens == list(one.tokens)
        assert 0 < met < len(rows)


def test_equal_laws_leave_the_target_as_it_is() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    for rows in (rows_of([p]), PlainRows([p])):
        for number, token in ((0.0, 0), (0.49, 0), (0.51, 1), (0.99, 2)):
            assert rows.draw_left(rows, [1.0], [number]) == [token]


def test_ratios_of_nothing_and_of_too_much() -> None:
    ratios, left = [0.0, np.inf, 1.0], [1.0, 0.0, 0.0]
    for rule in RULES.values():
        assert rule.shares(ratios)[2] in (0.0, 1.0)
        assert rule.chances(ratios, left) == [1.0, 0.0, 0.0, 0.0]


def test_logprobs_are_those_of_plain_rows() -> None:
    toy, acceptor = Toy("plain", 9), RatioTest(Sampler(), Block())
    rows = [row_of({"logprobs": 2}, seed) for seed in range(30)]
    drafted = Drawer(toy, acceptor).draft(rows, GAMMA)
    logits = torch.tensor(
        [toy.logits("p", d.tokens[:i]) for d in drafted for i in range(GAMMA + 1)]
    )
    for i, gain in enumerate(acceptor.accept(logits, rows, drafted)):
        assert len(gain.logprobs) == len(gain.tokens)
        for j, (token, one) in enumerate(zip(gain.tokens, gain.logprobs)):
            wanted = torch.log_softmax(logits[4 * i + j].double(), -1)
            assert one is not None and one.token_id == token
            assert one.logprob == pytest.approx(float(wanted[token]), abs=1e-12)
            assert one.top[0][1] == pytest.approx(float(wanted.max()), abs=1e-12)
