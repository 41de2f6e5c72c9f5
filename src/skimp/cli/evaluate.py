"""``skimp eval``: bits per byte of a text, and scores of tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from skimp.cli import options as opt
from skimp.cli import tasks as asking

if TYPE_CHECKING:
    from pathlib import Path

    from skimp.engine import Engine
    from skimp.meter.tasks import TaskResult

FEW_BLOCKS = 10  # a bootstrap over fewer passages says little


def evaluate(
    model: opt.ModelArgument,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            help="UTF-8 text file; the packaged one if no task is given either.",
            metavar="FILE",
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            help="Longest window of text; the model's context by default.", metavar="TOKENS"
        ),
    ] = None,
    max_bytes: Annotated[
        str | None,
        typer.Option(help="Score only the text's beginning, e.g. 200k.", metavar="BYTES"),
    ] = None,
    task: asking.Files = None,
    kind: asking.Kind = None,
    max_items: asking.MaxItems = None,
    shots: asking.Shots = None,
    max_tokens: asking.MaxTokens = None,
    template: asking.Template = None,
    stop: asking.Stop = None,
    chat: asking.Chat = False,
    seed: Annotated[int, typer.Option(help="Of items drawn and intervals.", metavar="N")] = 0,
    dtype: opt.DType = "auto",
    device: opt.Device = "cpu",
    threads: opt.Threads = None,
    backend: opt.Backend = "auto",
    cache_dtype: opt.CacheDType = "auto",
    json_output: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure bits per byte of a text, or what a model gets right.

    Bits per byte: lower is better, whatever the tokenizer. Documents are parted by lines that read
    <|endoftext|>; long ones are scored in windows that overlap by half. Tasks: minimal pairs
    (sentence_good, sentence_bad), multiple choice (context, options, label), last words (context,
    target), and answers that are a number (question, answer). Every score has a 95 % interval.

    \b
    Examples:
      skimp eval tales
      skimp eval ./model --text novel.txt --max-bytes 200k --json
      skimp eval ./model --task blimp.jsonl.xz --task gsm8k.jsonl --shots 4 --max-items 500
    """
    from skimp.cli.models import load_engine
    from skimp.cli.output import note, print_json, progress_bar
    from skimp.meter.quality import evaluate as run
    from skimp.meter.tasks import run_task
    from skimp.model.locate import locate_model

    if task and text is None:
        asking.refuse(
            "is of the text, but only tasks are given", context=context, max_bytes=max_bytes
        )
    asked = asking.read_tasks(
        task,
        seed=seed,
        kind=kind,
        max_items=max_items,
        shots=shots,
        max_tokens=max_tokens,
        template=template,
        stop=stop,
        chat=chat,
    )
    window = None if context is None else opt.parse_count(context, "context")
    limit = None if max_bytes is None else opt.parse_count(max_bytes, "max_bytes")
    options = opt.engine_options(
        dtype=dtype,
        device=device,
        threads=threads,
        backend=backend,
        max_batch=asking.BATCH if task else 2,
        cache_dtype=cache_dtype,
    )
    content = read_text(text) if text is not None or not task else None
    engine = load_engine(model, options)
    found: dict[str, Any] = {}
    shown = not (quiet or json_output)
    if content is not None:
        with progress_bar("scoring", shown) as progress:
            result = run(
                engine, content, context=window, max_bytes=limit, seed=seed, progress=progress
            )
        found = result.as_dict()
        _note_few(result.blocks)
        warning = calibration_warning(engine, locate_model(model), content, limit)
        if warning is not None:
            note(f"warning: {warning}")
        if not json_output:
            low, high = result.ci95
            print(
                f"{result.bits_per_byte:.4f} bits per byte "
                f"(95 % interval {low:.4f} to {high:.4f}; perplexity {result.perplexity:.4g}; "
                f"{result.tokens:,} tokens, {result.bytes:,} bytes, {result.documents:,} documents)"
            )
    results = []
    for one in asked.tasks:
        with progress_bar(one.name, shown) as progress:
            results.append(
                run_task(engine, one, generation=asked.generation, seed=seed, progress=progress)
            )
    if json_output:
        print_json(found | ({"tasks": [r.as_dict() for r in results]} if results else {}))
    elif results:
        _print_tasks(results)


def _note_few(blocks: int) -> None:
    from skimp.cli.output import note

    if blocks < FEW_BLOCKS:
        note(f"note: the text has only {blocks} passages to draw from, so its interval says little")


def _print_tasks(results: list[TaskResult]) -> None:
    from skimp.cli.output import note, print_table

    rows = []
    for result in results:
        for name, score in result.scores.items():
            low, high = score.ci95
            chance = "" if score.chance is None else f"{score.chance:.3f}"
            figures = [f"{score.value:.3f}", f"{low:.3f} to {high:.3f}", chance, f"{score.n:,}"]
            rows.append([f"{result.name}: {name}", *figures])
        for by in ("field", "linguistics_term"):
            for part, score in result.groups.get(by, {}).items():
                low, high = score.ci95
                figures = [f"{score.value:.3f}", f"{low:.3f} to {high:.3f}", f"{score.chance:.3f}"]
                rows.append([f"  {by} {part}", *figures, f"{score.n:,}"])
    print_table("", ["score", "value", "95 % interval", "chance", "items"], rows)
    for result in results:
        if result.cut:
            note(f"note: {result.name}: {result.cut} items lost the beginning of their context")
        if result.notes.get("unfinished"):
            note(
                f"note: {result.name}: {result.notes['unfinished']} of {result.n} answers ended at "
                f"max_tokens {result.notes['max_tokens']}"
            )


def calibration_warning(
    engine: Engine, directory: Path, text: str, max_bytes: int | None
) -> str | None:
    """A line if the model was calibrated on text unlike the one it is measured on."""
    from skimp.meter.quality import read_text
    from skimp.shrink.text import Imprint

    imprint = Imprint.read(directory)
    if imprint is None:
        return None
    reading = read_text(engine, text, context=engine.max_context - 1, max_bytes=max_bytes)
    return imprint.unlike([token for document in reading.documents for token in document.ids])


def read_text(name: str | None) -> str:
    """The text file, or the packaged text. Errors name the file."""
    from importlib import resources
    from pathlib import Path

    if name is None:
        packaged = resources.files("skimp") / "assets" / "text" / "evaluation.txt"
        if not packaged.is_file():
            raise ValueError("text: this installation has no evaluation text; name a file")
        return packaged.read_text(encoding="utf-8")
    try:
        return Path(name).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text: {name} is not UTF-8 at byte {error.start}") from None
