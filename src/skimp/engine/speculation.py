"""Which proposer an option names, and what became of its guesses."""

from __future__ import annotations

from dataclasses import dataclass, field

from skimp.decoding.proposal import Proposer
from skimp.engine.options import Speculate


def make_proposer(name: Speculate) -> Proposer | None:
    """None for plain generation."""
    if name == "lookup":
        from skimp.decoding.lookup import Lookup

        return Lookup()
    if name == "suffix":
        from skimp.decoding.suffix import Suffix

        return Suffix()
    return None


@dataclass
class SpeculationStats:
    """Counts over all steps of sequences that drew tokens.

    ``steps``: with a guess or without; ``drafted[i]``, ``accepted[i]``: guesses at place i of a
    draft, and those of them that stood.
    """

    steps: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def count(self, drafted: int, accepted: int) -> None:
        """One step of one sequence."""
        self.steps += 1
        missing = drafted - len(self.drafted)
        if missing > 0:
            self.drafted += [0] * missing
            self.accepted += [0] * missing
        for i in range(drafted):
            self.drafted[i] += 1
            self.accepted[i] += i < accepted

    @property
    def tokens_per_step(self) -> float:
        """A sequence's mean gain of a step: 1 and the guesses that stood."""
        return 1.0 + (sum(self.accepted) / self.steps if self.steps else 0.0)

    @property
    def by_position(self) -> list[float]:
        """The share of guesses at each place that stood."""
        return [a / d for a, d in zip(self.accepted, self.drafted)]
