"""``skimp draft``: what guesses for a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skimp.cli import options as opt

if TYPE_CHECKING:
    from skimp.draft.train import Outcome

app = typer.Typer(
    help="Make what guesses for a model.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)


@app.callback()
def _group() -> None:
    """Without this, typer would take the only command for the group itself."""


@app.command()
def train(
    model: opt.ModelArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="Directory to make.")
    ],
    tokens: Annotated[
        str, typer.Option(help="How many to learn from, e.g. 500k or 20m.", metavar="N")
    ],
    minutes: Annotated[
        float | None,
        typer.Option(
            help="End by then, if the tokens take longer.", metavar="N", show_default=False
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help='A file (plain, or .jsonl with "text"), or self: what the model itself writes; '
            "the text that comes with skimp by default.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    self_tokens: Annotated[
        str | None,
        typer.Option(
            help="With --text self: how much the model writes; --tokens, at most 1m, by default.",
            metavar="N",
            show_default=False,
        ),
    ] = None,
    loss: Annotated[str, typer.Option(help="lk, ce, tv or mix.", metavar="NAME")] = "lk",
    unroll: Annotated[
        int, typer.Option(help="Guesses ahead that the head learns to make.", metavar="N")
    ] = 5,
    decay: Annotated[
        float, typer.Option(help="What a guess one further ahead weighs.", metavar="X")
    ] = 0.8,
    vocabulary: Annotated[
        str | None,
        typer.Option(
            help="Guess the N most frequent words of the text only; all by default.",
            metavar="N",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Read the stream where it enters these layers; 2, the middle and the last but two "
            "by default.",
            metavar="A,B,C",
            show_default=False,
        ),
    ] = None,
    heads: Annotated[
        int | None, typer.Option(help="The model's by default.", metavar="N", show_default=False)
    ] = None,
    kv_heads: Annotated[
        int | None, typer.Option(help="The model's by default.", metavar="N", show_default=False)
    ] = None,
    ffn: Annotated[
        int | None,
        typer.Option(
            help="Width of the feed-forward network; the model's by default.",
            metavar="N",
            show_default=False,
        ),
    ] = None,
    length: Annotated[
        int, typer.Option(help="Longest piece of a document.", metavar="TOKENS")
    ] = 512,
    batch: Annotated[
        str, typer.Option(help="Tokens of an optimiser step.", metavar="TOKENS")
    ] = "4096",
    lr: Annotated[float, typer.Option(help="Highest learning rate.", metavar="X")] = 6e-4,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Tokens of the text to measure on; a twentieth, at most 16k, by default.",
            metavar="N",
            show_default=False,
        ),
    ] = None,
    device: opt.Device = "cpu",
    dtype: Annotated[
        str,
        typer.Option(
            help="To compute in: auto (float32 on cpu, bfloat16 on cuda), float32 or bfloat16.",
            metavar="NAME",
        ),
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of all that is drawn.", metavar="N")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the head that OUT holds.")
    ] = False,
    threads: opt.Threads = None,
    json_output: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Train a head that guesses on from what a model computed (EAGLE-3).

    The head is a layer that reads the model's own features. It is written in the layout that
    SpecForge, vLLM and SGLang have for it.

    \b
    Examples:
      skimp draft train tales -o tales-head --tokens 500k --lr 2e-3
      skimp draft train MODEL -o HEAD --text talks.jsonl --tokens 50m --vocabulary 32k --device cuda
    """
    from skimp.cli.output import note, print_json, progress_bar
    from skimp.draft.options import TrainOptions
    from skimp.model.locate import locate_model

    def count(value: str | None, field: str) -> int | None:
        return None if value is None else opt.parse_count(value, field)

    if threads is not None and not 1 <= threads <= 1 << 10:
        raise ValueError(f"threads: between 1 and 1024, not {threads}")
    options = TrainOptions(
        tokens=opt.parse_count(tokens, "tokens"),
        loss=loss,  # type: ignore[arg-type]
        unroll=unroll,
        decay=decay,
        vocabulary=count(vocabulary, "vocabulary"),
        heads=heads,
        kv_heads=kv_heads,
        ffn=ffn,
        layers=None if layers is None else _layers(layers),
        length=length,
        batch=opt.parse_count(batch, "batch"),
        lr=lr,
        held_out=count(held_out, "held_out"),
        self_tokens=count(self_tokens, "self_tokens"),
        minutes=minutes,
        device=device,  # type: ignore[arg-type]
        dtype=dtype,  # type: ignore[arg-type]
        seed=seed,
    )

    import torch

    from skimp.draft.train import train_head

    if threads is not None:
        torch.set_num_threads(threads)
    with progress_bar("draft train", not quiet) as bar:
        outcome = train_head(
            locate_model(model),
            output,
            options,
            text=text,
            overwrite=overwrite,
            progress=bar,
            tell=(lambda line: None) if quiet else (lambda line: note(f"skimp: {line}")),
        )
    found = _outcome_dict(model, outcome)
    if json_output:
        print_json(found)
    else:
        _print_outcome(found)


def _layers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and len(part) < 10 for part in parts):
        raise ValueError(f"layers: {text!r} is not a list of layers such as 2,4,5")
    return tuple(int(part) for part in parts)


def _outcome_dict(model: str, outcome: Outcome) -> dict[str, Any]:
    from skimp.cli.output import json_ready

    size = sum(path.stat().st_size for path in outcome.output.glob("*.safetensors"))
    spec = outcome.spec
    return {
        "model": model,
        "output": str(outcome.output),
        "disk_bytes": size,
        "parameters": outcome.parameters,
        "words": spec.draft_vocab_size,
        "vocabulary": spec.vocab_size,
        "covered": outcome.covered,
        "layers": list(spec.taps),
        "tokens": outcome.tokens,
        **json_ready(outcome.report),
        "curve": json_ready(outcome.curve),
    }


def _print_outcome(found: dict[str, Any]) -> None:
    from skimp.cli.output import bytes_text, percent, print_table

    print(
        f"{found['output']}: {found['parameters']:,} numbers, {bytes_text(found['disk_bytes'])}, "
        f"learned from {found['tokens']:,} tokens. It can guess {found['words']:,} of "
        f"{found['vocabulary']:,} words, {percent(found['covered'])} of the held-out text."
    )
    rows = [
        [str(ahead), f"{accepted:.3f}", f"{agreed:.3f}"]
        for ahead, (accepted, agreed) in enumerate(zip(found["accepted"], found["agreed"]), 1)
    ]
    print_table("", ["guess", "accepted, drawn at temperature 1", "the same, greedily"], rows)
    print(
        f"Chains of {len(rows)}: {found['drawn']:.2f} tokens a step drawn, "
        f"{found['greedy']:.2f} greedily, where the text goes on as written."
    )
