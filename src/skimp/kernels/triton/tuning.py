"""Tile configurations of ``linear.py``: measured ones where there are any, a rule elsewhere.

Measured ones are read from ``tuned.json`` beside this file and then from the user's cache
(``$XDG_CACHE_HOME/skimp/triton/tuned.json``), which wins. Only :func:`tune` measures.
"""

from __future__ import annotations

import functools
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import triton

from skimp.cost.machine import cache_dir
from skimp.kernels.triton.launch import multiprocessors

GEMV_ROWS = 4
STAGED_BYTES = 64 << 10  # of rows that few holds in shared memory
FEW_ROWS = 8  # columns of the tensor cores' right operand: rows times slices of K in few
MANY = 256  # stands for every number of rows above 128
REPEATS = 9


@dataclass(frozen=True, kw_only=True)
class Config:
    """How a product runs: ``gemv`` and ``dot`` are kernels of ``products.py``, ``few`` is that of
    ``few_rows.py``; ``library`` is cuBLAS, after expansion of low-bit weights."""

    kind: Literal["gemv", "few", "dot", "library"]
    block_n: int = 64
    block_m: int = 16
    block_k: int = 128  # of a dense matrix
    split: int = 1  # programs that share K; in few, slices of K in a program
    warps: int = 4
    stages: int = 4  # in few, chunks of weights under way


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a configuration depends on besides the number of rows."""

    format: str  # a weight format's name; the dtype of a dense matrix
    outputs: int
    inputs: int
    gated: bool
    few: bool  # whether that kernel takes the matrix

    @property
    def dense(self) -> bool:
        return self.format in ("bfloat16", "float16", "float32")

    def takes(self, kind: str, rows: int) -> bool:
        """Whether such a kernel can multiply so many rows. A table's key does not say all of it:
        not what the rows' dtype is, nor whether this Triton has Gluon."""
        if kind == "gemv":
            return self.dense and rows <= GEMV_ROWS
        return kind != "few" or (self.few and rows <= FEW_ROWS)

    def key(self, family: str, rows: int) -> str:
        gated = " gated" if self.gated else ""
        return f"{family} {self.format} {self.outputs}x{self.inputs}{gated} {bucket(rows)}"


# One for every number of rows, so that no row's sum depends on how many there are.
DETERMINISTIC = Config(kind="dot", block_n=32, block_m=64, block_k=64, warps=4, stages=3)


def bucket(rows: int) -> int:
    """Numbers of rows that share a configuration: up to the next power of two, or many."""
    return triton.next_power_of_2(rows) if rows <= 128 else MANY


def choose(problem: Problem, rows: int, device: torch.device) -> Config:
    """The configuration for a bucket of rows: what was measured for it or, of few rows of a dense
    matrix, for the next larger one, whose tiles have room for them."""
    if device.type != "cuda":
        return rule(problem, rows, 4)
    family, processors = _device(device.index or 0)
    own = bucket(rows)
    larger = [size for size in (2, 4, 8) if problem.dense and 1 < own < size]
    for size in (own, *larger):
        found = _table().get(problem.key(family, size))
        if found is not None and problem.takes(found.kind, rows):
            return found
    return rule(problem, rows, processors)


def rule(problem: Problem, rows: int, processors: int) -> Config:
    """What to do unmeasured."""
    rows = bucket(rows)
    if rows >= (64 if problem.dense else MANY):
        return Config(kind="library")
    if problem.takes("few", rows) and rows <= 2:
        return _few_rule(problem, rows, processors)
    if problem.takes("gemv", rows) and rows == 1:
        return _gemv_rule(problem, rows, processors)
    return _dot_rule(problem, rows, processors)


def _few_rule(problem: Problem, rows: int, processors: int) -> Config:
    split = FEW_ROWS // rows
    warps = max(4, split)
    block_n = 16 * warps // split
    if problem.outputs >= 8 * block_n * processors:
        block_n *= 2
    return Config(kind="few", block_n=block_n, split=split, warps=warps, stages=2)


def _gemv_rule(problem: Problem, rows: int, processors: int) -> Config:
    wide = problem.outputs >= 8 * 4 * processors
    share = 8  # in one load of a thread
    block_k = min(128 * share, max(32, triton.next_power_of_2(problem.inputs)))
    while problem.inputs % block_k and block_k > 32 * share:
        block_k //= 2
    return Config(
        kind="gemv",
        block_n=max(2, 8 // rows if wide else 4 // rows),
        block_k=block_k,
        warps=min(4, max(1, block_k // (32 * share))),
        stages=1,
    )


def _dot_rule(problem: Problem, rows: int, processors: int) -> Config:
    block_m = min(64, max(8, rows))
    block_n = 128 if problem.outputs >= 128 * 2 * processors else 64
    block_k = 128 if block_m <= 32 else 64
    tiles = triton.cdiv(problem.outputs, block_n) * triton.cdiv(rows, block_m)
    depth = triton.cdiv(problem.inputs, block_k)
    split = max(1, min(16, 2 * processors // tiles, depth // 4))
    return Config(kind="dot", block_n=block_n, block_m=block_m, block_k=block_k, split=split)


def seeds(problem: Problem, rows: int, processors: int) -> list[Config]:
    """A configuration of each kernel that could be the quickest; the rule's comes first."""
    rows = bucket(rows)
    found = [rule(problem, rows, processors)]
    if found[0].kind != "dot":
        found.append(_dot_rule(problem, rows, processors))
    if found[0].kind != "library" and rows >= 16:
        found.append(Config(kind="library"))
    if found[0].kind != "few" and problem.takes("few", rows):
        found.append(_few_rule(problem, rows, processors))
    if found[0].kind != "gemv" and problem.takes("gemv", rows):
        found.append(_gemv_rule(problem, rows, processors))
    return found


def neighbours(problem: Problem, rows: int, config: Config) -> Iterator[Config]:
    """Configurations that differ from this one in one number, or in two that share work."""
    if config.kind == "library":
        return
    rows = bucket(rows)
    if config.kind == "few":
        yield from _few_neighbours(config, rows)
        return
    gemv, dense = config.kind == "gemv", problem.dense

    def with_(**changes: int) -> Iterator[Config]:
        if min(changes.values()) < 1 or changes.get("warps", 1) > 8:
            return
        new = Config(**{**asdict(config), **changes})
        if gemv:
            # Weights that a thread holds at a time, which it holds a sum for at each row.
            share = new.block_n * new.block_k // (32 * new.warps)
            fits = (
                8 <= share <= 128 // rows and 2 <= new.block_n <= 32 and 32 <= new.block_k <= 4096
            )
        else:
            step = (new.block_m + new.block_n) * new.block_k * 2
            step = step if dense else new.block_n * 64 + new.block_m * 256
            fits = (
                step * new.stages <= 200 << 10
                and 16 <= new.block_n <= 256
                and 8 <= new.block_m <= max(128, 2 * rows)
                and 32 <= new.block_k <= 256
                and new.split <= max(1, problem.inputs // 256)
            )
        if fits and new.split <= 16:
            yield new

    up, down = config.block_n * 2, config.block_n // 2
    yield from with_(block_n=up)
    yield from with_(block_n=down)
    yield from with_(warps=config.warps * 2)
    yield from with_(warps=config.warps // 2)
    if gemv:
        yield from with_(block_k=config.block_k * 2)
        yield from with_(block_k=config.block_k // 2)
        yield from with_(block_k=config.block_k * 2, warps=config.warps * 2)
        yield from with_(block_k=config.block_k * 2, block_n=down)
        yield from with_(block_k=config.block_k // 2, block_n=up)
        return
    for split in sorted({config.split * 2, config.split // 2, config.split + 1, config.split - 1}):
        yield from with_(split=split)
    for stages in (2, 3, 4, 6, 8):
        if stages != config.stages:
            yield from with_(stages=stages)
    yield from with_(block_n=up, split=config.split * 2)
    yield from with_(block_n=down, split=config.split // 2)
    if rows > 8:
        yield from with_(block_m=config.block_m * 2)
        yield from with_(block_m=config.block_m // 2)
    if dense:
        yield from with_(block_k=config.block_k * 2)
        yield from with_(block_k=config.block_k // 2)


def _few_neighbours(config: Config, rows: int) -> Iterator[Config]:
    def with_(**changes: int) -> Iterator[Config]:
        new = Config(**{**asdict(config), **changes})
        fits = (
            1 <= new.split <= min(FEW_ROWS // rows, new.warps)
            and new.warps <= 16
            and new.block_n * new.split // new.warps in (16, 32, 64)
            and new.stages in (1, 2, 4)
        )
        if fits:
            yield new

    for factor in (2.0, 0.5):
        block_n, warps = int(config.block_n * factor), int(config.warps * factor)
        yield from with_(stages=int(config.stages * factor))
        yield from with_(block_n=block_n)
        yield from with_(warps=warps)
        yield from with_(block_n=block_n, warps=warps)
        yield from with_(split=int(config.split * factor), warps=warps)
        yield from with_(split=int(config.split * factor), block_n=int(config.block_n / factor))


def measure(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds of a call, the median over replays of a CUDA graph that makes all of them."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def tune(
    problem: Problem,
    rows: int,
    make: Callable[[Config], Sequence[Callable[[], object]]],
    device: torch.device,
    depth: int = 16,
) -> tuple[Config, float]:
    """The quickest configuration found and its microseconds: from each seed at most ``depth`` steps
    downhill, each to the best neighbour.

    ``make`` gives calls of the product with a configuration, over as many copies of the matrix as
    the cache must not hold.
    """
    times: dict[Config, float] = {}

    def timed(config: Config) -> float:
        if config not in times:
            try:
                times[config] = measure(make(config))
            except (RuntimeError, triton.errors.TritonError):
                times[config] = math.inf  # more shared memory or registers than the device has
        return times[config]

    for seed in seeds(problem, rows, _device(device.index or 0)[1]):
        here = seed
        if timed(seed) > 2 * min(times.values()):
            continue
        for _ in range(depth):
            near = min(neighbours(problem, rows, here), key=timed, default=here)
            if timed(near) > 0.99 * timed(here):
                break
            here = near
    best = min(times, key=lambda config: times[config])
    return best, times[best]


def cache_path() -> Path:
    """Where the user's own measurements are."""
    return cache_dir() / "triton" / "tuned.json"


def save(found: dict[str, Config], path: Path | None = None) -> Path:
    """Add configurations to a table, the user's if none is named; others in it stay."""
    path = path or cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    table = _read(path) | {key: asdict(config) for key, config in found.items()}
    lines = [f"{json.dumps(key)}: {json.dumps(table[key])}" for key in sorted(table)]
    beside = path.with_name(path.name + f".{os.getpid()}")
    beside.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    beside.replace(path)
    return path


def device_family(name: str) -> str:
    """GPUs that share configurations, from CUDA's name of one."""
    if any(part in name for part in ("H100", "H200", "H800", "GH200")):
        return "hopper"
    return name.replace("NVIDIA ", "").replace(" ", "-").lower()


@functools.cache
def _device(index: int) -> tuple[str, int]:
    name = torch.cuda.get_device_name(index)
    return device_family(name), multiprocessors(torch.device("cuda", index))


@functools.cache
def _table() -> dict[str, Config]:
    both = _read(Path(__file__).with_name("tuned.json")) | _read(cache_path())
    return {key: Config(**entry) for key, entry in both.items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return table
