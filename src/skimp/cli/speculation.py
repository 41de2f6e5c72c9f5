"""The options that say on which prompts guesses are measured, and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from skimp.cli import options as opt

if TYPE_CHECKING:
    from skimp.cost import Hardware
    from skimp.engine import Engine
    from skimp.engine.options import EngineOptions
    from skimp.meter.speculation import Chosen, Prompt, SpeculationResult

Files = Annotated[
    list[str] | None,
    typer.Option(
        "--prompts",
        help="Real prompts to guess on: .jsonl with turns, question or prompt, or a text; "
        "repeatable; passages of the packaged text by default.",
        metavar="FILE",
        show_default=False,
    ),
]
Categories = Annotated[
    list[str] | None,
    typer.Option(
        "--category",
        help="Only these categories of prompts; repeatable.",
        metavar="NAME[,NAME...]",
        show_default=False,
    ),
]
MaxPrompts = Annotated[
    str | None,
    typer.Option(
        help="Prompts of a category, drawn by the seed; 8, or the batch if it is larger.",
        metavar="N",
        show_default=False,
    ),
]
Temperatures = Annotated[
    list[str] | None,
    typer.Option(
        "--temperature", help="Of the answers to them: 0,1; repeatable.", metavar="T[,T...]"
    ),
]
PROMPTS = 8
SLACK = 8  # positions beyond those that are known to be used


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Real prompts, and how they are to be answered."""

    prompts: tuple[Prompt, ...]
    categories: tuple[str, ...] | None
    each: int
    temperatures: tuple[float, ...]
    batches: tuple[int, ...]
    new_tokens: int
    rounds: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Guessing:
    """A model by the name its row shall have, and the engine it shall have."""

    name: str
    model: str
    options: EngineOptions


def read_asked(
    files: list[str] | None,
    *,
    categories: list[str] | None,
    max_prompts: str | None,
    temperatures: list[str] | None,
    batches: Sequence[int | None],
    new_tokens: int,
    rounds: int,
    seed: int,
) -> Asked:
    """What the options ask for. ValueError names one that is wrong or that no batch can have."""
    from skimp.cli.evaluate import read_text
    from skimp.meter.speculation import packaged_prompts, read_prompts

    sizes = tuple(batch for batch in batches if batch is not None)
    if not sizes:
        raise ValueError(
            "batch: max is of random prompts, and guesses are measured on real ones: name a "
            "number too"
        )
    each = PROMPTS if max_prompts is None else opt.parse_count(max_prompts, "max_prompts")
    if max_prompts is not None and each < max(sizes):
        raise ValueError(f"max_prompts: {each} fill no batch of {max(sizes)}")
    return Asked(
        prompts=tuple(packaged_prompts(read_text(None)) if files is None else read_prompts(files)),
        categories=None if categories is None else tuple(_names(categories)),
        each=max(each, *sizes),
        temperatures=_temperatures(temperatures),
        batches=sizes,
        new_tokens=new_tokens,
        rounds=rounds,
        seed=seed,
    )


def measure(
    plain: Guessing,
    guessing: Sequence[Guessing],
    asked: Asked,
    hardware: Callable[[Engine], Hardware],
    progress: Callable[[str], None],
    note: Callable[[str], None],
) -> list[SpeculationResult]:
    """Load a model with and without guesses, and answer the prompts in turn. ``note`` is told of
    prompts that were left out. Raises ValueError for what does not fit."""
    from skimp.cli.models import load_engine
    from skimp.meter.speculation import measure_speculation

    chosen, positions = choose(plain, guessing, asked)
    for line in chosen.left_out:
        note(f"note: left out: {line}")

    def load(one: Guessing) -> Engine:
        progress(f"loading {one.name}")
        return load_engine(
            one.model,
            replace(one.options, max_context=one.options.max_context or positions),
        )

    engine = load(plain)
    engines = {one.name: load(one) for one in guessing}
    progress("measuring the machine")
    machine = hardware(engine)
    found: list[SpeculationResult] = []
    for batch in asked.batches:
        found += measure_speculation(
            engine,
            engines,
            chosen,
            machine,
            temperatures=asked.temperatures,
            batch=batch,
            new_tokens=asked.new_tokens,
            rounds=asked.rounds,
            seed=asked.seed,
            name=plain.name,
            progress=progress,
        )
    return found


def choose(plain: Guessing, guessing: Sequence[Guessing], asked: Asked) -> tuple[Chosen, int]:
    """The prompts that fit all of these engines, and the positions that they need."""
    from skimp.cli.models import model_spec
    from skimp.meter.speculation import choose_prompts, tokens_needed
    from skimp.model.locate import locate_model
    from skimp.text.tokenizer import Tokenizer

    every = [one.options for one in (plain, *guessing)]
    limit = model_spec(plain.model).max_positions
    room = min(options.max_context or limit for options in every)
    more = max(
        tokens_needed(options, asked.new_tokens) + options.longest_draft + SLACK
        for options in every
    )
    if room <= more:
        raise ValueError(
            f"new_tokens: {asked.new_tokens} and their guesses leave no room for a prompt in the "
            f"{room} positions of {plain.name}"
        )
    chosen = choose_prompts(
        asked.prompts,
        Tokenizer.load(locate_model(plain.model)),
        most_tokens=room - more,
        each=asked.each,
        least=max(asked.batches),
        categories=asked.categories,
        seed=asked.seed,
    )
    return chosen, chosen.longest + more


def _names(values: list[str]) -> list[str]:
    return list(dict.fromkeys(part.strip() for value in values for part in value.split(",")))


def _temperatures(values: list[str] | None) -> tuple[float, ...]:
    found = []
    for part in _names(values or ["0,1"]):
        try:
            found.append(float(part))
        except ValueError:
            raise ValueError(f"temperature: {part!r} is not a number such as 0.7") from None
        if not 0 <= found[-1] < 100:
            raise ValueError(f"temperature: from 0 up to 100, not {part}")
    return tuple(dict.fromkeys(found))
