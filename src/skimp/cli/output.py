"""What commands print: JSON, tables, progress, and figures made readable."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def print_json(value: object) -> None:
    """One JSON object on stdout. NaN and infinities would not be JSON: they are refused."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False), flush=True)


def note(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout; the first column is text, the others are figures.

    A last column named "assuming" is text too. Written plainly: wrapped to no terminal's width, so
    that it can be piped and compared.
    """
    text = {0, len(columns) - 1} if columns[-1] == "assuming" else {0}
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    lines = [title] if title else []
    for row in [columns, ["-" * w for w in widths], *rows]:
        cells = [
            cell.ljust(width) if i in text else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    print("\n".join(lines), flush=True)


@contextmanager
def progress_text(show: bool = True) -> Iterator[Callable[[str], None]]:
    """A line on stderr that changes, only where somebody is looking."""
    if not (show and sys.stderr.isatty()):
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield lambda text: status.update(text)


@contextmanager
def progress_bar(label: str, show: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, fed with (done, total), only where somebody is looking."""
    with telling_bar(label, show) as (bar, _):
        yield bar


@contextmanager
def telling_bar(
    label: str, show: bool = True
) -> Iterator[tuple[Callable[[int, int], None], Callable[[str], None]]]:
    """:func:`progress_bar`, and what changes its label."""
    if not (show and sys.stderr.isatty()):
        yield lambda done, total: None, lambda text: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=None)
        yield (
            lambda done, total: progress.update(task, completed=done, total=total),
            lambda text: progress.update(task, description=text),
        )


def bytes_text(value: float) -> str:
    """``1.50 GB``: decimal units, three figures."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB" if value < 1000 else f"{value:,.0f} TB"


def ms_text(seconds: float) -> str:
    """Milliseconds with three figures, whatever their size."""
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def rate_text(value: float) -> str:
    """A rate with three figures below a thousand, whole above."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def read_prompt(prompt: str) -> str:
    """The prompt, or standard input for ``-``. ValueError if it is not UTF-8."""
    if prompt != "-":
        if any("\ud800" <= c <= "\udfff" for c in prompt):
            raise ValueError("PROMPT: not UTF-8 text")
        return prompt
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"PROMPT: standard input is not UTF-8 at byte {error.start}") from error


def json_ready(value: Any) -> Any:
    """Dataclasses and tuples turned into what JSON has."""
    import dataclasses

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {k: json_ready(v) for k, v in vars(value).items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(v) for v in value]
    if isinstance(value, dict):
        return {str(k): json_ready(v) for k, v in value.items()}
    return value
