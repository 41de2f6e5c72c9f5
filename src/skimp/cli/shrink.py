"""``skimp shrink``: a checkpoint in, a cheaper one out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skimp.cli import options as opt

if TYPE_CHECKING:
    from torch import Tensor

    from skimp.shrink.pipeline import Job, Outcome
    from skimp.shrink.plan import Plan


def shrink(
    model: opt.ModelArgument,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="A YAML list of steps.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="OUT", help="Directory to make.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done, and touch nothing.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what an unfinished run left, and begin.")
    ] = False,
    threads: opt.Threads = None,
    json_output: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Make a cheaper checkpoint by a recipe.

    The model goes through memory a few layers at a time, but for heal, which has it whole. A run
    that is stopped goes on where it was when the same command is given again, and ends with the
    same files, bit for bit.

    \b
    Examples:
      skimp shrink tales recipes/int8.yaml -o tales-int8
      skimp shrink tales recipes/int4-gptq.yaml --dry-run
    """
    from skimp.cli.output import note, print_json, telling_bar
    from skimp.model.locate import locate_model
    from skimp.shrink.recipe import load_recipe

    if output is None and not dry_run:
        raise ValueError("OUT: missing; name the directory to make with -o, or give --dry-run")
    if threads is not None and not 1 <= threads <= 1 << 10:
        raise ValueError(f"threads: between 1 and 1024, not {threads}")
    loaded = load_recipe(recipe)

    import torch

    from skimp.shrink import pipeline
    from skimp.shrink.plan import plan_job

    if threads is not None:
        torch.set_num_threads(threads)
    job = pipeline.prepare(locate_model(model), loaded)
    tokens, warnings = _calibration(job)
    plan = plan_job(job, 0 if tokens is None else tokens.numel())
    if dry_run:
        if json_output:
            print_json({"model": model, "recipe": recipe.name, **_plan_dict(plan, warnings)})
        else:
            _print_plan(model, recipe.name, plan, warnings)
        return
    assert output is not None
    if not quiet:
        for line in warnings:
            note(f"skimp: warning: {line}")
    try:
        with telling_bar(", ".join(s.kind for s in loaded.steps), not quiet) as (bar, tell):
            outcome = pipeline.shrink(
                job, output, tokens=tokens, restart=restart, progress=bar, tell=tell
            )
    except KeyboardInterrupt:
        note("skimp: stopped; the same command goes on from here")
        raise
    found = _outcome_dict(model, outcome, plan, warnings)
    if json_output:
        print_json(found)
    else:
        _print_outcome(found, plan)


def _calibration(job: Job) -> tuple[Tensor | None, list[str]]:
    """The calibration tokens if any step wants them, and what the user should know of them."""
    if not job.calibrated:
        wanted = job.recipe.calibration
        unused = wanted.text or wanted.chat
        return None, [f"calibration: {unused} is not used: no step measures"] if unused else []
    from skimp.shrink.text import chat_warning, load_samples
    from skimp.text import Tokenizer

    tokenizer = Tokenizer.load(job.directory)
    settings, seed = job.recipe.calibration, job.recipe.seed
    tokens = load_samples(settings, tokenizer, seed, job.specs[0].vocab_size)
    warning = chat_warning(settings, tokenizer)
    return tokens, [] if warning is None else [warning]


def _plan_dict(plan: Plan, warnings: list[str]) -> dict[str, Any]:
    from skimp.cli.output import json_ready

    value: dict[str, Any] = json_ready(plan)
    return {"predicted": True, **value, "warnings": warnings}


def _print_plan(model: str, recipe: str, plan: Plan, warnings: list[str]) -> None:
    from skimp.cli.output import bytes_text, print_table

    columns = ["", "lossy", "bits/weight", "on disk", "weights/token", "cache/token", "assuming"]
    rows = []
    entries = [("as it is", "", plan.before)]
    for step in plan.steps:
        entries.append((step.kind, "yes" if step.lossy else "exact", step.after))
    for name, lossy, size in entries:
        formats = ", ".join(f"{count} x {form}" for form, count in sorted(size.formats.items()))
        most = "<= " if size.at_most else ""
        rows.append(
            [
                name,
                lossy,
                f"{most}{size.bits_per_weight:.2f}",
                most + bytes_text(size.disk_bytes),
                most + bytes_text(size.weight_bytes_per_token),
                bytes_text(size.cache_bytes_per_token),
                f"{formats}; cache {size.cache_format}",
            ]
        )
    print_table(f"PREDICTED, nothing touched: {model} by {recipe}\n", columns, rows)
    passes = sum(step.passes for step in plan.steps)
    measured = [step.kind for step in plan.steps if step.calibration]
    text = (
        f"{plan.calibration_tokens:,} calibration tokens, for {', '.join(measured)}"
        if measured
        else "no calibration"
    )
    print(
        f"\nTakes {passes} passes over the model, {text}, about {bytes_text(plan.memory_bytes)} "
        f"of memory beside Python and PyTorch, and {bytes_text(plan.disk_bytes)} of disk."
        "\nTime and accuracy are not predicted: they have to be measured."
    )
    for step in (step for step in plan.steps if step.work):
        print(f"{step.kind} {step.work}.")
    for step in (step for step in plan.steps if step.choices):
        print(
            f"Which matrix gets which of {step.choices} is not known yet: {step.kind} first "
            "measures the harm of each. The sizes are those of a budget spent to the last bit."
        )
    for line in warnings:
        print(f"warning: {line}")


def _outcome_dict(model: str, outcome: Outcome, plan: Plan, warnings: list[str]) -> dict[str, Any]:
    from skimp.shrink.plan import size_of

    size = sum(p.stat().st_size for p in outcome.output.iterdir() if p.suffix == ".safetensors")
    after = size_of(outcome.spec)
    return {
        "model": model,
        "output": str(outcome.output),
        "disk_bytes": size,
        "weight_bytes_per_token": after.weight_bytes_per_token,
        "cache_bytes_per_token": after.cache_bytes_per_token,
        "bits_per_weight": after.bits_per_weight,
        "formats": after.formats,
        "units": outcome.visits,
        "units_resumed": outcome.resumed,
        "notes": list(outcome.notes),
        "curves": [list(curve) for curve in outcome.curves],
        "warnings": warnings,
    }


def _print_outcome(found: dict[str, Any], plan: Plan) -> None:
    from skimp.cli.output import bytes_text

    before = plan.before
    resumed = found["units_resumed"]
    again = f"; {resumed} of {found['units']} units were there from before" if resumed else ""
    print(
        f"{found['output']}: {bytes_text(found['disk_bytes'])} on disk "
        f"(from {bytes_text(before.disk_bytes)}), {found['bits_per_weight']:.2f} bits a weight, "
        f"{bytes_text(found['weight_bytes_per_token'])} of weights a token (from "
        f"{bytes_text(before.weight_bytes_per_token)}), "
        f"{bytes_text(found['cache_bytes_per_token'])} of cache a token (from "
        f"{bytes_text(before.cache_bytes_per_token)}){again}"
    )
    for line in found["notes"]:
        print(f"note: {line}")
