"""What a run has finished, on the disk before the next unit begins.

One JSON object a line. The first says what the run is; each other one says that a unit went
through a pass of a step, and what is needed to go on behind it. A line's ``chain`` is the SHA-256
of the line before and of itself, so a changed journal is told from a torn last line.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from skimp.errors import ShrinkError
from skimp.model.saving import sync_directory

JOURNAL: Final = "journal.jsonl"
LOCK: Final = "lock"


class Journal:
    """The lines of a work directory's journal. ``entries`` leaves out the first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run: dict[str, Any] | None = None
        self.entries: list[dict[str, Any]] = []
        self._chain = ""
        size = self._read() if path.exists() else 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        os.ftruncate(self._descriptor, size)  # a torn line ends here
        os.lseek(self._descriptor, size, os.SEEK_SET)

    def _read(self) -> int:
        data = self.path.read_bytes()
        begin = 0
        while (end := data.find(b"\n", begin)) >= 0:
            line = data[begin:end]
            try:
                entry = json.loads(line)
                chain = entry.pop("chain")
            except (ValueError, AttributeError, KeyError, TypeError):
                chain, entry = None, {}
            if chain != self._link(entry):
                raise ShrinkError(
                    f"{self.path}: is not as it was written; use --restart to begin again"
                )
            self._chain = chain
            if self.run is None:
                self.run = entry
            else:
                self.entries.append(entry)
            begin = end + 1
        return begin

    def _link(self, entry: Mapping[str, Any]) -> str:
        return hashlib.sha256((self._chain + json.dumps(entry)).encode()).hexdigest()

    def start(self, run: Mapping[str, Any]) -> None:
        """The first line."""
        assert self.run is None
        self.run = dict(run)
        self._append(run)
        sync_directory(self.path.parent)

    def add(self, entry: Mapping[str, Any]) -> None:
        """One more line, on the disk when this returns."""
        self.entries.append(dict(entry))
        self._append(entry)

    def _append(self, entry: Mapping[str, Any]) -> None:
        chain = self._link(entry)
        line = (json.dumps({**entry, "chain": chain}) + "\n").encode()
        while line:
            line = line[os.write(self._descriptor, line) :]
        os.fsync(self._descriptor)
        self._chain = chain

    def close(self) -> None:
        os.close(self._descriptor)


class WorkDirectory:
    """A hidden sibling of the output, held by one process at a time. The lock is the kernel's:
    it goes when its holder dies."""

    def __init__(self, output: Path) -> None:
        output = output.absolute()
        self.path = output.parent / f".{output.name}.shrink"
        self._output = output
        self._lock = -1

    def __enter__(self) -> WorkDirectory:
        while True:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:
                continue  # whoever was there has just finished and removed it
            except OSError as error:
                raise ShrinkError(f"{self.path}: cannot be made: {error.strerror}") from None
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._lock)
                raise ShrinkError(f"{self._output}: another run is writing it") from None
            if self._is_ours():
                return self
            os.close(self._lock)

    def _is_ours(self) -> bool:
        """Whether the locked file is still the one that others would lock."""
        try:
            there = (self.path / LOCK).stat()
        except FileNotFoundError:
            return False
        return there.st_ino == os.fstat(self._lock).st_ino

    def __exit__(self, *exc: object) -> None:
        os.close(self._lock)

    def clear(self) -> None:
        """Remove everything but the lock; the journal first, since it vouches for the rest."""
        (self.path / JOURNAL).unlink(missing_ok=True)
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()

    def remove(self) -> None:
        """Everything, once the output is there."""
        self.clear()
        (self.path / LOCK).unlink()
        with contextlib.suppress(OSError):  # somebody who waits for the lock has made another
            self.path.rmdir()
