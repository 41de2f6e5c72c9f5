"""The joint law of a speculated block by enumeration, in plain float64 and sharing no code with
skimp: every draft, every refusal, every token after it. ``fault`` switches one of thirteen known
mistakes on, each of which some engine has shipped.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from decoding_reference import law
from joint_laws import Floats, Law, Prefix, plain_law

V, GAMMA = 6, 3
FAULTS = (
    "draft taken by argmax, verified by its softmax",
    "verified one position off",
    "accepted above a threshold",
    "penalties without the drafted tokens",
    "accepted if equal, then the ratio test's residual",
    "last token from the row before",
    "after a refusal from p",
    "draft cut before an unlikely token",
    "q before its top-k",
    "after a refusal from p without the token",
    "siblings without replacement, verified with the first law",
    "one noise for the draft and for the residual",
    "last token unfiltered",
)
KINDS = ("plain", "zeros", "ties", "one-hot", "disjoint", "same")


@dataclass
class Toy:
    """Target and draft as tables of logits by context, and what the request asks of the target."""

    kind: str
    seed: int
    asked: dict[str, Any] = field(default_factory=dict)
    size: int = V
    memory: int = GAMMA  # tokens that the next one depends on
    _made: dict[tuple[str, Prefix], list[float]] = field(default_factory=dict)

    def logits(self, which: str, prefix: Prefix) -> list[float]:
        prefix = prefix[max(0, len(prefix) - self.memory) :]
        if (which, prefix) not in self._made:
            self._made[which, prefix] = self._make(which, prefix)
        return self._made[which, prefix]

    def _make(self, which: str, prefix: Prefix) -> list[float]:
        if self.kind == "same" and which == "q":
            return self.logits("p", prefix)
        number = 0
        for token in prefix:
            number = number * self.size + token + 1
        rng = np.random.default_rng([self.seed, which == "q", number])
        x = np.float32(rng.normal(size=self.size) * 1.5)
        if self.kind == "ties":
            x = np.float32(rng.integers(0, 2, self.size))
        if self.kind == "zeros":
            x[rng.permutation(self.size)[: rng.integers(1, self.size - 1)]] = -np.inf
        if self.kind == "one-hot" and rng.random() < 0.5:
            x[np.arange(self.size) != rng.integers(self.size)] = -np.inf
        if self.kind == "disjoint":
            half = np.random.default_rng([self.seed, number]).permutation(self.size)
            x[half[:3] if which == "p" else half[3:]] = -np.inf
        return [float(v) for v in x]

    def p(self, prefix: Prefix, output: Prefix | None = None, **asked: Any) -> Floats:
        """The target's law after ``prefix``; ``output``: what penalties count, if not that."""
        counted = prefix if output is None else output
        return np.array(law(self.logits("p", prefix), output=counted, **(asked or self.asked)))

    def q(self, prefix: Prefix, **asked: Any) -> Floats:
        return np.array(law(self.logits("q", prefix), output=prefix, **asked))


Outcome = tuple[float, Prefix, Floats]  # chance, tokens that stand, law of the one after them


def joint(law: Law, outcomes: Iterator[Outcome]) -> Floats:
    """Joint law of a block's first GAMMA + 1 tokens; what it leaves open is drawn by ``law``."""
    total = np.zeros((len(law(())),) * (GAMMA + 1))
    tails: dict[Prefix, Floats] = {}
    for chance, stands, after in outcomes:
        for token in np.flatnonzero(after):
            prefix = (*stands, int(token))
            if prefix not in tails:
                tails[prefix] = plain_law(law, GAMMA + 1 - len(prefix), prefix)
            total[prefix] += chance * after[token] * tails[prefix]
    return total


def drafts(toy: Toy, q: Law, length: int = GAMMA) -> Iterator[tuple[Prefix, float]]:
    """Every draft, and its chance."""
    for tokens in itertools.product(range(toy.size), repeat=length):
        chance = 1.0
        for i, x in enumerate(tokens):
            chance *= q(tokens[:i])[x]
            if chance == 0.0:
                break
        if chance > 0.0:
            yield tokens, chance


def normal(weights: Floats, otherwise: Floats) -> Floats:
    total = weights.sum()
    return weights / total if total > 0 else otherwise


def residual(p: Floats, q: Floats) -> Floats:
    return normal(np.maximum(p - q, 0.0), p)


def one_hot(token: int, size: int) -> Floats:
    return np.eye(size)[token]


def by_hand(toy: Toy, fault: str | None = None) -> Iterator[Outcome]:
    """The chain of Leviathan et al. (2023), token after token, right or with a fault."""
    if fault == FAULTS[10]:
        yield from siblings(toy, right=False)
        return
    if fault == FAULTS[11]:
        yield from shared_noise(toy)
        return
    sampled = recorded = toy.q
    if fault == FAULTS[0]:

        def sampled(prefix: Prefix) -> Floats:  # type: ignore[misc]
            return one_hot(int(toy.q(prefix).argmax()), toy.size)

    if fault == FAULTS[8]:

        def sampled(prefix: Prefix) -> Floats:  # type: ignore[misc]
            return toy.q(prefix, top_k=3)

    for tokens, chance in drafts(toy, sampled):
        length = GAMMA
        if fault == FAULTS[7]:
            unlikely = (i for i in range(GAMMA) if recorded(tokens[:i])[tokens[i]] < 0.3)
            length = next(unlikely, GAMMA)
        yield from _chain(toy, tokens, length, chance, recorded, fault)


def _chain(
    toy: Toy,
    tokens: Prefix,
    length: int,
    chance: float,
    recorded: Law,
    fault: str | None,
) -> Iterator[Outcome]:
    for i in range(length):
        before, x = tokens[:i], tokens[i]
        p, q = toy.p(before), recorded(before)
        if fault == FAULTS[1]:
            p = toy.p(tokens[: i + 1])
        if fault == FAULTS[3]:
            p = toy.p(before, output=())
        keep, after = min(1.0, p[x] / q[x]), residual(p, q)
        if fault == FAULTS[2]:
            keep = float(p[x] > 0.15)
        if fault == FAULTS[4]:
            keep = float(p[x])
        if fault == FAULTS[6]:
            after = p
        if fault == FAULTS[9]:
            after = normal(np.where(np.arange(toy.size) == x, 0.0, p), p)
        yield chance * (1.0 - keep), before, after
        chance *= keep
    last = toy.p(tokens[:length])
    if fault == FAULTS[3]:
        last = toy.p(tokens[:length], output=())
    if fault == FAULTS[5]:
        last = toy.p(tokens[: max(0, length - 1)])
    if fault == FAULTS[12]:
        last = toy.p(tokens[:length], temperature=1.0)
    yield chance, tokens[:length], last


def siblings(toy: Toy, *, right: bool) -> Iterator[Outcome]:
    """Two guesses for the first token, drawn without replacement (SpecInfer, Miao et al. 2024)."""
    first, target = toy.q(()), toy.p(())
    for a in np.flatnonzero(first):
        rest = normal(np.where(np.arange(toy.size) == a, 0.0, first), first)
        keep = min(1.0, target[a] / first[a])
        yield first[a] * keep, (int(a),), toy.p((int(a),))
        left = residual(target, first)
        for b in np.flatnonzero(rest):
            chance = first[a] * (1.0 - keep) * rest[b]
            law = rest if right else first
            keep_b = min(1.0, left[b] / law[b])
            yield chance * keep_b, (int(b),), toy.p((int(b),))
            yield chance * (1.0 - keep_b), (), residual(left, law)


def shared_noise(toy: Toy) -> Iterator[Outcome]:
    """One number draws the first guess and, once that is refused, what takes its place."""
    p, q = toy.p(()), toy.q(())
    after = residual(p, q)
    edges = np.unique(np.concatenate(([0.0], np.cumsum(q), np.cumsum(after))).clip(0.0, 1.0))
    for low, high in itertools.pairwise(edges):
        middle = (low + high) / 2
        x = min(int(np.searchsorted(np.cumsum(q), middle, side="right")), toy.size - 1)
        y = min(int(np.searchsorted(np.cumsum(after), middle, side="right")), toy.size - 1)
        keep = min(1.0, p[x] / q[x]) if q[x] > 0 else 1.0
        yield (high - low) * keep, (x,), toy.p((x,))
        yield (high - low) * (1.0 - keep), (), one_hot(y, toy.size)


def total_variation(a: Floats, b: Floats) -> float:
    return float(np.abs(a - b).sum() / 2)
