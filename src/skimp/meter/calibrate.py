"""What bytes and operations do not explain: how this engine runs on this machine.

Half a dozen small decoders of random weights are timed through the engine itself. Differences
between them give the cost of a step, of a layer, of a sequence and of a logit; a wide one gives the
rate of matrix products by number of rows, and long contexts that of attention. Shapes that users
run are none of the probes, so a prediction is not a copy of its own measurement.

It takes a few seconds and is kept beside the machine's own figures. Low-bit formats are measured
one by one, when an engine first uses them.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skimp.cost import (
    Hardware,
    Overheads,
    SequenceStep,
    predict,
    step_cost,
    this_machine,
    uniform,
)
from skimp.cost.hardware import Curve
from skimp.cost.machine import cache_dir, cpu_model, kept
from skimp.cost.work import arithmetic
from skimp.meter.work import engine_threads, spec_work

if TYPE_CHECKING:
    from skimp.engine import Engine
    from skimp.formats.weight import WeightFormat
    from skimp.model.spec import ModelSpec

_FORMAT = 5  # of the file; raise it whenever what is measured changes
_ROWS = (1, 4, 8, 16, 32, 64)
_PREFILL = (128, 512)
_WALKS = (4, 16, 64)  # sequences whose caches fit a processor's cache, or do not
_SHORT, _LONG = 16, 512


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
        if measure or path(name).exists():
            probed = kept(path(name), partial(measure_format, found, form, dtype, options))
            rates = {**found.matrix_tflops, name: probed.matrix_tflops[name]}
            found = replace(found, matrix_tflops=rates)
    return found


def measure_engine(hardware: Hardware, *, dtype: str, options: dict[str, Any]) -> Hardware:
    """``hardware`` with matrix and attention rates and overheads as the engine shows them."""
    thin, deep = _spec(layers=2), _spec(layers=10)
    wordy = _spec(layers=2, vocab=16384)
    with _Probe(thin, dtype, options) as probe:
        one, many = probe.step_s(1, _SHORT), probe.step_s(32, _SHORT)
    with _Probe(deep, dtype, options) as probe:
        deep_one, deep_many = probe.step_s(1, _SHORT), probe.step_s(32, _SHORT)
    with _Probe(wordy, dtype, options) as probe:
        wordy_many = probe.step_s(32, _SHORT)
    layers = deep.num_layers - thin.num_layers
    layer = max(0.0, (deep_one - one) / layers)
    layer_row = max(0.0, ((deep_many - deep_one) - (many - one)) / layers / 31)
    sequence = max(0.0, (many - one) / 31 - thin.num_layers * layer_row)
    logit = max(0.0, (wordy_many - many) / 32 / (wordy.vocab_size - thin.vocab_size))
    overheads = Overheads(
        step_s=max(0.0, one - thin.num_layers * layer - sequence),
        layer_s=layer,
        sequence_s=sequence,
        layer_row_s=layer_row,
        logit_s=logit,
    )
    bare = replace(hardware, overheads=overheads)
    with _Probe(_wide(), dtype, options) as probe:
        matrix = probe.matrix_curve(bare)
        bare = replace(bare, matrix_tflops={**bare.matrix_tflops, dtype: matrix})
        bare = replace(bare, attention_tflops=probe.attention_rate(bare))
        walks = tuple(probe.cache_rate(bare, batch) for batch in _WALKS)
        return replace(bare, attention_curve=walks)


def measure_format(
    hardware: Hardware, form: WeightFormat, dtype: str, options: dict[str, Any]
) -> Hardware:
    """``hardware``, which knows its overheads, with the rate of products in ``form``."""
    wide = _wide()
    matrices = [m.name for m in spec_work(wide, dtype).matrices if not m.head]
    with _Probe(replace(wide, formats=dict.fromkeys(matrices, form)), dtype, options) as probe:
        curve = probe.matrix_curve(hardware)
    return replace(hardware, matrix_tflops={**hardware.matrix_tflops, arithmetic(form): curve})


class _Probe:
    """An engine around one small decoder, timed in several ways."""

    def __init__(self, spec: ModelSpec, dtype: str, options: dict[str, Any]) -> None:
        from skimp.engine import Engine, EngineOptions
        from skimp.model.loading import random_decoder

        self.engine = Engine(
            random_decoder(spec, seed=0, dtype=dtype),
            tokenizer=None,
            options=EngineOptions(
                max_batch=64, max_context=_LONG + 128, token_budget=_LONG, **options
            ),
        )
        self.work = self.engine.work
        self.rng = random.Random(0)

    def __enter__(self) -> _Probe:
        return self

    def __exit__(self, *exc: object) -> None:
        del self.engine

    def prompts(self, batch: int, context: int) -> list[list[int]]:
        from skimp.meter.speed import random_prompt

        return [random_prompt(self.rng, self.work.embedding_rows, context) for _ in range(batch)]

    def step_s(self, batch: int, context: int) -> float:
        """A step's time when nothing disturbs it: the fastest of 20 to 160."""
        from skimp.meter.speed import time_generation

        prompts = self.prompts(batch, context)
        best, start = float("inf"), time.perf_counter()
        for _ in range(8):
            best = min(best, *time_generation(self.engine, prompts, 20)[0])
            if time.perf_counter() - start > 0.6:
                break
        return best

    def prefill_s(self, context: int, repeat: int = 3) -> float:
        from skimp.meter.speed import time_prefill

        return min(time_prefill(self.engine, self.prompts(1, context)) for _ in range(repeat))

    def matrix_curve(self, hardware: Hardware) -> Curve:
        """(rows, TFLOP/s) from one row to a long prompt."""
        rates = [(n, self.matrix_rate(hardware, n)) for n in _ROWS]
        rates += [(n, self.prefill_rate(hardware, n)) for n in _PREFILL]
        return tuple((float(n), rate) for n, rate in rates)

    def matrix_rate(self, hardware: Hardware, batch: int) -> float:
        """TFLOP/s that explain a step of ``batch`` rows once the overheads are taken off."""
        steps = [SequenceStep(context=_SHORT)] * batch
        return self._rate(hardware, steps, self.step_s(batch, _SHORT), "matmul")

    def prefill_rate(self, hardware: Hardware, tokens: int) -> float:
        steps = [SequenceStep(context=tokens, tokens=tokens)]
        return self._rate(hardware, steps, self.prefill_s(tokens), "matmul")

    def attention_rate(self, hardware: Hardware) -> float:
        """TFLOP/s of attention in a prefill."""
        steps = [SequenceStep(context=_LONG, tokens=_LONG)]
        return self._rate(hardware, steps, self.prefill_s(_LONG), "attention")

    def cache_rate(self, hardware: Hardware, batch: int) -> tuple[float, float]:
        """Cache bytes of a step, and the GB/s at which one query a sequence walks them: what a
        longer past costs."""
        few, many = _SHORT, _LONG
        seconds = self.step_s(batch, many) - self.step_s(batch, few)
        costs = [step_cost(self.work, uniform(batch, n + 10)) for n in (few, many)]
        more = costs[1].cache_read_bytes - costs[0].cache_read_bytes
        pace = min(more / max(seconds, 1e-6) / 1e9, hardware.bandwidth(1.0))
        return float(costs[1].cache_read_bytes), pace

    def _rate(
        self, hardware: Hardware, steps: Sequence[SequenceStep], seconds: float, kind: str
    ) -> float:
        cost = step_cost(self.work, steps)
        predicted = predict(cost, hardware)
        kinds = [term.kind for term in cost.terms]
        others = sum(t.seconds for t, k in zip(predicted.terms, kinds) if k != kind)
        flops = cost.matmul_flops if kind == "matmul" else cost.attention_flops
        # Whatever is left belongs to this kind; at least a tenth, lest noise make it instant.
        left = max(seconds - predicted.overhead_s - others, 0.1 * seconds)
        return flops / left / 1e12


def _wide() -> ModelSpec:
    """Matrices large enough that products are most of a step."""
    return _spec(layers=3, hidden=512, inner=2048, heads=8, vocab=512)


def _spec(
    *,
    layers: int,
    hidden: int = 64,
    inner: int = 64,
    heads: int = 1,
    vocab: int = 256,
) -> ModelSpec:
    from skimp.model.spec import AttentionSpec, GatedFFNSpec, LayerSpec, ModelSpec, RopeSpec

    layer = LayerSpec(
        mixer=AttentionSpec(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=64,
            rope=RopeSpec(theta=1e4, rotary_dim=64),
            scale=0.125,
        ),
        ffn=GatedFFNSpec(intermediate_size=inner),
    )
    return ModelSpec(
        family="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        layers=(layer,) * layers,
        norm_eps=1e-5,
        max_positions=4096,
        tie_embeddings=True,
    )


def _kernels(backend: str) -> str:
    """The native kernels' instruction set and a hash of their file: other kernels, other rates."""
    if backend != "native":
        return ""
    from skimp.kernels.native.library import library

    kernels = library()
    file = kernels.__file__
    assert file is not None
    return f"{kernels.isa()} {hashlib.sha256(Path(file).read_bytes()).hexdigest()}"
