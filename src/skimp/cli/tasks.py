"""The options that say which tasks a model is asked, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skimp.cli import options as opt

if TYPE_CHECKING:
    from skimp.meter.taskfiles import Task
    from skimp.meter.tasks import Generation

Files = Annotated[
    list[str] | None,
    typer.Option("--task", help="Task file, .jsonl or .jsonl.xz; repeatable.", metavar="FILE"),
]
Kind = Annotated[
    str | None,
    typer.Option(
        "--kind",
        help="minimal-pair, choice, last-word or generate; told by the fields by default.",
        metavar="KIND",
    ),
]
MaxItems = Annotated[
    str | None, typer.Option(help="Draw that many items of each task by the seed.", metavar="N")
]
Shots = Annotated[
    int | None,
    typer.Option(help="generate: solved examples before each question; 0.", metavar="N"),
]
MaxTokens = Annotated[str | None, typer.Option(help="generate: longest answer; 256.", metavar="N")]
Template = Annotated[
    str | None, typer.Option(help="generate: prompt with {question} in it; \\n is a line's end.")
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="generate: text that ends an answer; repeatable.", metavar="TEXT"),
]
Chat = Annotated[
    bool, typer.Option("--chat", help="generate: ask through the model's chat template.")
]
BATCH = 32  # sequences at once, where an engine is made for tasks


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Tasks, and how those that generate are to be answered."""

    tasks: tuple[Task, ...]
    generation: Generation


def read_tasks(
    files: list[str] | None,
    *,
    seed: int,
    kind: str | None,
    max_items: str | None,
    shots: int | None,
    max_tokens: str | None,
    template: str | None,
    stop: list[str] | None,
    chat: bool,
) -> Asked:
    """What the options ask for. ValueError names one that is wrong or would have no effect."""
    from skimp.meter.taskfiles import read_task
    from skimp.meter.tasks import Generation

    names = files or []
    if not names:
        refuse("needs a --task", kind=kind, max_items=max_items)
    items = None if max_items is None else opt.parse_count(max_items, "max_items")
    tasks = tuple(read_task(name, kind=kind, max_items=items, seed=seed) for name in names)
    asked: dict[str, Any] = {
        "shots": shots,
        "max_tokens": None if max_tokens is None else opt.parse_count(max_tokens, "max_tokens"),
        "template": None if template is None else template.replace("\\n", "\n"),
        "stop": None if stop is None else tuple(s.replace("\\n", "\n") for s in stop),
        "chat": chat or None,
    }
    if all(task.kind != "generate" for task in tasks):
        refuse("needs a --task that generates", **asked)
    given = {name: value for name, value in asked.items() if value is not None}
    return Asked(tasks=tasks, generation=Generation(**given))


def refuse(why: str, **options: object) -> None:
    """What is given and would have no effect is an error."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}: {why}")
