"""``skimp bench``: speed by batch and context, beside its limit and its prediction."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skimp.cli import options as opt
from skimp.cli import speculation as guesses
from skimp.cli.tasks import refuse

if TYPE_CHECKING:
    from skimp.engine.options import EngineOptions
    from skimp.meter.speed import SpeedResult


def bench(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="Directory, Hub id or embedded model."),
    ] = None,
    batch: opt.Batches = None,
    context: Annotated[
        list[str] | None,
        typer.Option(
            help="Tokens before generation; 128,1k or repeated.", metavar="N", show_default="128"
        ),
    ] = None,
    cache_bytes: opt.CacheBytes = None,
    new_tokens: Annotated[
        int,
        typer.Option(
            help="Steps a round, of which the later half is timed; with --speculate the tokens of "
            "an answer.",
            metavar="N",
        ),
    ] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds, all cases in turn.", metavar="N")] = 5,
    speculate: Annotated[
        list[str] | None,
        typer.Option(
            help="Time guesses on real prompts instead: lookup, suffix, draft or head; repeatable.",
            metavar="NAME[,NAME...]",
            show_default=False,
        ),
    ] = None,
    draft_model: opt.DraftModel = None,
    draft_tokens: opt.DraftTokens = None,
    draft_rule: opt.DraftRule = None,
    draft_control: Annotated[
        bool | None,
        typer.Option(
            help="With --speculate: as many guesses as are worth it, or always the most.",
            show_default="as many as are worth it",
        ),
    ] = None,
    prompts: guesses.Files = None,
    category: guesses.Categories = None,
    max_prompts: guesses.MaxPrompts = None,
    temperature: guesses.Temperatures = None,
    random_weights: Annotated[
        str | None,
        typer.Option(
            help="Time random weights of this config.json's shape instead of MODEL.",
            metavar="CONFIG.json",
            show_default=False,
        ),
    ] = None,
    dtype: opt.DType = "auto",
    device: opt.Device = "cpu",
    threads: opt.Threads = None,
    backend: opt.Backend = "auto",
    cache_dtype: opt.CacheDType = "auto",
    token_budget: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of one step.", metavar="N", show_default="512, on a GPU 8192"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of prompts and random weights.", metavar="N")] = 0,
    json_output: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Time prefill and generation on random prompts, or guesses on real ones.

    Figures are medians over rounds, with the spread between the slowest and the fastest round.
    The limit is (weight bytes + cache bytes read a step) / measured bandwidth of the memory, or of
    the cache if the model fits in one; the peak of a prefill the best measured rate of products.
    What guesses gain depends on the text: --speculate asks prompts by category, at temperatures 0
    and 1, and says how many guesses stand, what each costs, and the gain, predicted and achieved.

    \b
    Examples:
      skimp bench tales --batch 1,8,32 --context 128,1k
      skimp bench tales --batch max --cache-bytes 256m --context 128,1k
      skimp bench --random-weights config.json --dtype bfloat16 --threads 2 --json
      skimp bench tales --speculate lookup,draft --draft-model tales-draft --batch 1,8
      skimp bench ./model --speculate suffix --prompts spec_bench.jsonl --category qa,rag
    """
    from skimp.cli.models import load_engine, model_spec, random_engine
    from skimp.cli.output import note, print_json, progress_text
    from skimp.cost.machine import busy_note
    from skimp.meter.calibrate import engine_hardware
    from skimp.meter.cases import plan_cases
    from skimp.meter.speed import bench as run

    if (model is None) == (random_weights is None):
        raise ValueError("MODEL: name a model, or a shape with --random-weights, not both")
    batches = opt.parse_batches(batch or ["1"])
    contexts = opt.parse_counts(context or ["128"], "context")
    if rounds < 1:
        raise ValueError(f"rounds: at least 1, not {rounds}")
    if token_budget is not None and token_budget < 1:
        raise ValueError(f"token_budget: at least 1, not {token_budget}")
    if speculate is None:
        refuse(
            "needs --speculate",
            draft_model=draft_model,
            draft_tokens=draft_tokens,
            draft_rule=draft_rule,
            draft_control=draft_control,
            prompts=prompts,
            category=category,
            max_prompts=max_prompts,
            temperature=temperature,
        )
    else:
        if model is None:
            raise ValueError("random_weights: guesses are measured on text, so name a MODEL")
        refuse("real prompts have lengths of their own", context=context)
        if None in batches:
            raise ValueError("batch: max is of random prompts, and guesses need real ones")
        asked = guesses.read_asked(
            prompts,
            categories=category,
            max_prompts=max_prompts,
            temperatures=temperature,
            batches=batches,
            new_tokens=new_tokens,
            rounds=rounds,
            seed=seed,
        )
        options = opt.engine_options(
            dtype=dtype,
            device=device,
            threads=threads,
            backend=backend,
            cache_dtype=cache_dtype,
            token_budget=token_budget,
            cache_bytes=opt.parse_bytes(cache_bytes),
            max_batch=max(2, *asked.batches),
        )
        methods = guessing(
            model,
            options,
            speculate,
            lengths={"draft_tokens": draft_tokens, "draft_control": draft_control},
            by_model={"draft_model": draft_model, "draft_rule": draft_rule},
        )
        _bench_guesses(model, options, methods, asked, json_output=json_output, quiet=quiet)
        return
    name = str(model if random_weights is None else random_weights)
    spec = model_spec(name)
    limit = spec.max_positions
    if max(contexts) + new_tokens + 1 > limit:
        raise ValueError(
            f"context: {max(contexts)} and {new_tokens} new tokens do not fit the model's "
            f"{limit} positions"
        )
    options = opt.engine_options(
        dtype=dtype,
        device=device,
        threads=threads,
        backend=backend,
        cache_dtype=cache_dtype,
        token_budget=token_budget,
        cache_bytes=opt.parse_bytes(cache_bytes),
        max_context=min(max(contexts) + new_tokens + 8, limit),
    )
    cases, options = plan_cases(spec, options, batches, contexts, new_tokens, name=name)
    with progress_text(not (quiet or json_output)) as progress:
        progress("loading")
        engine = (
            random_engine(name, options, seed=seed)
            if random_weights is not None
            else load_engine(name, options)
        )
        progress("measuring the machine")
        hardware = engine_hardware(engine)
        results = run(engine, cases, hardware, rounds=rounds, seed=seed, progress=progress)
    if json_output:
        found = [r.as_dict() for r in results]
        print_json(found[0] if len(found) == 1 else {"results": found})
    else:
        _print(name, results, engine.cache.arena.budget_bytes)
    if (warning := busy_note()) is not None:
        note(f"note: {warning}")


def guessing(
    model: str,
    options: EngineOptions,
    listed: list[str],
    *,
    lengths: dict[str, int | None],
    by_model: dict[str, str | None],
) -> list[guesses.Guessing]:
    """``model`` once for each way to guess; ``by_model`` are options of draft models alone.
    ``OptionError`` names a wrong option."""
    from skimp.engine.options import BY_MODEL

    methods = list(dict.fromkeys(part.strip() for value in listed for part in value.split(",")))
    if "none" in methods:
        raise ValueError("speculate: none is what guesses are held against anyway")
    models = any(method in BY_MODEL for method in methods)
    found = []
    for method in methods:
        changes: dict[str, Any] = {"speculate": method, **lengths}
        if method in BY_MODEL or not models:  # refused where there is none to have it
            changes |= by_model
        chosen = replace(options, **changes)
        name = f"{method} {chosen.draft_model}" if method in BY_MODEL else method
        found.append(guesses.Guessing(name=name, model=model, options=chosen))
    return found


def _bench_guesses(
    model: str,
    options: EngineOptions,
    methods: list[guesses.Guessing],
    asked: guesses.Asked,
    *,
    json_output: bool,
    quiet: bool,
) -> None:
    from skimp.cli.output import note, print_json, progress_text
    from skimp.cost.machine import busy_note
    from skimp.meter.calibrate import engine_hardware
    from skimp.meter.report import text_of
    from skimp.meter.report.speculation import speculation_tables

    plain = guesses.Guessing(name=model, model=model, options=options)
    with progress_text(not (quiet or json_output)) as progress:
        found = guesses.measure(plain, methods, asked, engine_hardware, progress, note)
    if json_output:
        print_json({"speculation": [result.as_dict() for result in found]})
    else:
        print(text_of(speculation_tables(found)))
    if (warning := busy_note()) is not None:
        note(f"note: {warning}")


def _print(name: str, results: list[SpeedResult], cache_budget: int) -> None:
    from skimp.cli.output import bytes_text, percent, print_table, rate_text
    from skimp.meter.cases import CACHE_BYTES

    first = results[0]
    title = (
        f"{name}: {first.dtype}, {first.device} ({first.backend} kernels, {first.threads} threads)"
        f", {first.rounds} rounds of {first.steps} steps\n{first.hardware}"
    )
    limits = {r.case.label: r.case.limited_by for r in results if r.case.limited_by is not None}
    if limits:
        title += f"\nmax: as many sequences as {bytes_text(cache_budget)} of cache hold"
    for label, limit in limits.items():
        if limit != CACHE_BYTES:
            title += f"; {label}: no more because of {limit}"
    columns = [
        "batch x context", "tokens/s", "ms/step", "spread", "predicted", "limit", "of limit",
        "read/step", "bound by", "prefill tok/s", "spread", "of peak", "predicted",
    ]  # fmt: skip
    rows = [
        [
            r.case.label,
            rate_text(r.tokens_per_s),
            f"{r.ms_per_step:.3f}",
            percent(r.spread),
            f"{r.predicted_ms:.3f}",
            f"{r.limit_ms:.3f}",
            percent(r.limit_ms / r.ms_per_step),
            bytes_text(r.bytes_per_step),
            r.bound,
            rate_text(r.prefill_tokens_per_s),
            percent(r.prefill_spread),
            percent(r.prefill_of_peak),
            rate_text(r.predicted_prefill_tokens_per_s),
        ]
        for r in results
    ]
    print_table(title, columns, rows)
