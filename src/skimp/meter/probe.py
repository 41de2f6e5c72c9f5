"""A small decoder of random weights in an engine of its own, to be timed.

All its layers are copies of one: how long a step takes depends on where weights lie, not on what
they are, and copies are quick to make.
"""

from __future__ import annotations

import random
import statistics
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from skimp.cost import SequenceStep, uniform
from skimp.errors import SkimpWarning
from skimp.meter.work import spec_work

if TYPE_CHECKING:
    from skimp.formats.weight import WeightFormat
    from skimp.model.decoder import Decoder
    from skimp.model.spec import ModelSpec

CONTEXT = 512  # the longest prompt that is timed
PASSES = 5
SETTLES = 64e6  # bytes of weights that some cache may hold
GROWS = 8  # tokens, until half of the steps are timed
PATIENCE_S = 10.0  # fewer passes will have to do


class FormatRefused(Exception):
    """The engine holds a format's matrices as something else, so timing them says nothing of it."""


class Probe:
    """An engine around one small decoder. Raises FormatRefused."""

    def __init__(self, spec: ModelSpec, dtype: str, options: dict[str, Any]) -> None:
        from skimp.engine import Engine, EngineOptions

        chosen = EngineOptions(
            max_batch=64, max_context=CONTEXT + 128, token_budget=CONTEXT, **options
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error", SkimpWarning)  # of a matrix that is held otherwise
            try:
                self.engine = Engine(repeated_decoder(spec, dtype), None, chosen)
            except SkimpWarning as refusal:
                raise FormatRefused(str(refusal)) from None
        self.work = self.engine.work
        self.rng = random.Random(0)

    def prompts(self, batch: int, context: int) -> list[list[int]]:
        from skimp.meter.speed import random_prompt

        return [random_prompt(self.rng, self.work.embedding_rows, context) for _ in range(batch)]

    def step_s(self, batch: int, context: int) -> float:
        """The median of a few steps. What almost fits a cache settles in it only after several
        others, and what does not fit never does."""
        from skimp.meter.speed import time_generation

        steps = 16 if batch <= 8 and self.work.resident_weight_bytes < SETTLES else 6
        times, _ = time_generation(self.engine, self.prompts(batch, context), steps)
        return statistics.median(times)

    def prefill_s(self, context: int) -> float:
        from skimp.meter.speed import time_prefill

        return time_prefill(self.engine, self.prompts(1, context))


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What is timed of a probe: a step of ``rows`` sequences of ``context`` tokens, or the prefill
    of one prompt."""

    probe: Probe
    context: int
    rows: int = 1
    prefill: bool = False

    def steps(self) -> list[SequenceStep]:
        """The step that was timed; its context grew by a few tokens meanwhile."""
        if self.prefill:
            return uniform(1, self.context, tokens=self.context)
        return uniform(self.rows, self.context + GROWS)


def time_all(timings: Iterable[Timing], passes: int = PASSES) -> dict[Timing, list[float]]:
    """Seconds of each, in ``passes`` through all of them in their order, so that a slow moment
    disturbs one pass of each, and neighbours alike. One pass before them does not count."""
    found: dict[Timing, list[float]] = {timing: [] for timing in timings}
    start = time.perf_counter()
    for index in range(passes + 1):
        if index > 1 and time.perf_counter() - start > PATIENCE_S:
            break
        for timing, own in found.items():
            probe = timing.probe
            if timing.prefill:
                own.append(probe.prefill_s(timing.context))
            else:
                own.append(probe.step_s(timing.rows, timing.context))
    return {timing: own[1:] for timing, own in found.items()}


def repeated_decoder(spec: ModelSpec, dtype: str) -> Decoder:
    """A decoder of ``spec``, whose layers are alike, with random weights; each layer has memory of
    its own."""
    from skimp.formats.weight import QuantizedWeight
    from skimp.model.layers import Linear
    from skimp.model.loading import assign, empty_decoder, parameter_shapes, random_decoder

    assert len(set(spec.layers)) == 1
    kept = {n: f for n, f in spec.formats.items() if not n.startswith("layers.")}
    first = {n: f for n, f in spec.formats.items() if n.startswith("layers.0.")}
    one = random_decoder(
        replace(spec, layers=spec.layers[:1], formats={**kept, **first}), dtype=dtype
    )
    decoder = empty_decoder(spec)
    for name in parameter_shapes(spec):
        parts = name.split(".")
        if parts[0] == "layers":
            parts[1] = "0"
        module = one.get_submodule(".".join(parts[:-1]))
        matrix = getattr(module, "quantized", None)
        if isinstance(matrix, QuantizedWeight):
            linear = decoder.get_submodule(name.removesuffix(".weight"))
            assert isinstance(linear, Linear)
            zero = None if matrix.zero is None else matrix.zero.clone()
            linear.quantized = replace(
                matrix, values=matrix.values.clone(), scale=matrix.scale.clone(), zero=zero
            )
        else:
            assign(decoder, name, getattr(module, parts[-1]).detach().clone())
    return decoder


def probe_spec(
    *,
    layers: int,
    hidden: int = 64,
    inner: int = 64,
    heads: int = 1,
    vocab: int = 256,
    format: WeightFormat | None = None,
) -> ModelSpec:
    """Llama's shape; ``format`` is that of every matrix but the output matrix."""
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
    spec = ModelSpec(
        family="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        layers=(layer,) * layers,
        norm_eps=1e-5,
        max_positions=4096,
        tie_embeddings=True,
    )
    if format is None:
        return spec
    names = [m.name for m in spec_work(spec).matrices if not m.head]
    return replace(spec, formats=dict.fromkeys(names, format))
