"""Files of one JSON object a line (``.jsonl`` or ``.jsonl.xz``), checked strictly."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from skimp.errors import SkimpError

MAX_LINE = 1 << 20  # characters
MAX_BYTES = 1 << 30  # unpacked


class Line:
    """One object of a file; its fields are checked as they are asked for."""

    def __init__(
        self, path: Path, number: int, row: dict[str, Any], error: type[SkimpError]
    ) -> None:
        self.path, self.number, self.row, self._error = path, number, row, error

    def error(self, problem: str) -> SkimpError:
        return self._error(f"{self.path} line {self.number}: {problem}")

    def field(self, name: str) -> Any:
        if name not in self.row:
            raise self.error(f"{name}: is missing")
        return self.row[name]

    def text(self, name: str, *, empty: bool = False) -> str:
        return self._text(name, self.field(name), empty)

    def texts(self, name: str, *, least: int) -> tuple[str, ...]:
        values = self.field(name)
        if not isinstance(values, list) or len(values) < least:
            raise self.error(f"{name}: expected a list of at least {least} texts")
        return tuple(self._text(f"{name}[{i}]", v, False) for i, v in enumerate(values))

    def _text(self, name: str, value: object, empty: bool) -> str:
        if not isinstance(value, str):
            raise self.error(f"{name}: expected text, got {type(value).__name__}")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise self.error(f"{name}: holds a lone surrogate, which is no text")
        if not (empty or value.strip()):
            raise self.error(f"{name}: is empty")
        return value

    def index(self, name: str, count: int) -> int:
        value = self.field(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
            shown = json.dumps(value)[:40]
            raise self.error(f"{name}: expected a whole number from 0 to {count - 1}, got {shown}")
        return value


def read_lines(path: Path, error: type[SkimpError]) -> Iterator[Line]:
    """Each line that is not blank. Raises ``error`` naming the file and the line."""
    if not (path.name.endswith(".jsonl") or path.name.endswith(".jsonl.xz")):
        raise error(f"{path}: expected a file named .jsonl or .jsonl.xz")
    if not path.is_file():
        raise error(f"{path}: no such file")
    number = total = 0
    try:
        with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
            while data := file.readline(MAX_LINE + 1):
                number += 1
                total += len(data)
                if len(data) > MAX_LINE or total > MAX_BYTES:
                    raise error(f"{path} line {number}: is too long")
                if data.strip():
                    yield Line(path, number, _object(path, number, data, error), error)
    except (lzma.LZMAError, EOFError) as damage:
        raise error(f"{path}: is damaged after line {number}: {damage}") from None
    except OSError as failure:
        raise error(f"{path}: cannot be read: {failure.strerror}") from None


def _object(path: Path, number: int, data: bytes, error: type[SkimpError]) -> dict[str, Any]:
    where = f"{path} line {number}"
    try:
        row = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as wrong:
        raise error(f"{where}: is not UTF-8 at byte {wrong.start}") from None
    except (json.JSONDecodeError, RecursionError, ValueError) as wrong:
        raise error(f"{where}: is not JSON: {wrong}") from None
    if not isinstance(row, dict):
        raise error(f"{where}: expected an object, got {type(row).__name__}")
    return row
