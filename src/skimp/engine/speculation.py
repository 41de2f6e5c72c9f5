"""Which proposer and which acceptor the options name, and what became of the guesses."""

from __future__ import annotations

from dataclasses import dataclass, field

from skimp.decoding.accept import RULES, DrawAndCompare, RatioTest
from skimp.decoding.proposal import Acceptor, Proposer
from skimp.decoding.sampler import Sampler
from skimp.engine.control import LengthControl
from skimp.engine.options import EngineOptions
from skimp.engine.request import Sequence
from skimp.engine.scheduler import Work
from skimp.engine.served import ServedModel
from skimp.errors import OptionError
from skimp.model.decoder import Decoder
from skimp.model.draft_head import DraftHead
from skimp.model.locate import locate_model
from skimp.model.spec import ModelSpec
from skimp.text.tokenizer import Tokenizer


def find_head(
    options: EngineOptions, decoder: Decoder, given: DraftHead | None
) -> DraftHead | None:
    """The head that the options name, or that was ``given``; ``decoder``, not bound yet, will leave
    what it goes on from. Raises ``SkimpError`` for one that does not fit."""
    if options.speculate != "head":
        if given is not None:
            raise OptionError(f"speculate: {options.speculate} beside a draft head that was given")
        return None
    if given is None:
        from skimp.draft import read_head

        assert options.draft_model is not None
        given = read_head(locate_model(options.draft_model), decoder.spec)
    head = given.to(decoder.dtype)
    decoder.fusion = head.fusion
    return head


def make_proposer(
    options: EngineOptions,
    decoder: Decoder,
    served: ServedModel,
    tokenizer: Tokenizer | None,
    head: DraftHead | None,
) -> Proposer | None:
    """None for plain generation. Raises ``SkimpError`` for a draft model that does not fit."""
    if options.speculate == "lookup":
        from skimp.decoding.lookup import Lookup

        return Lookup()
    if options.speculate == "suffix":
        from skimp.decoding.suffix import Suffix

        return Suffix()
    if options.speculate == "draft":
        return _draft_model(options, decoder.spec, tokenizer)
    if head is not None:
        from skimp.engine.draft_head import HeadProposer

        coupled = options.accepts_by == "match"
        return HeadProposer(head, decoder, served, options, coupled=coupled)
    return None


def make_acceptor(options: EngineOptions) -> Acceptor:
    rule = options.accepts_by
    return DrawAndCompare(Sampler()) if rule == "match" else RatioTest(Sampler(), RULES[rule])


def _draft_model(options: EngineOptions, spec: ModelSpec, tokenizer: Tokenizer | None) -> Proposer:
    from skimp.engine.draft_model import DraftModel, require_same_tokens
    from skimp.model.loading import load_decoder

    name = options.draft_model
    assert name is not None
    path = locate_model(name)
    decoder = load_decoder(path, dtype=options.dtype)
    require_same_tokens(name, decoder.spec, Tokenizer.load(path), spec, tokenizer)
    return DraftModel(decoder, options, coupled=options.accepts_by == "match")


class Lengths:
    """How many tokens the next step may guess: ``longest``, or what a control says."""

    def __init__(self, longest: int, control: LengthControl | None) -> None:
        self._longest, self._control = longest, control
        self._next = 0

    def decide(self, batch: int) -> bool:
        """Once before each step, of about ``batch`` sequences: whether it may guess."""
        control = self._control
        self._next = self._longest if control is None else control.next_length(batch)
        return self._next > 0

    def of(self, seq: Sequence) -> int:
        resting = self._control is not None and self._control.rests(seq)
        return 0 if resting else self._next

    def count(self, item: Work, stood: int) -> None:
        if self._control is not None:
            self._control.count(item.seq, item.asked, len(item.draft.tokens), stood)

    def time(self, work: list[Work], seconds: float) -> None:
        """``seconds`` of a whole step; only steps that do nothing but generate are counted."""
        if self._control is None or not all(item.num_known == item.known_logits for item in work):
            return
        rows = sum(len(item.draft.tokens) for item in work)
        self._control.time(len(work), rows, seconds)

    def end(self, seq: Sequence) -> None:
        if self._control is not None:
            self._control.end(seq)


@dataclass
class SpeculationStats:
    """Counts over all steps of sequences that drew tokens.

    ``steps``: with a guess or without; ``drafted[i]``, ``accepted[i]``: guesses at place i of a
    draft, and those of them that were accepted.
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
