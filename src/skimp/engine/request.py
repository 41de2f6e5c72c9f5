"""A request as the engine keeps it, and what the user gets back."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from torch import Tensor

from skimp.cache import CacheSequence
from skimp.decoding.params import SamplingParams
from skimp.decoding.rows import RowState
from skimp.decoding.sampler import TokenLogprobs
from skimp.decoding.stops import FinishReason, StopChecker
from skimp.engine.reading import DescribeTokens, PromptReader


@dataclass(slots=True, eq=False)
class Completion:
    """One sample of a request. ``logprobs`` has an entry a token when they were asked for."""

    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: list[TokenLogprobs] | None
    _tokens: list[int] = field(repr=False)  # of the sequence, which go on growing
    _span: slice = field(repr=False)

    @property
    def token_ids(self) -> list[int]:
        """Of the output, made when they are asked for: most steps' outputs nobody reads."""
        return self._tokens[self._span]


@dataclass
class Metrics:
    """Seconds on the monotonic clock, and counts of tokens."""

    arrival: float
    first_token: float | None = None
    finished: float | None = None
    reused_prompt_tokens: int = 0
    preemptions: int = 0

    @property
    def first_token_s(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.arrival


@dataclass
class RequestOutput:
    """The state of a request after a step; ``delta`` is the text the step added to sample 0."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[Completion]
    finished: bool
    metrics: Metrics
    delta: str = ""
    new_token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    error: str | None = None


class Request:
    """What was asked, and the sequences (one a sample) that answer it."""

    def __init__(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        priority: int,
        arrival_index: int,
        max_tokens: int,
        salt: str | None,
        reader: PromptReader | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt_ids = prompt_ids
        self.params = params
        self.priority = priority
        self.arrival_index = arrival_index
        self.max_tokens = max_tokens
        self.salt = salt
        self.sequences: list[Sequence] = []
        self.metrics = Metrics(arrival=time.monotonic())
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        if params.prompt_logprobs is not None:
            reader = DescribeTokens(prompt_ids, params.prompt_logprobs)
            self.prompt_logprobs = reader.entries
        self.reader = reader
        self._next_row = 0 if reader is None else reader.start
        self.error: str | None = None

    @property
    def next_row(self) -> int | None:
        """The first row of the prompt that its reader has not seen; None when there is none."""
        if self.reader is None or self._next_row >= len(self.prompt_ids) - 1:
            return None
        return self._next_row

    def read(self, logits: Tensor) -> None:
        """Hand the reader the logits of ``next_row`` and those after it; others may follow those
        of the prompt. ValueError from the reader."""
        assert self.reader is not None
        rows = logits[: len(self.prompt_ids) - 1 - self._next_row]
        self._next_row += rows.shape[0]
        self.reader.read(rows)

    @property
    def finished(self) -> bool:
        return all(seq.ended for seq in self.sequences)

    def output(
        self, finished: bool, *, delta: str = "", new_token_ids: list[int] | None = None
    ) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id,
            prompt_token_ids=self.prompt_ids,
            outputs=[seq.completion() for seq in self.sequences],
            finished=finished,
            metrics=self.metrics,
            delta=delta,
            new_token_ids=new_token_ids or [],
            prompt_logprobs=self.prompt_logprobs,
            error=self.error,
        )


@dataclass(frozen=True)
class Flying:
    """A token that is drawn, but has not reached the host: which step drew it, and its place
    among that step's draws."""

    step: int
    place: int


class Sequence:
    """The tokens of one sample: the prompt and what was generated so far.

    ``cache`` is None while the sequence waits; it holds the first ``cache.length`` tokens.
    """

    def __init__(
        self, request: Request, index: int, sampling: RowState, output: StopChecker
    ) -> None:
        self.request = request
        self.index = index
        self.tokens = list(request.prompt_ids)
        self.num_prompt = len(request.prompt_ids)
        self.sampling = sampling
        self.output = output
        self.cache: CacheSequence | None = None
        self.num_reused = 0  # prompt tokens that the prefix cache held at admission
        self.forked = index > 0  # sample 0 stands for the others until the prompt is done
        self.flying: Flying | None = None
        self.text = ""
        self.logprobs: list[TokenLogprobs] | None = None if request.params.logprobs is None else []
        self.finish_reason: FinishReason | None = None

    @property
    def rank(self) -> tuple[int, int, int]:
        return (self.request.priority, self.request.arrival_index, self.index)

    @property
    def places(self) -> int:
        """Places in the batch that it takes, or will when the samples it stands for part."""
        return 1 if self.forked else self.request.params.n

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None

    @property
    def num_tokens(self) -> int:
        """Tokens that exist, the one that the host has not seen yet included."""
        return len(self.tokens) + (self.flying is not None)

    def land(self, step: int) -> None:
        """The draws of ``step`` are here; a token drawn after them may still be on its way."""
        if self.flying is not None and self.flying.step == step:
            self.flying = None

    @property
    def tokens_left(self) -> int:
        """Output tokens that may still come."""
        return self.request.max_tokens - (self.num_tokens - self.num_prompt)

    @property
    def reusable(self) -> list[int]:
        """The tokens that may come from the prefix cache, of which the last never does: a row that
        is to be read has to be computed."""
        row = self.request.next_row
        return self.tokens if row is None else self.tokens[: row + 1]

    def completion(self) -> Completion:
        return Completion(
            index=self.index,
            text=self.text,
            finish_reason=self.finish_reason,
            logprobs=self.logprobs,
            _tokens=self.tokens,
            _span=slice(self.num_prompt, len(self.tokens)),
        )
