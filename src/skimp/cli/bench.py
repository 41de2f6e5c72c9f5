"""``skimp bench``: speed by batch and context, beside its limit and its prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from skimp.cli import options as opt

if TYPE_CHECKING:
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
        int, typer.Option(help="Steps a round, of which the later half is timed.", metavar="N")
    ] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds, all cases in turn.", metavar="N")] = 5,
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
    """Time prefill and generation on random prompts.

    Figures are medians over rounds, with the spread between the slowest and the fastest round.
    The limit is (weight bytes + cache bytes read a step) / measured bandwidth of the memory, or of
    the cache if the model fits in one; the peak of a prefill the best measured rate of products.

    \b
    Examples:
      skimp bench tales --batch 1,8,32 --context 128,1k
      skimp bench tales --batch max --cache-bytes 256m --context 128,1k
      skimp bench --random-weights config.json --dtype bfloat16 --threads 2 --json
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
