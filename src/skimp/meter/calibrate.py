"""What bytes and operations do not explain: how this engine runs on this machine.

Small decoders of random weights are timed through the engine itself. Differences between them give
the cost of a step, of a layer, of a sequence and of a logit. Wide ones that fit a cache give the
rate of matrix products by number of rows, longer contexts that of attention, and wide ones that
fit no cache how fast weights come from memory and how much of their way shows. Shapes that users
run are none of the probes, so a prediction is not a copy of its own measurement.

It takes some seconds and is kept beside the machine's own figures. Low-bit formats are measured one
by one, when an engine first uses them, each in turn with dense matrices: the machine of that moment
cancels.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skimp.cost import (
    Hardware,
    Overheads,
    StepCost,
    Term,
    predict,
    step_cost,
    this_machine,
)
from skimp.cost.hardware import Curve
from skimp.cost.machine import cache_dir, cpu_model, kept
from skimp.cost.work import arithmetic
from skimp.errors import SkimpWarning
from skimp.meter.probe import CONTEXT, FormatRefused, Probe, Timing, probe_spec, time_all
from skimp.meter.work import engine_threads, spec_work

if TYPE_CHECKING:
    from skimp.engine import Engine
    from skimp.formats.weight import WeightFormat
    from skimp.model.spec import ModelSpec

_FORMAT = 7  # of the file; raise it whenever what is measured changes
_ROWS = (1, 4, 8, 16, 32, 64)
_PREFILL = (128, 512)
_FAR_ROWS = (1, 4, 8, 16)  # more rows hide the memory's time, or all that they ever will
_WALKS = (4, 16, 64)  # sequences whose caches fit a processor's cache, or do not
_SHORT, _LONG = 4, CONTEXT
_MANY = 32
_NEAR = 16e6  # bytes of weights that fit a processor's cache,
_FAR = (64e6, 400e6)  # and from where to where they are likely not to


def engine_hardware(engine: Engine, *, max_age_s: float = math.inf) -> Hardware:
    """The machine as ``engine`` uses it: its backend, dtype and threads."""
    return calibrated(
        dtype=str(engine.dtype).removeprefix("torch."),
        device=engine.options.device,
        backend=engine.backend_name,
        threads=engine_threads(engine),
        deterministic=engine.options.deterministic,
        formats=[m.format for m in engine.work.matrices if m.format is not None],
        max_age_s=max_age_s,
    )


def calibrated(
    *,
    dtype: str,
    device: str,
    backend: str,
    threads: int,
    deterministic: bool = False,
    formats: Iterable[WeightFormat] = (),
    measure: bool = True,
    max_age_s: float = math.inf,
) -> Hardware:
    """The machine at hand with the engine's own rates and overheads, from an earlier calibration
    if there is one of at most ``max_age_s`` seconds. A GPU is measured by itself, not through the
    engine. Without ``measure`` only what is known already is used."""
    import torch

    import skimp

    hardware = this_machine(threads=threads, device=device)
    if device != "cpu":
        return hardware
    key = (
        _FORMAT, skimp.__version__, torch.__version__, cpu_model(), threads, dtype, backend,
        deterministic, _kernels(backend),
    )  # fmt: skip

    def path(*more: str) -> Path:
        digest = hashlib.sha256(repr((*key, *more)).encode()).hexdigest()[:16]
        return cache_dir() / f"engine-{digest}.json"

    options = {"backend": backend, "threads": threads, "deterministic": deterministic}
    if not (measure or path().exists()):
        return hardware
    found = base = kept(
        path(),
        lambda: measure_engine(hardware, dtype=dtype, options=options),
        max_age_s=max_age_s,
    )
    for name, form in {arithmetic(form): form for form in formats}.items():
        file = path(name, repr(base))  # another base, other figures beside it
        if not (measure or file.exists()):
            continue
        try:
            probed = kept(file, partial(measure_format, base, form, dtype, options))
        except FormatRefused as refusal:
            message = f"calibration: products of {form.name} count as {dtype}'s: {refusal}"
            warnings.warn(message, SkimpWarning, stacklevel=2)
            continue
        rates = {**found.matrix_tflops, name: probed.matrix_tflops[name]}
        exposed = {**found.exposed, name: probed.exposed[name]}
        found = replace(found, matrix_tflops=rates, exposed=exposed)
    return found


def measure_engine(hardware: Hardware, *, dtype: str, options: dict[str, Any]) -> Hardware:
    """``hardware`` with rates, paces and overheads as the engine shows them."""
    narrow = {
        name: Probe(spec, dtype, options)
        for name, spec in (
            ("thin", probe_spec(layers=2)),
            ("deep", probe_spec(layers=10)),
            ("wordy", probe_spec(layers=2, vocab=16384)),
        )
    }
    layers = dict.fromkeys(_layers(dtype, size) for size in _sizes(hardware))
    wide = [Probe(_wide(count), dtype, options) for count in layers]
    near, far = wide[0], wide[-1]
    small = [Timing(probe=p, rows=n, context=_SHORT) for p in narrow.values() for n in (1, _MANY)]
    products = _products(near)
    walks = [(Timing(probe=near, rows=n, context=c)) for n in _WALKS for c in (_SHORT, _LONG)]
    prefill = Timing(probe=near, context=_LONG, prefill=True)
    streams = [Timing(probe=probe, context=_SHORT) for probe in wide]
    shares = [Timing(probe=far, rows=n, context=_SHORT) for n in _FAR_ROWS]
    every = time_all([*small, *products, *walks, prefill, *streams, *shares])
    took = {timing: statistics.median(passes) for timing, passes in every.items()}

    found = replace(
        hardware,
        overheads=_overheads(narrow, {(t.probe, t.rows): took[t] for t in small}),
        weights_curve=(),
        exposed={},
    )
    rates = _curve(found, products, took, dtype)
    found = replace(found, matrix_tflops={**found.matrix_tflops, dtype: rates})
    found = _with_attention(found, prefill, walks, took)
    found = replace(found, weights_curve=_paces(found, streams, took))
    # One row of dense weights waits for all that comes late: that is how its pace was found.
    late = [(1.0, 1.0)]
    late += [(float(t.rows), _share(found, t, took[t], dtype)) for t in shares[1:]]
    return replace(found, exposed={**found.exposed, dtype: tuple(late)})


def measure_format(
    hardware: Hardware, form: WeightFormat, dtype: str, options: dict[str, Any]
) -> Hardware:
    """``hardware``, which knows the engine, with how it multiplies by matrices in ``form``.

    The same shapes in ``dtype`` are timed in turn with them, and what the machine is slower or
    faster now than ``hardware`` says of those is taken off. Raises FormatRefused.
    """
    name = arithmetic(form)
    far_bytes = hardware.weights_curve[-1][0]
    # PyTorch widens low-bit matrices before it multiplies, which hides whatever memory takes.
    sizes = (_NEAR,) if options["backend"] == "plain" else (_NEAR, far_bytes)
    dense = [Probe(_wide(_layers(dtype, size)), dtype, options) for size in sizes]
    low = [Probe(_wide(_layers(dtype, size, form), form), dtype, options) for size in sizes]
    near = _products(low[0])
    far = [Timing(probe=p, rows=n, context=_SHORT) for p in low[1:] for n in _FAR_ROWS]
    twins = {t: replace(t, probe=dense[low.index(t.probe)]) for t in (*near, *far)}
    took = time_all(timing for pair in twins.items() for timing in pair)

    def now(timing: Timing) -> float:
        twin = twins[timing]
        ratio = statistics.median(a / b for a, b in zip(took[timing], took[twin]))
        return ratio * predict(step_cost(twin.probe.work, twin.steps()), hardware).seconds

    own = {timing: now(timing) for timing in twins}
    rates = _curve(hardware, near, own, name)
    found = replace(hardware, matrix_tflops={**hardware.matrix_tflops, name: rates})
    late = tuple((float(t.rows), _share(found, t, own[t], name)) for t in far)
    return replace(found, exposed={**found.exposed, name: late or ((1.0, 0.0),)})


def _products(probe: Probe) -> list[Timing]:
    """What the rates of products are told from, from one row to a long prompt."""
    steps = [Timing(probe=probe, rows=n, context=_SHORT) for n in _ROWS]
    return [*steps, *(Timing(probe=probe, context=n, prefill=True) for n in _PREFILL)]


def _overheads(
    probes: Mapping[str, Probe], seconds: Mapping[tuple[Probe, int], float]
) -> Overheads:
    thin, deep, wordy = probes["thin"], probes["deep"], probes["wordy"]
    one, many = seconds[thin, 1], seconds[thin, _MANY]
    layers = len(deep.work.mixers) - len(thin.work.mixers)
    words = wordy.work.embedding_rows - thin.work.embedding_rows
    layer = max(0.0, (seconds[deep, 1] - one) / layers)
    deeper = seconds[deep, _MANY] - seconds[deep, 1] - (many - one)
    layer_row = max(0.0, deeper / layers / (_MANY - 1))
    sequence = max(0.0, (many - one) / (_MANY - 1) - len(thin.work.mixers) * layer_row)
    return Overheads(
        step_s=max(0.0, one - len(thin.work.mixers) * layer - sequence),
        layer_s=layer,
        sequence_s=sequence,
        layer_row_s=layer_row,
        logit_s=max(0.0, (seconds[wordy, _MANY] - many) / _MANY / words),
    )


def _with_attention(
    hardware: Hardware, prefill: Timing, walks: Sequence[Timing], took: Mapping[Timing, float]
) -> Hardware:
    """``hardware``, which knows its matrix rates, with those of attention: in a prefill, and for
    one query a sequence what a longer past costs. ``walks``: a short and a long past in turn."""
    cost = step_cost(prefill.probe.work, prefill.steps())
    left = _left(hardware, cost, took[prefill], lambda term: term.kind == "attention")
    curve = []
    for short, long in zip(walks[::2], walks[1::2]):
        read = [step_cost(t.probe.work, t.steps()).cache_read_bytes for t in (short, long)]
        pace = (read[1] - read[0]) / max(took[long] - took[short], 1e-6) / 1e9
        curve.append((read[1], min(pace, hardware.bandwidth(1.0))))
    return replace(
        hardware,
        attention_tflops=cost.attention_flops / left / 1e12,
        attention_curve=tuple(curve),
    )


def _paces(hardware: Hardware, streams: Sequence[Timing], took: Mapping[Timing, float]) -> Curve:
    """(bytes of a step, GB/s) of one row through ever more dense weights."""
    curve: list[tuple[float, float]] = []
    for timing in streams:
        cost = step_cost(timing.probe.work, timing.steps())
        left = _left(hardware, cost, took[timing], lambda term: term.kind == "matmul")
        pace = cost.weight_bytes / left / 1e9
        curve.append((cost.bytes_read, min(pace, curve[-1][1]) if curve else pace))
    return tuple(curve)


def _sizes(hardware: Hardware) -> list[float]:
    """Bytes from what fits a cache to what is beyond all of them, or as far as is reasonable."""
    sizes = [_NEAR]
    least, most = _FAR
    while sizes[-1] < min(most, hardware.memory_bytes / 16):
        sizes.append(sizes[-1] * 1.3)
        slow = hardware.bandwidth(sizes[-1]) < 1.25 * hardware.bandwidth_gb_s
        if slow and sizes[-1] > least:
            break
    return sizes


def _curve(
    hardware: Hardware, timings: Sequence[Timing], took: Mapping[Timing, float], name: str
) -> Curve:
    """(rows, TFLOP/s) of products in ``name`` that explain the timings."""

    def mine(term: Term) -> bool:
        return term.kind == "matmul" and (term.arithmetic or dtype) == name

    dtype = timings[0].probe.work.compute_dtype
    curve = []
    for timing in timings:
        cost = step_cost(timing.probe.work, timing.steps())
        flops = sum(term.flops for term in cost.terms if mine(term))
        curve.append((float(cost.rows), flops / _left(hardware, cost, took[timing], mine) / 1e12))
    return tuple(curve)


def _share(hardware: Hardware, timing: Timing, seconds: float, name: str) -> float:
    """The share of what weights come late that explains a step's time beyond its arithmetic."""
    cost = step_cost(timing.probe.work, timing.steps())

    def with_share(value: float) -> float:
        exposed = {**hardware.exposed, name: ((1.0, value),)}
        return predict(cost, replace(hardware, exposed=exposed)).seconds

    least, most = with_share(0.0), with_share(1.0)
    if most < 1.05 * least:  # this many bytes are no slower than the cache's
        return 0.0
    return min(max((seconds - least) / (most - least), 0.0), 2.0)


def _left(
    hardware: Hardware, cost: StepCost, seconds: float, mine: Callable[[Term], bool]
) -> float:
    """What of a step's time is left for some of its terms; at least a tenth, lest noise make them
    instant."""
    time_ = predict(cost, hardware)
    others = sum(t.seconds for t, term in zip(time_.terms, cost.terms) if not mine(term))
    return max(seconds - time_.overhead_s - others, 0.1 * seconds)


def _wide(layers: int, form: WeightFormat | None = None) -> ModelSpec:
    """Matrices large enough that products are most of a step."""
    return probe_spec(layers=layers, hidden=512, inner=2048, heads=8, vocab=512, format=form)


def _layers(dtype: str, size: float, form: WeightFormat | None = None) -> int:
    """Layers of :func:`_wide` that hold about ``size`` bytes."""
    matrices = spec_work(_wide(1, form), dtype).matrices
    return max(1, round(size / sum(m.bytes for m in matrices if not m.head)))


def _kernels(backend: str) -> str:
    """The native kernels' instruction set and a hash of their file: other kernels, other rates."""
    if backend != "native":
        return ""
    from skimp.kernels.native.library import library

    kernels = library()
    file = kernels.__file__
    assert file is not None
    return f"{kernels.isa()} {hashlib.sha256(Path(file).read_bytes()).hexdigest()}"
