"""Finds the extension module and sets it up: instruction set, number of threads."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from skimp.kernels.native import structs

try:
    from skimp.kernels.native import _native as _module
except ImportError:  # built without a compiler, or not for this platform
    _extension: ModuleType | None = None
else:
    _extension = _module


def advise_huge(buffer: Tensor) -> None:
    """Ask the system for huge pages under a fresh CPU buffer; without effect where it has none."""
    library().advise_huge(buffer.data_ptr(), buffer.nbytes)


def available() -> bool:
    """Whether the native kernels were built."""
    return _extension is not None


@functools.cache
def _configured() -> ModuleType:
    if _extension is None:
        raise RuntimeError(
            "the native kernels are not built: install skimp with a C++ compiler present"
        )
    check_build(_extension)
    name = os.environ.get("SKIMP_ISA")
    if name:
        try:
            _extension.set_isa(name)
        except ValueError as error:
            raise ValueError(f"environment variable SKIMP_ISA: {error}") from None
    _extension.set_threads(default_threads())
    return _extension


def check_build(extension: Any) -> None:
    """The extension of another version of the sources would read the ops at wrong places."""
    for kind, mirror in structs.OPS.items():
        try:
            built = extension.sizeof(kind)
        except ValueError:
            built = None
        if built != ctypes.sizeof(mirror):
            raise RuntimeError(
                f"{extension.__file__} was built from other sources than this skimp "
                f"({mirror.__name__} differs): build it again"
            )


def library() -> ModuleType:
    """The extension, with ``SKIMP_ISA`` honoured and one thread a physical core.

    Raises RuntimeError where it was not built, ValueError for a SKIMP_ISA this CPU cannot run.
    """
    return _configured()


def default_threads() -> int:
    """Physical cores this process may use, by its affinity and its container's CPU quota."""
    if hasattr(os, "sched_getaffinity"):
        cpus = os.sched_getaffinity(0)
    else:
        cpus = set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in cpus:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    count = len(cores)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return max(1, count)


def set_threads(threads: int) -> None:
    """Threads of later runs, the calling one included."""
    library().set_threads(threads)


def get_threads() -> int:
    threads: int = library().get_threads()
    return threads


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Run with a lower instruction set for a while (tests, benchmarks)."""
    before = library().isa()
    library().set_isa(name)
    try:
        yield
    finally:
        library().set_isa(before)


def describe() -> str:
    """One line for ``skimp info``."""
    if not available():
        return "not built (PyTorch runs instead; install with a C++ compiler to build them)"
    native = library()
    isa, best = native.isa(), native.best_isa()
    lowered = "" if isa == best else f" (SKIMP_ISA; this CPU has {best})"
    threads = native.get_threads()
    return f"{isa}{lowered}, {threads} thread{'s' if threads > 1 else ''}"
