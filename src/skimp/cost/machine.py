"""Measures the machine at hand, in a second or two, and remembers the answer.

Figures are the best of several passes: a ceiling is what the machine can do undisturbed. They are
kept in ``$XDG_CACHE_HOME/skimp`` (``~/.cache/skimp``) under a key of processor, threads and
versions; a file that cannot be read or written only costs a new measurement.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from skimp.cost.hardware import Curve, Hardware, Overheads

if TYPE_CHECKING:
    import torch

_PIECE = 4 << 20  # numbers; 16 MiB, a millisecond or so
_ALMOST = 16  # pieces of the largest buffer that may lie in a cache in part
_FORMAT = 9  # of the file; raise it whenever what is measured changes


def cache_dir() -> Path:
    """Where measurements are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "skimp"


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown processor"


def total_memory() -> int:
    """Bytes of memory; the control group's limit where that is smaller."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        total = 8 << 30
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit.isdigit():
            total = min(total, int(limit))
    except OSError:
        pass
    return total


def free_memory() -> int:
    """Bytes that programs can still have: what caches of files hold is theirs to take."""
    free = total_memory()
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = min(free, int(line.split()[1]) << 10)
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        stats = Path("/sys/fs/cgroup/memory.stat").read_text().split()
        cached = int(stats[stats.index("inactive_file") + 1])
        free = min(free, total_memory() - used + cached)
    except (OSError, ValueError):
        pass
    return max(0, free)


def this_machine(
    *, threads: int | None = None, device: str = "cpu", fresh: bool = False
) -> Hardware:
    """The machine at hand, measured now or read from an earlier measurement."""
    import torch

    import skimp

    if device != "cpu":
        return _gpu(device, fresh=fresh)
    threads = torch.get_num_threads() if threads is None else threads
    key = (_FORMAT, skimp.__version__, torch.__version__, cpu_model(), os.cpu_count(), threads)
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    path = cache_dir() / f"hardware-{digest}.json"
    return kept(path, lambda: measure(threads=threads), fresh=fresh)


def kept(
    path: Path,
    measure: Callable[[], Hardware],
    *,
    fresh: bool = False,
    max_age_s: float = math.inf,
) -> Hardware:
    """The machine in ``path``, or measured and written there.

    What was measured on a busy machine is measured again once the machine is quieter, and what is
    older than ``max_age_s`` seconds in any case.
    """
    load = _load()
    if not fresh:
        try:
            if time.time() - path.stat().st_mtime > max_age_s:
                raise ValueError
            data = json.loads(path.read_text())
            if data["load"] <= max(BUSY, 2 * load):
                return Hardware.from_dict(data["hardware"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
    hardware = measure()
    save_json(path, {"load": load, "hardware": hardware.as_dict()})
    return hardware


BUSY = 0.75  # processes that wait or run, for each processor


def _load() -> float:
    """The last minute's load for each processor; 0 where the system does not say."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except OSError:
        return 0.0


def busy_note() -> str | None:
    """A warning to stand beside figures that other processes disturb, or None."""
    load = _load()
    if load <= BUSY + 0.5:
        return None
    return f"other processes are running (load {load:.1f} a processor): figures are disturbed"


def save_json(path: Path, data: object) -> None:
    """Writes atomically; a directory that cannot be written is not an error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(data, file)
        Path(file.name).replace(path)
    except OSError:
        pass


def measure(*, threads: int) -> Hardware:
    """Bandwidth by working set, matrix rates by dtype and rows, and the cost of dispatch."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            curve = _bandwidth_curve()
            rates = {name: _matrix_rates(name) for name in ("float32", "bfloat16", "float16")}
            attention = _attention_rate()
            dispatch = _dispatch_s()
    finally:
        torch.set_num_threads(before)
    return Hardware(
        name="this",
        kind="cpu",
        source="measured",
        note=f"{cpu_model()}, {threads} threads, torch {torch.__version__}",
        bandwidth_gb_s=curve[-1][1],
        bandwidth_curve=curve,
        matrix_tflops=rates,
        attention_tflops=attention,
        memory_bytes=float(total_memory()),
        # A layer through PyTorch is some 25 operators; a step's bookkeeping some 50 more.
        overheads=Overheads(step_s=50 * dispatch, layer_s=25 * dispatch, sequence_s=10 * dispatch),
        threads=threads,
    )


def best_s(run: Callable[[], object], *, seconds: float, at_least: int = 3) -> float:
    """Shortest time of one ``run()``, tried for about ``seconds``."""
    run()
    best, spent, done = float("inf"), 0.0, 0
    while done < at_least or spent < seconds:
        start = time.perf_counter()
        run()
        took = time.perf_counter() - start
        best, spent, done = min(best, took), spent + took, done + 1
    return best


def _bandwidth_curve() -> Curve:
    import torch

    # The last buffer must not fit any cache; hosts of half a gigabyte of shared cache exist.
    largest = min(1 << 30, total_memory() // 8)
    # Where a cache ends, the pace falls by half within a fifth of its size.
    sizes = [n for k in range(18, 31) for n in (1 << k, (1 << k) * 4 // 3) if n <= largest]
    buffer = torch.ones(sizes[-1] // 4)
    points = [(float(size), size / _pass_s(buffer[: size // 4]) / 1e9) for size in sizes]
    # A larger set is never faster but for noise: smooth from the far end.
    smooth: list[tuple[float, float]] = []
    for reach, gb_s in reversed(points):
        smooth.append((reach, max(gb_s, smooth[-1][1]) if smooth else gb_s))
    return tuple(reversed(smooth))


def _pass_s(buffer: torch.Tensor) -> float:
    """Seconds to read all of ``buffer`` while it is read again and again.

    It is timed in pieces short enough to lie between two interruptions, in order, so that a buffer
    larger than a cache finds none of itself there. Of one that almost fits some pieces do find
    themselves: each has its own time, the best. Those of a far larger one are alike.
    """
    pieces = buffer.split(_PIECE)
    repeat = max(1, (1 << 20) // buffer.numel())  # long enough for the clock
    times: list[list[float]] = [[] for _ in pieces]
    start = time.perf_counter()
    while len(times[0]) < 8 and (len(times[0]) < 3 or time.perf_counter() - start < 0.25):
        for piece, own in zip(pieces, times):
            begin = time.perf_counter()
            for _ in range(repeat):
                piece.sum()
            own.append((time.perf_counter() - begin) / repeat)
    if len(pieces) > _ALMOST:
        every = sorted(took for own in times for took in own)
        return every[len(every) // 4] * len(pieces)
    return sum(map(min, times))


def _matrix_rates(dtype: str) -> Curve:
    import torch

    kind = getattr(torch, dtype)
    width = 512  # half a megabyte of bf16: the weights stay in a core's cache
    weight = torch.randn(width, width).to(kind)
    points: list[tuple[float, float]] = []
    for rows in (1, 4, 8, 16, 32, 128, 512):
        x = torch.randn(rows, width).to(kind)
        took = best_s(partial(torch.nn.functional.linear, x, weight), seconds=0.01)
        points.append((float(rows), 2 * rows * width * width / took / 1e12))
        if took > 0.05:  # a reference kernel (fp16 on many CPUs): more rows would not be faster
            break
    return tuple(points)


def _attention_rate() -> float:
    import torch

    q = torch.randn(1, 8, 256, 64)
    took = best_s(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q), seconds=0.03)
    return 4 * 8 * 256 * 256 * 64 / took / 1e12


def _dispatch_s() -> float:
    import torch

    x = torch.ones(16)

    def run() -> None:
        for _ in range(100):
            x + x

    return best_s(run, seconds=0.02) / 100


def _gpu(device: str, *, fresh: bool) -> Hardware:
    """The GPU measured; ValueError if there is none."""
    import torch

    import skimp
    from skimp.cost.gpu import measure_gpu

    if not torch.cuda.is_available():
        raise ValueError(f"device: {device} is not available; name a machine with --hardware")
    key = (_FORMAT, skimp.__version__, torch.__version__, torch.cuda.get_device_name(device))
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    return kept(cache_dir() / f"gpu-{digest}.json", lambda: measure_gpu(device), fresh=fresh)
