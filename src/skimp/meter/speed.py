"""Measures prefill and generation through the engine, and sets the prediction beside each figure.

A case is a batch and a context (``cases.py``). One round of it:

1. ``batch`` fresh prompts of ``context`` random tokens are answered with one token each: prefill.
2. The same prompts come again (the prefix tree makes their second prefill cheap; without one they
   are simply computed again). Once all are read, every sequence generates, steps are timed one by
   one, and the later half of them counts: a long answer reads what weights fit a processor's cache
   from there, and after other work they come back to it only within several steps.

Rounds of all cases, and of all engines that are compared, are interleaved, so that a slow minute
of a shared machine hits them alike.
Random prompts would flatter or ruin speculation, whose speed depends on the text
(``skimp.meter.speculation`` has real ones); here no token is drafted and the time of a step does
not depend on which tokens it reads.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from skimp.cost import Hardware, ModelWork, SequenceStep, StepCost, predict, step_cost
from skimp.meter.cases import SPARE_TOKENS, Case, check_case
from skimp.meter.work import engine_threads

if TYPE_CHECKING:
    from skimp.decoding.params import SamplingParams
    from skimp.engine import Engine


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of one case, in seconds; ``contexts`` are those half-way through ``step_s``."""

    prefill_s: float
    step_s: tuple[float, ...]
    contexts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SpeedResult:
    """A case's figures over its rounds. ``spread`` is (slowest - fastest) / median of rounds."""

    case: Case
    device: str
    dtype: str
    backend: str
    threads: int
    hardware: str
    ms_per_step: float
    spread: float
    prefill_tokens_per_s: float
    prefill_spread: float
    prefill_of_peak: float  # operations a second over the best measured rate of products
    rounds: int
    samples: int
    contexts: tuple[int, ...]
    round_ms: tuple[float, ...]
    first_token_ms: float  # until every prompt of the batch has its first token
    cache_bytes_held: int  # pages that all sequences hold with their last tokens
    bytes_per_step: float
    bandwidth_gb_s: float
    limit_ms: float
    predicted_ms: float
    predicted_prefill_tokens_per_s: float
    bound: str

    @property
    def steps(self) -> int:
        """Timed in a round."""
        return self.samples // self.rounds

    @property
    def tokens_per_s(self) -> float:
        return self.case.batch / self.ms_per_step * 1e3

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``; ``bandwidth_gb_s`` is what the limit divides by, ``achieved_gb_s`` what
        the steps moved."""
        return {
            "batch": self.case.batch,
            "context": self.case.context,
            "asked_batch": self.case.asked_batch,
            "batch_limited_by": self.case.limited_by,
            "device": self.device,
            "dtype": self.dtype,
            "ms_per_step": self.ms_per_step,
            "tokens_per_s": self.tokens_per_s,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "cache_bytes_held": self.cache_bytes_held,
            "bytes_per_step": round(self.bytes_per_step),
            "bandwidth_gb_s": self.bandwidth_gb_s,
            "limit_ms": self.limit_ms,
            "fraction_of_limit": self.limit_ms / self.ms_per_step,
            "predicted_ms": self.predicted_ms,
            "predicted_prefill_tokens_per_s": self.predicted_prefill_tokens_per_s,
            "achieved_gb_s": self.bytes_per_step / self.ms_per_step / 1e6,
            "bound": self.bound,
            "first_token_ms": self.first_token_ms,
            "spread": self.spread,
            "prefill_spread": self.prefill_spread,
            "prefill_of_peak": self.prefill_of_peak,
            "rounds": self.rounds,
            "samples": self.samples,
            "new_tokens": self.case.new_tokens,
            "mean_context": statistics.fmean(self.contexts),
            "backend": self.backend,
            "threads": self.threads,
            "hardware": self.hardware,
        }


def bench(
    engine: Engine,
    cases: Sequence[Case],
    hardware: Hardware,
    *,
    rounds: int = 5,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[SpeedResult]:
    """Times every case ``rounds`` times, after one round that does not count.

    Raises ValueError if a case does not fit the engine's context, batch or cache.
    """
    (found,) = bench_together(
        [engine], [cases], [hardware], rounds=rounds, seed=seed, progress=progress
    )
    return found


def bench_together(
    engines: Sequence[Engine],
    cases: Sequence[Sequence[Case]],
    hardware: Sequence[Hardware],
    *,
    rounds: int = 5,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[list[SpeedResult]]:
    """Like :func:`bench` for several engines, each case's rounds going through all of them, every
    other round in reverse. ``cases`` are each engine's own, as many for all: those at one place
    are held against each other, and may differ in their batch. ``hardware`` is one machine an
    engine: the machine as it uses it."""
    if rounds < 1:
        raise ValueError(f"rounds: at least 1, not {rounds}")
    if not cases[0]:
        raise ValueError("batch: no case to time")
    for engine, own in zip(engines, cases):
        for case in own:
            check_case(engine.cache.arena, engine.options, case, "the engine")
    rng = random.Random(seed)
    measured: list[list[list[Round]]] = [[[] for _ in own] for own in cases]
    order = list(range(len(engines)))
    for index in range(rounds + 1):
        for place, case in enumerate(cases[0]):
            if progress is not None:
                what = "warm-up" if index == 0 else f"round {index} of {rounds}"
                progress(f"batch {case.asked_batch}, context {case.context}: {what}")
            for which in order[::-1] if index % 2 else order:
                result = _round(engines[which], cases[which][place], rng)
                if index:
                    measured[which][place].append(result)
    return [
        [_result(engine, engine.work, machine, c, r) for c, r in zip(own, found)]
        for engine, own, machine, found in zip(engines, cases, hardware, measured)
    ]


def random_prompt(rng: random.Random, vocab_size: int, length: int) -> list[int]:
    """Ids drawn evenly, the first tenth of the vocabulary left out: special tokens live there."""
    low = min(vocab_size // 10, 256)
    return [rng.randrange(low, vocab_size) for _ in range(length)]


def _round(engine: Engine, case: Case, rng: random.Random) -> Round:
    prompts = [random_prompt(rng, engine.spec.vocab_size, case.context) for _ in range(case.batch)]
    prefill_s = time_prefill(engine, prompts)
    step_s, contexts = time_generation(engine, prompts, case.new_tokens)
    return Round(prefill_s=prefill_s, step_s=step_s, contexts=contexts)


def time_prefill(engine: Engine, prompts: Sequence[list[int]]) -> float:
    """Seconds to answer each prompt with one token."""
    from skimp.decoding.params import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    start = time.perf_counter()
    engine.generate(list(prompts), params)
    return time.perf_counter() - start


def time_generation(
    engine: Engine, prompts: Sequence[list[int]], steps: int
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Seconds of each of the later half of ``steps`` steps in which every prompt gains a token,
    and the contexts half-way through that half. No sequence generates before all prompts are read,
    so that none outgrows the others. Raises ValueError if the engine's context ends before."""
    from skimp.decoding.params import SamplingParams

    # More than are timed, so that none ends before.
    room = engine.max_context - max(map(len, prompts))
    tokens = max(1, min(steps + SPARE_TOKENS, room))
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    times: list[float] = []
    early = steps // 2
    middle: tuple[int, ...] = ()
    with requests(engine, prompts, params) as ids:
        lengths = dict.fromkeys(ids, 0)
        while len(times) < steps:
            generating = all(lengths.values())
            start = time.perf_counter()
            outputs = engine.step()
            took = time.perf_counter() - start
            for output in outputs:
                if output.request_id not in lengths:
                    continue
                lengths[output.request_id] = len(output.outputs[0].token_ids)
                if output.finished and len(times) + generating < steps:
                    raise ValueError(
                        f"context: {len(prompts[0])} and {steps} new tokens do not fit the "
                        f"engine's {engine.max_context}"
                    )
            if not generating and max(lengths.values()) > 1:  # no other prompt can go on
                raise ValueError(
                    f"batch: {len(prompts)} sequences of {len(prompts[0])} tokens do not fit the "
                    f"engine's {engine.cache.arena.budget_bytes:,} cache bytes at once"
                )
            if generating:
                times.append(took)
                if len(times) == early + (steps - early + 1) // 2:
                    middle = tuple(len(p) + n for p, n in zip(prompts, lengths.values()))
    return tuple(times[early:]), middle


@contextmanager
def requests(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> Iterator[list[str]]:
    """Requests, by their ids, of which none generates while a prompt can go on. They end with the
    block, whatever became of them."""
    ids = [engine.add_request(list(prompt), params) for prompt in prompts]
    engine.scheduler.prompts_first = True
    try:
        yield ids
    finally:
        engine.scheduler.prompts_first = False
        for request_id in ids:
            engine.abort(request_id)
        while engine.has_unfinished():  # hands out what the aborts left
            engine.step()


def _result(
    engine: Engine, work: ModelWork, hardware: Hardware, case: Case, rounds: list[Round]
) -> SpeedResult:
    medians = [statistics.median(r.step_s) * 1e3 for r in rounds]
    ms = statistics.median(medians)
    prefill = [case.batch * case.context / r.prefill_s for r in rounds]
    contexts = rounds[0].contexts
    cost = step_cost(work, [SequenceStep(context=c) for c in contexts])
    time_ = predict(cost, hardware)
    budget, layout = engine.options.step_tokens, engine.cache.layout
    prefill_s = predict_prefill(work, hardware, case, budget)
    flops = sum(cost.flops for cost in prefill_costs(work, case, budget))
    peak = max(rate for _, rate in hardware.matrix_tflops[work.compute_dtype]) * 1e12
    return SpeedResult(
        case=case,
        device=engine.options.device,
        dtype=work.compute_dtype,
        backend=engine.backend_name,
        threads=engine_threads(engine),
        hardware=hardware.note,
        ms_per_step=ms,
        spread=(max(medians) - min(medians)) / ms,
        prefill_tokens_per_s=statistics.median(prefill),
        prefill_of_peak=flops / statistics.median(r.prefill_s for r in rounds) / peak,
        prefill_spread=(max(prefill) - min(prefill)) / statistics.median(prefill),
        rounds=len(rounds),
        samples=sum(len(r.step_s) for r in rounds),
        contexts=contexts,
        round_ms=tuple(medians),
        first_token_ms=statistics.median(r.prefill_s for r in rounds) * 1e3,
        cache_bytes_held=case.batch * layout.bytes_held(case.context + case.new_tokens),
        bytes_per_step=cost.bytes_read,
        bandwidth_gb_s=hardware.limit_bandwidth(cost),
        limit_ms=hardware.limit_s(cost) * 1e3,
        predicted_ms=time_.seconds * 1e3,
        predicted_prefill_tokens_per_s=case.batch * case.context / prefill_s,
        bound=time_.bound,
    )


def predict_prefill(work: ModelWork, hardware: Hardware, case: Case, token_budget: int) -> float:
    """Seconds to prefill a case in steps of at most ``token_budget`` tokens, prompts in order."""
    return sum(predict(cost, hardware).seconds for cost in prefill_costs(work, case, token_budget))


def prefill_costs(work: ModelWork, case: Case, token_budget: int) -> Iterator[StepCost]:
    """What each step of a case's prefill computes and reads."""
    room = token_budget
    step: list[SequenceStep] = []
    for _ in range(case.batch):
        done = 0
        while done < case.context:
            count = min(room, case.context - done)
            done += count
            room -= count
            last = int(done == case.context)
            step.append(SequenceStep(context=done, tokens=count, logits=last))
            if not room:
                yield step_cost(work, step)
                step, room = [], token_budget
    if step:
        yield step_cost(work, step)
