"""Task files: one JSON object a line (``.jsonl`` or ``.jsonl.xz``), checked strictly.

What a file asks is told by its fields:

=============  =====================================  ===========================================
kind           required fields                        further fields that are used
=============  =====================================  ===========================================
minimal-pair   sentence_good, sentence_bad            UID, field, linguistics_term (groups)
choice         context, options, label
last-word      context, target
generate       question, answer
=============  =====================================  ===========================================

Other fields are the file's own business.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, get_args

from skimp.errors import SkimpError
from skimp.meter.lines import Line, read_lines

Kind = Literal["minimal-pair", "choice", "last-word", "generate"]
GROUPS = ("UID", "field", "linguistics_term")  # of minimal pairs, as BLiMP names them
_NUMBER = re.compile(r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


class TaskFileError(SkimpError):
    """A task file is missing, malformed, or not of the kind asked for."""


@dataclass(frozen=True, kw_only=True)
class MinimalPair:
    """Two sentences, of which a speaker accepts the first."""

    good: str
    bad: str
    groups: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Choice:
    context: str
    options: tuple[str, ...]
    label: int


@dataclass(frozen=True, kw_only=True)
class LastWord:
    context: str
    target: str


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question whose answer is a number; ``worked`` is the answer as the file has it."""

    question: str
    worked: str
    number: Decimal
    line: int


Item = MinimalPair | Choice | LastWord | Problem


@dataclass(frozen=True, kw_only=True)
class Task:
    """``items`` are of one class, by ``kind``; ``spare`` those that ``max_items`` left out."""

    name: str
    kind: Kind
    items: tuple[Any, ...]
    spare: tuple[Any, ...] = ()


def read_task(
    path: str | Path, *, kind: str | None = None, max_items: int | None = None, seed: int = 0
) -> Task:
    """The task in a file, of the kind its fields tell or of ``kind``.

    ``max_items`` draws that many items by ``seed`` and keeps their order. Raises ``TaskFileError``
    naming the file, the line and the field.
    """
    path = Path(path)
    if kind is not None and kind not in get_args(Kind):
        raise TaskFileError(f"kind: {kind!r} is none of {', '.join(get_args(Kind))}")
    if max_items is not None and max_items < 1:
        raise TaskFileError(f"max_items: at least 1, not {max_items}")
    items: list[Item] = []
    found: Kind | None = kind  # type: ignore[assignment]  # checked above
    for line in read_lines(path, TaskFileError):
        if found is None:
            found = _kind_of(line)
        items.append(_READERS[found](line))
    if found is None or not items:
        raise TaskFileError(f"{path}: it holds no items")
    name = path.name.removesuffix(".xz").removesuffix(".jsonl")
    if max_items is None or max_items >= len(items):
        return Task(name=name, kind=found, items=tuple(items))
    drawn = set(random.Random(seed).sample(range(len(items)), max_items))
    return Task(
        name=name,
        kind=found,
        items=tuple(item for i, item in enumerate(items) if i in drawn),
        spare=tuple(item for i, item in enumerate(items) if i not in drawn),
    )


def last_number(text: str) -> Decimal | None:
    """The number after ``####``, or else the last one in a text; thousands commas and dollar signs
    do not count."""
    _, marked, after = text.partition("####")
    found = _NUMBER.findall(after if marked else text)
    if not found:
        return None
    return Decimal(re.sub(r"[$,]", "", found[0 if marked else -1]))


def _pair(line: Line) -> MinimalPair:
    good, bad = line.text("sentence_good"), line.text("sentence_bad")
    groups = {name: line.text(name) for name in GROUPS if name in line.row}
    return MinimalPair(good=good, bad=bad, groups=groups)


def _choice(line: Line) -> Choice:
    options = line.texts("options", least=2)
    return Choice(
        context=line.text("context", empty=True),
        options=options,
        label=line.index("label", len(options)),
    )


def _last_word(line: Line) -> LastWord:
    return LastWord(context=line.text("context"), target=line.text("target"))


def _problem(line: Line) -> Problem:
    worked = line.text("answer")
    number = last_number(worked)
    if number is None:
        raise line.error("answer: holds no number to compare with")
    return Problem(question=line.text("question"), worked=worked, number=number, line=line.number)


_READERS: dict[Kind, Callable[[Line], Item]] = {
    "minimal-pair": _pair,
    "choice": _choice,
    "last-word": _last_word,
    "generate": _problem,
}
_SIGNS: dict[Kind, tuple[str, ...]] = {
    "minimal-pair": ("sentence_good", "sentence_bad"),
    "choice": ("context", "options", "label"),
    "last-word": ("context", "target"),
    "generate": ("question", "answer"),
}


def _kind_of(line: Line) -> Kind:
    """The kind whose fields are all there, or else the one of which most are."""
    for kind, names in _SIGNS.items():
        if all(name in line.row for name in names):
            return kind
    wanted = "; ".join(f"{', '.join(names)} ({kind})" for kind, names in _SIGNS.items())
    has = ", ".join(sorted(map(str, line.row)))[:200] or "none"
    raise line.error(f"its fields ({has}) tell no kind of task; expected {wanted}")
