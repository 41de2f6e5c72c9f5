"""``skimp eval``: bits per byte of a text."""

from __future__ import annotations

from typing import Annotated

import typer

from skimp.cli import options as opt

FEW_BLOCKS = 10  # a bootstrap over fewer passages says little


def evaluate(
    model: opt.ModelArgument,
    text: Annotated[
        str | None,
        typer.Option(
            "--text", help="UTF-8 text file; the packaged one by default.", metavar="FILE"
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(help="Longest window; the model's context by default.", metavar="TOKENS"),
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(help="Score only the beginning, e.g. 200k.", metavar="BYTES")
    ] = None,
    dtype: opt.DType = "auto",
    device: opt.Device = "cpu",
    threads: opt.Threads = None,
    backend: opt.Backend = "auto",
    json_output: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure bits per byte of a text.

    Lower is better, whatever the tokenizer; a 95 % interval comes with it. Documents are parted by
    lines that read <|endoftext|>. Long ones are scored in windows that overlap by half.

    \b
    Examples:
      skimp eval tales
      skimp eval ./model --text novel.txt --max-bytes 200k --json
    """
    from skimp.cli.models import load_engine
    from skimp.cli.output import note, print_json, progress_bar
    from skimp.meter.quality import evaluate as run

    window = None if context is None else opt.parse_count(context, "context")
    limit = None if max_bytes is None else opt.parse_count(max_bytes, "max_bytes")
    options = opt.engine_options(
        dtype=dtype, device=device, threads=threads, backend=backend, max_batch=2
    )
    content = read_text(text)
    engine = load_engine(model, options)
    with progress_bar("scoring", not (quiet or json_output)) as progress:
        result = run(engine, content, context=window, max_bytes=limit, progress=progress)
    if result.blocks < FEW_BLOCKS:
        note(
            f"note: the text has only {result.blocks} passages to draw from, so its interval says "
            "little"
        )
    if json_output:
        print_json(result.as_dict())
        return
    low, high = result.ci95
    print(
        f"{result.bits_per_byte:.4f} bits per byte "
        f"(95 % interval {low:.4f} to {high:.4f}; {result.tokens:,} tokens, "
        f"{result.bytes:,} bytes, {result.documents:,} documents)"
    )


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
