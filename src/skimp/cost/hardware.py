"""What a machine can do, and how long a step takes on it at best: the roofline.

Operation classes do not overlap (a layer's attention waits for its projections), so the predicted
time is the sum over classes of the larger of memory time and arithmetic time, plus what every
step, layer and row costs whatever its size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from skimp.cost.work import StepCost, Term

Source = Literal["measured", "datasheet"]
Curve = tuple[tuple[float, float], ...]  # (x, y) with x ascending


def interpolate(curve: Sequence[tuple[float, float]], x: float) -> float:
    """``y`` at ``x``, linear in both logarithms, constant beyond the ends."""
    if x <= curve[0][0]:
        return curve[0][1]
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x <= x1:
            t = math.log(x / x0) / math.log(x1 / x0)
            return math.exp(math.log(y0) * (1 - t) + math.log(y1) * t)
    return curve[-1][1]


def _linear(curve: Sequence[tuple[float, float]], x: float) -> float:
    """``y`` at ``x``, linear in the logarithm of x alone: y may be 0."""
    if x <= curve[0][0]:
        return curve[0][1]
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x <= x1:
            return y0 + (y1 - y0) * math.log(x / x0) / math.log(x1 / x0)
    return curve[-1][1]


@dataclass(frozen=True, kw_only=True)
class Overheads:
    """Seconds that bytes and operations do not explain."""

    step_s: float = 0.0  # scheduling, launching, bookkeeping: once a step
    layer_s: float = 0.0  # dispatch and synchronisation: once a layer
    sequence_s: float = 0.0  # sampling, streaming: once a sequence that emits a token
    layer_row_s: float = 0.0  # norms, rotary, casts: once a row and layer
    logit_s: float = 0.0  # sampling: once a logit

    def seconds(self, cost: StepCost) -> float:
        return (
            self.step_s
            + self.layer_s * cost.layers
            + self.sequence_s * min(cost.sequences, cost.logit_rows)
            + self.layer_row_s * cost.layers * cost.rows
            + self.logit_s * cost.logit_rows * cost.vocab_size
        )


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A machine. Bandwidths in GB/s (1e9 bytes), rates in TFLOP/s.

    ``bandwidth_gb_s`` is what the memory beyond all caches gives and what limits are quoted
    against. ``bandwidth_curve`` gives (working-set bytes, GB/s): a model that fits a cache is read
    at the cache's pace. ``matrix_tflops`` gives per dtype, and per arithmetic of a low-bit format,
    (rows, TFLOP/s): few rows do not fill the units. ``attention_curve`` gives (cache bytes a step
    reads, GB/s): how fast attention's kernel walks scattered pages, where that is slower than the
    memory streams.

    Where products were measured as they run, two more curves replace the roofline's "the larger of
    two times". ``weights_curve`` gives (working-set bytes, GB/s) of a product that streams dense
    weights for one row; its first point is the cache in which ``matrix_tflops`` were measured.
    ``exposed`` gives per dtype and arithmetic (rows, share) of the time by which weights arrive
    later than from there that is not hidden behind arithmetic.
    """

    name: str
    kind: Literal["cpu", "gpu"]
    source: Source
    note: str
    bandwidth_gb_s: float
    matrix_tflops: Mapping[str, Curve]
    attention_tflops: float
    memory_bytes: float
    bandwidth_curve: Curve = ()
    attention_curve: Curve = ()
    weights_curve: Curve = ()
    exposed: Mapping[str, Curve] = field(default_factory=dict)
    overheads: Overheads = field(default_factory=Overheads)
    threads: int | None = None

    def bandwidth(self, working_set: float) -> float:
        """GB/s when ``working_set`` bytes are read again and again."""
        if not self.bandwidth_curve:
            return self.bandwidth_gb_s
        return interpolate(self.bandwidth_curve, working_set)

    def matrix_rate(self, dtype: str, rows: int, arithmetic: str | None = None) -> float:
        """TFLOP/s of a product with ``rows`` rows. An ``arithmetic`` that is not listed counts as
        ``dtype``'s, to which weights can always be widened. Raises ValueError for a dtype not
        listed."""
        if arithmetic is not None and arithmetic in self.matrix_tflops:
            return interpolate(self.matrix_tflops[arithmetic], rows)
        if dtype not in self.matrix_tflops:
            known = ", ".join(sorted(self.matrix_tflops))
            raise ValueError(f"dtype: no {dtype} matrix rate is known for {self.name} ({known})")
        return interpolate(self.matrix_tflops[dtype], rows)

    def waiting_s(self, term: Term, dtype: str, working_set: float) -> float | None:
        """Seconds that a product waits for weights on top of its arithmetic; None where that was
        not measured."""
        how = dtype
        if term.arithmetic is not None and term.arithmetic in self.matrix_tflops:
            how = term.arithmetic
        if not self.weights_curve or how not in self.exposed:
            return None
        cached, here = self.weights_curve[0][1], interpolate(self.weights_curve, working_set)
        later = term.weight_bytes * (1 / min(here, cached) - 1 / cached) / 1e9
        return later * _linear(self.exposed[how], term.rows)

    def limit_s(self, cost: StepCost) -> float:
        """Seconds to read the step's weights and cache once: no step can be faster."""
        return cost.bytes_read / (self.limit_bandwidth(cost) * 1e9)

    def limit_bandwidth(self, cost: StepCost) -> float:
        """GB/s that the limit divides by: of the memory, or of the cache the model fits in."""
        return max(self.bandwidth_gb_s, self.bandwidth(cost.bytes_read))

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "source": self.source,
            "note": self.note,
            "bandwidth_gb_s": self.bandwidth_gb_s,
            "bandwidth_curve": [list(p) for p in self.bandwidth_curve],
            "matrix_tflops": {k: [list(p) for p in v] for k, v in self.matrix_tflops.items()},
            "attention_tflops": self.attention_tflops,
            "attention_curve": [list(p) for p in self.attention_curve],
            "weights_curve": [list(p) for p in self.weights_curve],
            "exposed": {k: [list(p) for p in v] for k, v in self.exposed.items()},
            "memory_bytes": self.memory_bytes,
            "threads": self.threads,
            "overheads": {
                "step_s": self.overheads.step_s,
                "layer_s": self.overheads.layer_s,
                "sequence_s": self.overheads.sequence_s,
                "layer_row_s": self.overheads.layer_row_s,
                "logit_s": self.overheads.logit_s,
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Hardware:
        """Inverse of :meth:`as_dict`; KeyError or TypeError on anything else."""
        values = dict(data)
        for name in ("bandwidth_curve", "attention_curve", "weights_curve"):
            values[name] = tuple((p[0], p[1]) for p in data[name])
        for name in ("matrix_tflops", "exposed"):
            values[name] = {k: tuple((p[0], p[1]) for p in v) for k, v in data[name].items()}
        values["overheads"] = Overheads(**data["overheads"])
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class TermTime:
    """Seconds of one term: the larger of memory's and arithmetic's, or where it is known how long
    arithmetic waits for memory, arithmetic and that."""

    name: str
    memory_s: float
    arithmetic_s: float
    waiting_s: float | None = None

    @property
    def seconds(self) -> float:
        if self.waiting_s is not None:
            return self.arithmetic_s + self.waiting_s
        return max(self.memory_s, self.arithmetic_s)

    @property
    def bound(self) -> str:
        return "memory" if self.memory_s >= self.arithmetic_s else "arithmetic"


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """A predicted step."""

    terms: tuple[TermTime, ...]
    overhead_s: float

    @property
    def seconds(self) -> float:
        return sum(t.seconds for t in self.terms) + self.overhead_s

    @property
    def bound(self) -> str:
        """What most of the time goes to: memory, arithmetic or overhead."""
        shares = {"memory": 0.0, "arithmetic": 0.0, "overhead": self.overhead_s}
        for term in self.terms:
            shares[term.bound] += term.seconds
        return max(shares, key=lambda name: shares[name])


def predict(cost: StepCost, hardware: Hardware) -> StepTime:
    """Roofline of ``cost`` on ``hardware``."""
    moved = cost.bytes_read + cost.cache_write_bytes + cost.activation_bytes
    weights_gb_s = hardware.bandwidth(moved)
    terms = []
    for term in cost.terms:
        read = term.weight_bytes + term.cache_read_bytes + term.cache_write_bytes
        memory = read / weights_gb_s
        # Activations pass from one product to the next through whatever cache one of them fits.
        memory += term.activation_bytes / hardware.bandwidth(max(1.0, term.activation_bytes / 16))
        waiting = None
        if term.kind == "matmul":
            waiting = hardware.waiting_s(term, cost.compute_dtype, moved)
            rate = hardware.matrix_rate(cost.compute_dtype, max(1, term.rows), term.arithmetic)
        else:
            rate = hardware.attention_tflops
            if hardware.attention_curve:
                pace = interpolate(hardware.attention_curve, max(1.0, cost.cache_read_bytes))
                memory = max(memory, read / pace)
        terms.append(
            TermTime(
                name=term.name,
                memory_s=memory / 1e9,
                arithmetic_s=term.flops / (rate * 1e12),
                waiting_s=waiting,
            )
        )
    return StepTime(terms=tuple(terms), overhead_s=hardware.overheads.seconds(cost))


def named_hardware() -> dict[str, Hardware]:
    """Machines known by name. Memory in bytes as sold (GB of 1e9 for GPUs, GiB for hosts)."""
    # A step of many small kernels costs about 40 us a layer on an H100, whatever the model:
    # fitted to vLLM 0.24 at batch 1 on an 8B and a 0.6B shape.
    gpu = Overheads(layer_s=40e-6)
    gib = float(1 << 30)

    def flat(int8: float = 0.0, fp8: float = 0.0, **rates: float) -> dict[str, Curve]:
        """The sheets' 8-bit rates are of products with both sides in 8 bits."""
        rates |= {"int8-a8": int8, "fp8-afp8": fp8}
        return {name: ((1.0, rate),) for name, rate in rates.items() if rate}

    machines = (
        Hardware(
            name="h100",
            kind="gpu",
            source="measured",
            note="H100 80GB HBM3; copy 2995 GB/s, bf16 GEMV 2744 GB/s, bf16 8192^3 776 TFLOP/s, "
            "cuDNN attention 598 TFLOP/s measured; other dtypes scaled from the datasheet",
            bandwidth_gb_s=2995.0,
            bandwidth_curve=((1.0, 2744.0),),
            matrix_tflops=flat(
                bfloat16=776.0,
                float16=776.0,
                float32=51.0,
                fp8=1400.0,
                int8=1400.0,
            ),
            attention_tflops=598.0,
            memory_bytes=80e9,
            overheads=gpu,
        ),
        Hardware(
            name="a100",
            kind="gpu",
            source="datasheet",
            note="A100 80GB SXM: 2039 GB/s, 312 bf16 TFLOP/s, derated to 90 % and 80 %",
            bandwidth_gb_s=2039.0,
            bandwidth_curve=((1.0, 1835.0),),
            matrix_tflops=flat(bfloat16=250.0, float16=250.0, float32=15.6, int8=500.0),
            attention_tflops=180.0,
            memory_bytes=80e9,
            overheads=gpu,
        ),
        Hardware(
            name="rtx4090",
            kind="gpu",
            source="datasheet",
            note="RTX 4090: 1008 GB/s, 165 bf16 TFLOP/s dense, derated to 90 % and 80 %",
            bandwidth_gb_s=1008.0,
            bandwidth_curve=((1.0, 907.0),),
            matrix_tflops=flat(bfloat16=132.0, float16=132.0, float32=66.0, fp8=264.0, int8=528.0),
            attention_tflops=110.0,
            memory_bytes=24e9,
            overheads=gpu,
        ),
        Hardware(
            name="laptop",
            kind="cpu",
            source="datasheet",
            note="8 AVX2 cores, two channels of DDR5-5600 (90 GB/s), 16 MiB of L3, 16 GiB",
            bandwidth_gb_s=70.0,
            bandwidth_curve=((8 << 20, 250.0), (32 << 20, 70.0)),
            matrix_tflops=flat(bfloat16=0.45, float16=0.45, float32=0.5, int8=1.5),
            attention_tflops=0.2,
            memory_bytes=16 * gib,
            overheads=Overheads(step_s=150e-6, layer_s=30e-6, sequence_s=40e-6),
            threads=8,
        ),
        Hardware(
            name="desktop",
            kind="cpu",
            source="datasheet",
            note="16 AVX-512 cores with bf16, two channels of DDR5-6000 (96 GB/s), 64 MiB of L3, "
            "64 GiB",
            bandwidth_gb_s=75.0,
            bandwidth_curve=((32 << 20, 600.0), (128 << 20, 75.0)),
            matrix_tflops=flat(bfloat16=3.0, float16=1.2, float32=1.5, int8=6.0),
            attention_tflops=0.8,
            memory_bytes=64 * gib,
            overheads=Overheads(step_s=150e-6, layer_s=30e-6, sequence_s=40e-6),
            threads=16,
        ),
        Hardware(
            name="server",
            kind="cpu",
            source="datasheet",
            note="one socket of 64 cores with AMX, eight channels of DDR5-5600 (358 GB/s), "
            "300 MiB of L3, 512 GiB",
            bandwidth_gb_s=290.0,
            bandwidth_curve=((128 << 20, 1200.0), (512 << 20, 290.0)),
            matrix_tflops=flat(bfloat16=60.0, float16=10.0, float32=6.0, int8=120.0),
            attention_tflops=4.0,
            memory_bytes=512 * gib,
            overheads=Overheads(step_s=150e-6, layer_s=40e-6, sequence_s=40e-6),
            threads=64,
        ),
    )
    return {m.name: m for m in machines}


def hardware_by_name(name: str) -> Hardware:
    """A machine of the table. Raises ValueError naming the ones there are."""
    table = named_hardware()
    if name not in table:
        raise ValueError(f"hardware: {name!r} is not one of {', '.join(table)}, this")
    return table[name]
