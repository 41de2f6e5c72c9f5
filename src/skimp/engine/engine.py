"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import contextlib
import gc
import itertools
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from skimp.decoding.deferred import deferrable, draw_deferred
from skimp.decoding.params import SamplingParams
from skimp.decoding.proposal import Accepted, Proposer
from skimp.decoding.rows import RowState, resolve_bad_words
from skimp.decoding.stops import FinishReason, StopChecker
from skimp.engine.admission import Prompt, encode, most_tokens
from skimp.engine.control import LengthControl
from skimp.engine.flight import Draw, Flight
from skimp.engine.options import EngineOptions
from skimp.engine.reading import KeepLogits, PromptReader, Scores, ScoreTokens
from skimp.engine.request import Flying, Request, RequestOutput, Sequence
from skimp.engine.scheduler import Scheduler, Work
from skimp.engine.served import ServedModel
from skimp.engine.speculation import (
    Lengths,
    SpeculationStats,
    find_head,
    make_acceptor,
    make_proposer,
)
from skimp.errors import OptionError, RequestError
from skimp.model.decoder import Decoder
from skimp.model.draft_head import DraftHead
from skimp.model.loading import load_decoder
from skimp.model.locate import locate_model
from skimp.text.tokenizer import Tokenizer

MOST_LOGITS = 256  # rows of logits a step, unless there are more sequences


class Engine:
    """Serves one model. Not thread-safe: one thread adds requests and steps.

    ``decoder`` must have its weights and must not be bound; the engine takes it over.

    With ``overlap`` a step is launched before the one before it has landed: a token drawn on the
    device is read there by the next step, and the host learns of it one step later. A sequence
    that has ended by then is computed once more in vain, which nobody sees.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer | None = None,
        options: EngineOptions | None = None,
        *,
        proposer: Proposer | None = None,
        draft_head: DraftHead | None = None,
    ) -> None:
        """``proposer`` and ``draft_head`` (not bound, either) take the place of those that the
        options would name."""
        options = options or EngineOptions()
        plain = options.speculate == "none" and proposer is None
        if plain and options.draft_tokens is not None:
            raise OptionError("draft_tokens: nothing is guessed unless speculate says how")
        drafts = 0 if plain else options.longest_draft
        lines = options.max_batch * (1 + drafts)
        max_logits = max(options.max_batch, 128, min(lines, MOST_LOGITS))
        head = find_head(options, decoder, draft_head)
        served = ServedModel(
            decoder, decoder.spec, options, max_logits=max_logits, guessed_rows=1 + drafts
        )
        self.spec, self.tokenizer, self.options = decoder.spec, tokenizer, options
        self.decoder, self.dtype, self.work = decoder, served.dtype, served.work
        self.cache, self.runner = served.cache, served.runner
        self.max_context, self.backend_name = served.max_context, served.backend_name
        if proposer is None:
            proposer = make_proposer(options, decoder, served, tokenizer, head)
        elif options.speculate != "none":
            raise OptionError(f"speculate: {options.speculate} beside a proposer that was given")
        self.scheduler = Scheduler(
            self.cache,
            proposer,
            token_budget=options.step_tokens,
            max_batch=options.max_batch,
            max_logits=max_logits,
        )
        # Guesses follow from tokens that the host has seen, so steps that guess never overlap.
        self._overlap = options.overlaps and (proposer is None or options.controls)
        control = LengthControl(drafts) if options.controls and drafts else None
        self.lengths = Lengths(drafts, control)
        self._flight: Flight | None = None  # launched, and not landed
        # What the last step left for a draft head, of the tokens that it settled.
        self._features: dict[Sequence, Tensor] = {}
        self._numbers = itertools.count()
        self._newest = -1  # the last step that was launched
        self._acceptor = make_acceptor(options)
        self.speculation = SpeculationStats()
        self._requests: dict[str, Request] = {}
        self._arrivals = itertools.count()
        self._pending: list[RequestOutput] = []

    @classmethod
    def load(cls, model: str | Path, options: EngineOptions | None = None) -> Engine:
        """An engine for an embedded model's name, a directory, or a Hub id.

        Raises ``SkimpError`` naming the field or file when the model or an option is wrong.
        """
        options = options or EngineOptions()
        path = locate_model(str(model))
        decoder = load_decoder(path, dtype=options.dtype)
        return cls(decoder, Tokenizer.load(path), options)

    # ---- requests -------------------------------------------------------------------------

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        salt: str | None = None,
        reader: PromptReader | None = None,
    ) -> str:
        """Queue a prompt (text or token ids); the lower ``priority`` is served first.

        ``salt`` keeps prefix reuse among requests of the same salt. ``reader`` is given logits of
        the prompt's rows. Raises ``RequestError`` at once for what can never be served.
        """
        params = params or SamplingParams()
        arrival = next(self._arrivals)
        request_id = request_id or f"request-{arrival}"
        if request_id in self._requests:
            raise RequestError(f"request_id: {request_id!r} is already being served")
        if not isinstance(priority, int):
            raise RequestError(f"priority: expected a whole number, got {priority!r}")
        if salt is not None and not isinstance(salt, str):
            raise RequestError(f"salt: expected text, got {salt!r}")
        if reader is not None and params.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs: cannot be asked for beside a reader")
        prompt_ids = encode(prompt, self.tokenizer, self.spec.vocab_size)
        max_tokens = most_tokens(
            prompt_ids,
            params,
            max_context=self.max_context,
            options=self.options,
            cache=self.cache,
        )
        request = Request(
            request_id,
            prompt_ids,
            params,
            priority=priority,
            arrival_index=arrival,
            max_tokens=max_tokens,
            salt=salt,
            reader=reader,
        )
        request.sequences.append(self._sequence(request, 0))
        self._requests[request_id] = request
        self.scheduler.add(request.sequences[0])
        return request_id

    def abort(self, request_id: str) -> None:
        """Stop a request and give its pages back; unknown ids are ignored (it may have ended)."""
        request = self._requests.get(request_id)
        if request is None:
            return
        for seq in request.sequences:
            if not seq.ended:
                self._finish(seq, "abort")
        self._pending.append(self._close(request))
        self._forget_vain_flight()
        self.scheduler.forget_ended()

    def has_unfinished(self) -> bool:
        return bool(self._requests or self._pending or self._flight)

    def generate(
        self, prompts: Seq[Prompt], params: SamplingParams | Seq[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Serve all prompts to the end, batched; outputs in the order of the prompts."""
        if isinstance(params, SamplingParams) or params is None:
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise RequestError(f"params: {len(params)} given for {len(prompts)} prompts")
        return self._serve(prompts, params, [None] * len(prompts))

    def _serve(
        self,
        prompts: Seq[Prompt],
        params: Seq[SamplingParams],
        readers: Seq[PromptReader | None],
    ) -> list[RequestOutput]:
        ids: list[str] = []
        try:
            for prompt, one, reader in zip(prompts, params, readers):
                ids.append(self.add_request(prompt, one, reader=reader))
            done = {out.request_id: out for out in self._steps_of(ids) if out.finished}
        except BaseException:
            for request_id in ids:
                self._discard(request_id)
            raise
        return [done[request_id] for request_id in ids]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Serve one prompt, yielding after every step that adds to it.

        ``delta`` carries the new text of sample 0. Leaving the iterator early aborts the request.
        """
        request_id = self.add_request(prompt, params)
        try:
            yield from self._steps_of([request_id])
        finally:
            self._discard(request_id)

    def _discard(self, request_id: str) -> None:
        """Abort a request, whose outputs nobody waits for any more."""
        self.abort(request_id)
        self._pending = [out for out in self._pending if out.request_id != request_id]

    def _steps_of(self, ids: Seq[str]) -> Iterator[RequestOutput]:
        """Step until these requests have ended; outputs of others stay for the next ``step``."""
        waiting = set(ids)
        while waiting:
            # Outputs of others are put back before any is yielded: the caller may not come back.
            found = self._pending
            if not any(out.request_id in waiting for out in found):
                if waiting.isdisjoint(self._requests):
                    raise RequestError("the outputs of this request were taken by Engine.step")
                found = self.step()
            self._pending = [out for out in found if out.request_id not in waiting]
            for out in [out for out in found if out.request_id in waiting]:
                if out.finished:
                    waiting.discard(out.request_id)
                yield out

    # ---- the step -------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Launch one step and land one; outputs of the requests that gained tokens or ended.

        The first of several steps that overlap launches only, and has none.
        """
        with _collector_paused():
            return self._step()

    def _step(self) -> list[RequestOutput]:
        began, captured = time.perf_counter(), self._captures()
        outputs, self._pending = self._pending, []
        flying, self._flight = self._flight, None
        before, launched, landed = flying, None, None
        try:
            guesses = self.lengths.decide(len(self.scheduler.running))
            if guesses and before is not None:
                self._commit(before)
                outputs += self._land(before)
                before = None
            try:
                launched = self._launch(before, guesses)
            finally:
                # Whatever became of the launch: the tokens on the device last until the next one.
                if before is not None:
                    outputs += self._land(before)
                    landed, before = before, None
            if launched is None or launched.deferred is not None:
                self._flight = launched
                self._forget_vain_flight()
            else:
                outputs += self._land(launched)
                landed = launched if flying is None else None
            for seq in self.scheduler.forget_ended():
                self.lengths.end(seq)
            if landed is not None and captured == self._captures():
                self.lengths.time(landed.work, time.perf_counter() - began)
        except BaseException:
            if before is not None:  # it broke while it landed
                self._abandon(before)
                if launched is not None:
                    self._abandon(launched)
            self._pending = outputs + self._pending
            raise
        return outputs

    def _captures(self) -> int:
        guessed: int = getattr(self.scheduler.proposer, "captures", 0)
        return self.runner.backend.captures + guessed

    def _launch(self, before: Flight | None, guesses: bool) -> Flight | None:
        """Start a step while ``before`` flies; None when there is nothing to compute."""
        if before is not None:
            self._commit(before)
        work = self.scheduler.schedule()
        if not work:
            waits = self._requests and before is None and not self._pending
            assert not waits, "requests wait, but none could be scheduled"
            return None
        try:
            if guesses:
                self.scheduler.add_drafts(work, self.lengths.of, self._features)
            self._features = {}
            return self._start(work, guesses)
        except BaseException:
            self._roll_back(work)
            raise

    def _abandon(self, flight: Flight) -> None:
        """Have a step that never landed computed again: its tokens come out the same."""
        for item in flight.work:
            item.seq.flying = None
            if item.seq.cache is not None:
                self.scheduler.preempt(item.seq)

    def _forget_vain_flight(self) -> None:
        """Do not wait for a step all of whose sequences have ended."""
        if self._flight is not None and all(item.seq.ended for item in self._flight.work):
            self._flight = None

    def _roll_back(self, work: list[Work]) -> None:
        """What was appended and not committed is computed again if the caller goes on."""
        for item in work:
            if item.seq.cache is not None and item.seq.cache.pending:
                self.cache.commit(item.seq.cache, 0, [])

    def _start(self, work: list[Work], guesses: bool) -> Flight:
        self._newest = next(self._numbers)
        flight = Flight(self._newest, work, self.runner.run(work, wants_features=guesses))
        line, row, alone = 0, 0, self._overlap
        for item in work:
            line += item.num_logits
            row += item.num_tokens
            alone &= item.seq.request.next_row is None
            if item.reaches_end:
                samples = self._samples(item.seq)
                line_of = line - 1 - len(item.draft.tokens)
                flight.draws.append(Draw(item, samples, line_of, row - item.num_tokens))
                ahead = int(item.seq.flying is not None)
                alone &= len(samples) == 1 and not item.draft.tokens
                alone &= deferrable(item.seq.sampling, ahead)
        if alone:
            self._defer(flight)
        return flight

    def _defer(self, flight: Flight) -> None:
        seqs = [draw.item.seq for draw in flight.draws]
        lines = [draw.line for draw in flight.draws]
        flight.deferred = draw_deferred(
            _select(flight.logits, lines),
            [seq.sampling for seq in seqs],
            [int(seq.flying is not None) for seq in seqs],
            self.runner.buffers.drawn,
            self.runner.backend.highest() if len(lines) == len(flight.logits) else None,
        )
        for place, seq in enumerate(seqs):
            seq.flying = Flying(flight.number, place)

    def _commit(self, flight: Flight) -> None:
        """Keep what a deferred step computed: all the tokens that it was given are known by now."""
        if flight.committed:
            return
        flight.committed = True
        for item in flight.work:
            if item.seq.cache is not None:  # else it has ended
                self.cache.commit(item.seq.cache, item.num_known, item.token_ids)

    def _land(self, flight: Flight) -> list[RequestOutput]:
        """Use what a step gives, of the sequences that have not ended meanwhile."""
        if flight.deferred is not None:
            landed = list(zip(flight.draws, flight.deferred.wait()))
            for draw, _ in landed:
                draw.item.seq.land(flight.number)
            landed = [pair for pair in landed if not pair[0].item.seq.ended]
            gains = (gain for _, gain in landed)
            return self._gain([draw for draw, _ in landed], gains, flight)
        try:
            with self.runner.sampling_threads():
                return self._use(flight)
        except BaseException:
            self._roll_back(flight.work)
            raise

    def _use(self, flight: Flight) -> list[RequestOutput]:
        """Commit what a step computed and draw from its logits on the host."""
        outputs: list[RequestOutput] = []
        line = 0
        for item in flight.work:
            line += item.num_logits
            if item.seq.ended:
                continue
            if item.num_logits and item.seq.request.next_row is not None:
                try:
                    item.seq.request.read(flight.logits[line - item.num_logits : line])
                except ValueError as error:  # not a number: this request's trouble alone
                    item.seq.request.error = str(error)
                    self._finish(item.seq, "error")
                    outputs.append(self._close(item.seq.request))
                    continue
            if not item.reaches_end:
                assert item.seq.cache is not None
                self.cache.commit(item.seq.cache, item.num_known, item.token_ids)
        draws = [draw for draw in flight.draws if not draw.item.seq.ended]
        if not draws:
            return outputs
        lines = [
            draw.line + offset
            for draw in draws
            for _ in draw.samples
            for offset in range(1 + len(draw.item.draft.tokens))
        ]
        rows = [seq.sampling for draw in draws for seq in draw.samples]
        drafts = [draw.item.draft for draw in draws for _ in draw.samples]
        accepted = self._acceptor.accept(_select(flight.logits, lines), rows, drafts)
        return outputs + self._gain(draws, iter(accepted), flight)

    def _samples(self, seq: Sequence) -> list[Sequence]:
        """The sequences that draw from this sequence's logits: itself and, once, its forks."""
        request = seq.request
        if seq.forked or request.params.n == 1:
            return [seq]
        return [seq, *(self._sequence(request, i) for i in range(1, request.params.n))]

    def _gain(
        self, draws: list[Draw], accepted: Iterator[Accepted], flight: Flight
    ) -> list[RequestOutput]:
        """Give each sample its tokens; commit to the cache what they leave of a draft."""
        outputs = []
        newest = flight.number == self._newest
        features = self.runner.backend.features() if newest else None
        for draw in draws:
            item, seq, request = draw.item, draw.item.seq, draw.item.seq.request
            if request.metrics.first_token is None:
                request.metrics.first_token = time.monotonic()
                request.metrics.reused_prompt_tokens = seq.num_reused
            found = [next(accepted) for _ in draw.samples]
            gains = [self._advance(sample, gain) for sample, gain in zip(draw.samples, found)]
            kept = item.num_known + len(gains[0][1]) - 1
            if self.scheduler.proposer is not None:
                for gain in found:
                    stood = len(gain.tokens) - (gain.error is None)
                    self.speculation.count(len(item.draft.tokens), stood)
                    self.lengths.count(item, stood)
            if features is not None and len(draw.samples) == 1:
                self._features[seq] = features[draw.row : draw.row + kept]
            if flight.deferred is None:
                assert seq.cache is not None
                self.cache.commit(seq.cache, kept, item.token_ids[:kept])
                for fork in draw.samples[1:]:
                    fork.cache = self.cache.fork(seq.cache)
                    request.sequences.append(fork)
                    self.scheduler.start_running(fork)
            seq.forked = True
            for sample in draw.samples:
                if sample.ended:
                    self.scheduler.remove(sample)
            delta, tokens = gains[0] if seq.index == 0 else ("", [])
            if request.finished:
                outputs.append(self._close(request, delta=delta, new_token_ids=tokens))
            else:
                outputs.append(request.output(False, delta=delta, new_token_ids=tokens))
        return outputs

    def _advance(self, seq: Sequence, gain: Accepted) -> tuple[str, list[int]]:
        """Add drawn tokens up to the one that ends the sequence: new text and tokens."""
        delta, tokens = "", []
        for token, logprob in zip(gain.tokens, gain.logprobs):
            seq.tokens.append(token)
            seq.sampling.commit((token,))
            tokens.append(token)
            if seq.logprobs is not None and logprob is not None:
                seq.logprobs.append(logprob)
            text, reason = seq.output.push(token)
            if reason is None and len(seq.tokens) - seq.num_prompt == seq.request.max_tokens:
                reason = "length"
            if reason is not None:
                text += seq.output.finish(reason)
                seq.finish_reason = reason
            delta += text
            if reason is not None:
                break
        if gain.error is not None and not seq.ended:
            seq.request.error = gain.error
            seq.finish_reason = "error"
        seq.text += delta
        return delta, tokens

    def _finish(self, seq: Sequence, reason: FinishReason) -> None:
        seq.text += seq.output.finish(reason)
        seq.finish_reason = reason
        self.scheduler.remove(seq)

    def _close(
        self, request: Request, *, delta: str = "", new_token_ids: list[int] | None = None
    ) -> RequestOutput:
        del self._requests[request.request_id]
        request.metrics.finished = time.monotonic()
        return request.output(True, delta=delta, new_token_ids=new_token_ids)

    # ---- scoring --------------------------------------------------------------------------

    def score(self, token_ids: Seq[int]) -> np.ndarray:
        """Log-probabilities (float64 [T - 1], nats) of ``token_ids[1:]``, each given its past.

        Reuses no prefix. Raises ``RequestError`` when the text does not fit or the model gives one
        of its tokens no finite log-probability.
        """
        return self.score_batch([token_ids], [0])[0].logprobs

    def score_batch(self, prompts: Seq[Seq[int]], starts: Seq[int]) -> list[Scores]:
        """Scores of the tokens after position ``starts[i]`` of each prompt, batched.

        What comes before a start may be taken from the prefix cache. Raises like ``score``.
        """
        readers: list[ScoreTokens] = []
        for index, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
            if not 0 <= start < max(1, len(prompt)):
                raise RequestError(f"starts[{index}]: {start} is outside of its prompt")
            readers.append(ScoreTokens(list(prompt), start))
        params = [SamplingParams(max_tokens=1, temperature=0.0)] * len(readers)
        for out in self._serve([list(prompt) for prompt in prompts], params, readers):
            if out.error is not None:
                raise RequestError(f"prompt: {out.error}")
        return [reader.scores() for reader in readers]

    def logits(self, token_ids: Seq[int]) -> Iterator[Tensor]:
        """Logits (float32 [k, V]) of the rows that predict ``token_ids[1:]``, a few rows at a time
        as steps compute them. Reuses no prefix. Raises ``RequestError`` when it does not fit."""
        reader = KeepLogits()
        params = SamplingParams(max_tokens=1, temperature=0.0)
        request_id = self.add_request(list(token_ids), params, reader=reader)
        request = self._requests[request_id]
        try:
            while request_id in self._requests:
                self._pending = self.step()
                yield from reader.take()
            yield from reader.take()  # of steps that somebody else asked for
            if request.error is not None:
                raise RequestError(f"prompt: {request.error}")
        finally:
            self._discard(request_id)

    def _sequence(self, request: Request, index: int) -> Sequence:
        tokenizer = self.tokenizer
        encode = None if tokenizer is None else tokenizer.encode_plain
        eos_ids = self.spec.eos_token_ids if tokenizer is None else tokenizer.eos_ids
        sampling = RowState(
            request.params,
            vocab_size=self.spec.vocab_size,
            prompt_ids=request.prompt_ids,
            eos_ids=eos_ids,
            bad_words=resolve_bad_words(request.params.bad_words, encode),
            sample_index=index,
        )
        stream = None if tokenizer is None else tokenizer.detokenizer(continues=True)
        output = StopChecker(request.params, eos_ids=eos_ids, stream=stream)
        return Sequence(request, index, sampling, output)


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """A step makes thousands of objects that end with it. Going through those that live on each
    time some hundreds more are there would take as long as the rest of the step does."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _select(logits: Tensor, lines: list[int]) -> Tensor:
    if lines == list(range(logits.shape[0])):
        return logits
    return logits[torch.tensor(lines, device=logits.device)]
