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
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skimp.cost import (
    Hardware,
    ModelWork,
    Overheads,
    SequenceStep,
    StepCost,
    Term,
    predict,
    step_cost,
    this_machine,
    uniform,
)
from skimp.cost.machine import cache_dir, cpu_model, kept
from skimp.cost.work import arithmetic
from skimp.errors import SkimpWarning
from skimp.meter.probe import CONTEXT, FormatRefused, Probe, fastest, probe_spec
from skimp.meter.work import engine_threads, spec_work

if TYPE_CHECKING:
    from skimp.engine import Engine
    from skimp.formats.weight import WeightFormat
    from skimp.model.spec import ModelSpec

_FORMAT = 6  # of the file; raise it whenever what is measured changes
_ROWS = (1, 4, 8, 16, 32, 64)
_PREFILL = (128, 512)
_FAR_ROWS = (1, 4, 8, 16)  # more rows hide the memory's time, or all that they ever will
_WALKS = (4, 16, 64)  # sequences whose caches fit a processor's cache, or do not
_SHORT, _LONG = 4, CONTEXT
_NEAR = 16e6  # bytes of weights that fit a processor's cache,
_FAR = (64e6, 400e6)  # and from where to where they are likely not to
_TURN = 0.2  # seconds that a figure is worth


def engine_hardware(engine: Engine) -> Hardware:
    """The machine as ``engine`` uses it: its backend, dtype and threads."""
    return calibrated(
        dtype=str(engine.dtype).removeprefix("torch."),
        device=engine.options.device,
        backend=engine.backend_name,
        threads=engine_threads(engine),
        deterministic=engine.options.deterministic,
        formats=[m.format for m in engine.work.matrices if m.format is not None],
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
) -> Hardware:
    """The machine at hand with the engine's own rates and overheads, from an earlier calibration
    if there is one. A GPU is taken from the table. Without ``measure`` only what is known already
    is used."""
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
    found = kept(path(), lambda: measure_engine(hardware, dtype=dtype, options=options))
    for name, form in {arithmetic(form): form for form in formats}.items():
        if not (measure or path(name).exists()):
            continue
        try:
            probed = kept(path(name), partial(measure_format, found, form, dtype, options))
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
    bare = replace(hardware, weights_curve=(), exposed={})
    bare = replace(bare, overheads=_overheads(dtype, options))
    near = Probe(_wide(_layers(dtype, _NEAR)), dtype, options)

    def rate(steps: list[SequenceStep], *case: int, prefill: bool = False) -> float:
        (took,) = fastest([near], *case, prefill=prefill, seconds=_TURN)
        return _rate(bare, near.work, steps, took, dtype)

    curve = [(float(n), rate(_steps(n), n, _SHORT)) for n in _ROWS]
    curve += [(float(n), rate(_prompt(n), 1, n, prefill=True)) for n in _PREFILL]
    bare = replace(bare, matrix_tflops={**bare.matrix_tflops, dtype: tuple(curve)})
    return _with_weights(_with_attention(bare, near), dtype, options)


def _overheads(dtype: str, options: dict[str, Any]) -> Overheads:
    thin, deep = probe_spec(layers=2), probe_spec(layers=10)
    wordy = probe_spec(layers=2, vocab=16384)
    probes = [Probe(spec, dtype, options) for spec in (thin, deep, wordy)]
    one, deep_one, _ = fastest(probes, 1, _SHORT, seconds=3 * _TURN)
    many, deep_many, wordy_many = fastest(probes, 32, _SHORT, seconds=3 * _TURN)
    layers = deep.num_layers - thin.num_layers
    layer = max(0.0, (deep_one - one) / layers)
    layer_row = max(0.0, ((deep_many - deep_one) - (many - one)) / layers / 31)
    sequence = max(0.0, (many - one) / 31 - thin.num_layers * layer_row)
    return Overheads(
        step_s=max(0.0, one - thin.num_layers * layer - sequence),
        layer_s=layer,
        sequence_s=sequence,
        layer_row_s=layer_row,
        logit_s=max(0.0, (wordy_many - many) / 32 / (wordy.vocab_size - thin.vocab_size)),
    )


def _with_attention(hardware: Hardware, probe: Probe) -> Hardware:
    """``hardware``, which knows its matrix rates, with those of attention: in a prefill, and for
    one query a sequence what a longer past costs."""
    (took,) = fastest([probe], 1, _LONG, prefill=True, seconds=_TURN)
    cost = step_cost(probe.work, _prompt(_LONG))
    left = _left(hardware, cost, took, lambda term: term.kind == "attention")
    found = replace(hardware, attention_tflops=cost.attention_flops / left / 1e12)
    walks = []
    for batch in _WALKS:
        (few,) = fastest([probe], batch, _SHORT, seconds=_TURN)
        (many,) = fastest([probe], batch, _LONG, seconds=_TURN)
        costs = [step_cost(probe.work, uniform(batch, n + 3)) for n in (_SHORT, _LONG)]
        more = costs[1].cache_read_bytes - costs[0].cache_read_bytes
        pace = min(more / max(many - few, 1e-6) / 1e9, hardware.bandwidth(1.0))
        walks.append((float(costs[1].cache_read_bytes), pace))
    return replace(found, attention_curve=tuple(walks))


def _with_weights(hardware: Hardware, dtype: str, options: dict[str, Any]) -> Hardware:
    """``hardware``, which knows its other rates, with the pace of weights from caches and memory,
    and how much of their way shows."""
    curve: list[tuple[float, float]] = []
    for layers in dict.fromkeys(_layers(dtype, size) for size in _sizes(hardware)):
        probe = Probe(_wide(layers), dtype, options)
        (took,) = fastest([probe], 1, _SHORT, seconds=_TURN)
        cost = step_cost(probe.work, _steps(1))
        pace = cost.weight_bytes / _left(hardware, cost, took, _is_product) / 1e9
        curve.append((cost.weight_bytes, min(pace, curve[-1][1]) if curve else pace))
    # One row of dense weights waits for all that comes late: that is how its pace was found.
    shares = [(1.0, 1.0)]
    found = replace(
        hardware, weights_curve=tuple(curve), exposed={**hardware.exposed, dtype: tuple(shares)}
    )
    for n in _FAR_ROWS[1:]:
        (took,) = fastest([probe], n, _SHORT, seconds=_TURN)
        shares.append((float(n), _share(found, probe.work, n, took, dtype)))
    return replace(found, exposed={**found.exposed, dtype: tuple(shares)})


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


def measure_format(
    hardware: Hardware, form: WeightFormat, dtype: str, options: dict[str, Any]
) -> Hardware:
    """``hardware``, which knows the engine, with how it multiplies by matrices in ``form``.

    The same shapes in ``dtype`` are timed in turn with them, and what the machine is slower or
    faster now than ``hardware`` says of those is taken off. Raises FormatRefused.
    """
    name = arithmetic(form)
    near = _Pair(_NEAR, form, dtype, options)
    curve = [(float(n), near.rate(hardware, _steps(n), n, _SHORT)) for n in _ROWS]
    curve += [(float(n), near.rate(hardware, _prompt(n), 1, n, prefill=True)) for n in _PREFILL]
    found = replace(hardware, matrix_tflops={**hardware.matrix_tflops, name: tuple(curve)})
    far_bytes = hardware.weights_curve[-1][0] if hardware.weights_curve else 0.0
    shares = [(1.0, 0.0)]
    # Where arithmetic alone takes several times as long as memory, nothing of it shows.
    if far_bytes and 8 * _bytes_a_flop(form) * curve[0][1] * 1e3 > hardware.bandwidth_gb_s:
        far = _Pair(far_bytes, form, dtype, options)
        shares = [(float(n), far.share(found, name, n)) for n in _FAR_ROWS]
    return replace(found, exposed={**found.exposed, name: tuple(shares)})


class _Pair:
    """Probes of one number of bytes, dense and in a format."""

    def __init__(
        self, size: float, form: WeightFormat, dtype: str, options: dict[str, Any]
    ) -> None:
        self.name = arithmetic(form)
        self.dense = Probe(_wide(_layers(dtype, size)), dtype, options)
        self.low = Probe(_wide(_layers(dtype, size, form), form), dtype, options)

    def seconds(
        self, hardware: Hardware, steps: Sequence[SequenceStep], *case: int, prefill: bool = False
    ) -> float:
        """What a step in the format takes, on the machine as ``hardware`` knows it."""
        dense, low = fastest([self.dense, self.low], *case, prefill=prefill)
        return low * predict(step_cost(self.dense.work, steps), hardware).seconds / dense

    def rate(
        self, hardware: Hardware, steps: Sequence[SequenceStep], *case: int, prefill: bool = False
    ) -> float:
        seconds = self.seconds(hardware, steps, *case, prefill=prefill)
        return _rate(hardware, self.low.work, steps, seconds, self.name)

    def share(self, hardware: Hardware, name: str, batch: int) -> float:
        seconds = self.seconds(hardware, _steps(batch), batch, _SHORT)
        return _share(hardware, self.low.work, batch, seconds, name)


def _rate(
    hardware: Hardware,
    work: ModelWork,
    steps: Sequence[SequenceStep],
    seconds: float,
    name: str,
) -> float:
    """TFLOP/s of products in ``name`` that explain a step's time."""
    cost = step_cost(work, steps)

    def mine(term: Term) -> bool:
        return term.kind == "matmul" and (term.arithmetic or cost.compute_dtype) == name

    flops = sum(term.flops for term in cost.terms if mine(term))
    return flops / _left(hardware, cost, seconds, mine) / 1e12


def _share(hardware: Hardware, work: ModelWork, batch: int, seconds: float, name: str) -> float:
    """The share of what weights come late that explains a step's time beyond its arithmetic."""
    cost = step_cost(work, _steps(batch))
    full = replace(hardware, exposed={**hardware.exposed, name: ((1.0, 1.0),)})
    none = replace(hardware, exposed={**hardware.exposed, name: ((1.0, 0.0),)})
    least, most = predict(cost, none).seconds, predict(cost, full).seconds
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


def _is_product(term: Term) -> bool:
    return term.kind == "matmul"


def _steps(batch: int) -> list[SequenceStep]:
    return [SequenceStep(context=_SHORT + 3)] * batch


def _prompt(tokens: int) -> list[SequenceStep]:
    return [SequenceStep(context=tokens, tokens=tokens)]


def _wide(layers: int, form: WeightFormat | None = None) -> ModelSpec:
    """Matrices large enough that products are most of a step."""
    return probe_spec(layers=layers, hidden=512, inner=2048, heads=8, vocab=512, format=form)


def _layers(dtype: str, size: float, form: WeightFormat | None = None) -> int:
    """Layers of :func:`_wide` that hold about ``size`` bytes."""
    matrices = spec_work(_wide(1, form), dtype).matrices
    return max(1, round(size / sum(m.bytes for m in matrices if not m.head)))


def _bytes_a_flop(form: WeightFormat) -> float:
    """Of a product with one row."""
    return form.bits_per_weight(512) / 16


def _kernels(backend: str) -> str:
    """The native kernels' instruction set and a hash of their file: other kernels, other rates."""
    if backend != "native":
        return ""
    from skimp.kernels.native.library import library

    kernels = library()
    file = kernels.__file__
    assert file is not None
    return f"{kernels.isa()} {hashlib.sha256(Path(file).read_bytes()).hexdigest()}"
