"""The bench and the calibration, against an engine whose time is known."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace

import pytest
import torch

from skimp.cost import (
    Hardware,
    hardware_by_name,
    model_work,
    predict,
    step_cost,
    uniform,
)
from skimp.engine import Engine, EngineOptions
from skimp.formats.weight import WeightFormat
from skimp.meter import calibrate, speed
from skimp.meter.probe import FormatRefused, Timing, repeated_decoder, time_all
from skimp.meter.speed import (
    Case,
    bench,
    predict_prefill,
    prefill_costs,
    random_prompt,
    time_generation,
)
from skimp.meter.work import engine_threads, spec_work
from skimp.model.layers import Linear
from skimp.model.loading import random_decoder
from skimp.model.mixers.attention import cache_spec

SPEC = calibrate.probe_spec(layers=2)


def make_engine(**options) -> Engine:
    threads = torch.get_num_threads()
    options = {"max_batch": 4, "max_context": 128, "token_budget": 24, **options}
    engine = Engine(random_decoder(SPEC), None, EngineOptions(**options))
    torch.set_num_threads(threads)
    return engine


def test_work_of_an_engine_is_that_of_its_spec() -> None:
    engine = make_engine()
    assert engine.work == spec_work(SPEC, "float32")
    caches = [cache_spec(layer.mixer, torch.bfloat16) for layer in SPEC.layers]
    assert spec_work(SPEC) == model_work(SPEC, caches)
    assert engine_threads(engine) >= 1
    with pytest.raises(ValueError, match="dtype"):
        spec_work(SPEC, "int3")


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_every_timed_step_generates_for_every_sequence(prefix_cache: bool) -> None:
    engine = make_engine(prefix_cache=prefix_cache)
    prompts = [random_prompt(random.Random(i), SPEC.vocab_size, 40) for i in range(3)]
    times, contexts = time_generation(engine, prompts, 7)
    assert len(times) == 4
    assert all(t > 0 for t in times)
    # Half-way through the later half: five of the steps, and the head start of earlier sequences.
    assert min(contexts) >= 45
    assert max(contexts) < 60
    assert not engine.has_unfinished()


def test_a_case_that_does_not_fit_is_refused_and_leaves_nothing() -> None:
    engine = make_engine()
    with pytest.raises(ValueError, match="context"):
        bench(engine, [Case(batch=1, context=120, new_tokens=20)], hardware_by_name("desktop"))
    assert not engine.has_unfinished()


def test_bench_interleaves_rounds_and_reports_the_median() -> None:
    seen: list[str] = []
    engine = make_engine()
    cases = [Case(batch=1, context=8, new_tokens=3), Case(batch=3, context=30, new_tokens=3)]
    results = bench(engine, cases, hardware_by_name("desktop"), rounds=2, progress=seen.append)
    assert len(seen) == 6
    assert seen[2].startswith("batch 1, context 8: round 1")
    assert seen[3].startswith("batch 3, context 30: round 1")
    for result, case in zip(results, cases):
        assert result.case == case
        assert result.samples == 4
        assert len(result.contexts) == case.batch
        found = result.as_dict()
        assert found["tokens_per_s"] == pytest.approx(case.batch / found["ms_per_step"] * 1e3)
        cost = step_cost(engine.work, [s for c in result.contexts for s in uniform(1, c)])
        assert result.bytes_per_step == cost.bytes_read


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Case(batch=0, context=1), "batch"),
        (lambda: Case(batch=1, context=0), "context"),
        (lambda: Case(batch=1, context=1, new_tokens=0), "new_tokens"),
        (lambda: bench(SimpleNamespace(), [], hardware_by_name("h100")), "case"),
        (
            lambda: bench(
                SimpleNamespace(), [Case(batch=1, context=1)], hardware_by_name("h100"), rounds=0
            ),
            "rounds",
        ),
    ],
)
def test_bad_arguments_name_the_field(make, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        make()


def test_prompts_are_repeatable_distinct_and_in_the_vocabulary() -> None:
    prompts = [random_prompt(random.Random(7), 1000, 50) for _ in range(2)]
    assert prompts[0] == prompts[1]
    assert len(set(prompts[0])) > 40
    assert all(100 <= token < 1000 for token in prompts[0])


def test_prefill_is_predicted_in_the_engines_own_chunks() -> None:
    work, hardware = spec_work(SPEC), hardware_by_name("laptop")
    case = Case(batch=2, context=10)
    whole = predict_prefill(work, hardware, case, token_budget=100)
    assert whole == predict(step_cost(work, uniform(2, 10, tokens=10)), hardware).seconds
    chunked = predict_prefill(work, hardware, case, token_budget=4)
    # Five steps instead of one, each with its own overhead.
    assert chunked > whole + 3.9 * hardware.overheads.step_s


@pytest.mark.parametrize("budget", [4, 7, 100])
def test_prefill_computes_the_same_in_any_chunks(budget: int) -> None:
    costs = list(prefill_costs(spec_work(SPEC), Case(batch=2, context=10), budget))
    assert len(costs) == -(-20 // budget)
    whole = step_cost(spec_work(SPEC), uniform(2, 10, tokens=10))
    assert sum(cost.flops for cost in costs) == pytest.approx(whole.flops)


def known_machine() -> Hardware:
    """What the calibration has to find again."""
    desktop = hardware_by_name("desktop")
    return Hardware.from_dict(
        {
            **desktop.as_dict(),
            "bandwidth_curve": [[16e6, 400.0], [64e6, 75.0]],
            "matrix_tflops": {
                "float32": [[1.0, 0.1], [64.0, 0.4], [512.0, 1.0]],
                "int4": [[1.0, 0.07], [64.0, 0.3], [512.0, 0.9]],
            },
            "weights_curve": [[16e6, 200.0], [32e6, 180.0], [48e6, 60.0], [64e6, 50.0]],
            "exposed": {
                "float32": [[1.0, 1.0], [4.0, 0.9], [16.0, 0.4]],
                "int4": [[1.0, 0.8], [4.0, 0.3], [16.0, 0.0]],
            },
            "attention_tflops": 0.3,
            "attention_curve": [[1e6, 3.0]],
            "overheads": {
                "step_s": 1e-4,
                "layer_s": 2e-5,
                "sequence_s": 3e-5,
                "layer_row_s": 1e-6,
                "logit_s": 1e-8,
            },
        }
    )


INT4 = WeightFormat(kind="int", bits=4, group_size=64)


class KnownProbe(calibrate.Probe):
    """Takes as long as the known machine does."""

    slower = 1.0

    def __init__(self, spec, dtype, options) -> None:
        self.work = spec_work(spec, dtype)
        self.truth = known_machine()

    def step_s(self, batch: int, context: int) -> float:
        # A probe's context grows by a few tokens while it is timed.
        cost = step_cost(self.work, uniform(batch, context + 8))
        return self.slower * predict(cost, self.truth).seconds

    def prefill_s(self, context: int) -> float:
        cost = step_cost(self.work, uniform(1, context, tokens=context))
        return self.slower * predict(cost, self.truth).seconds


def test_calibration_finds_a_known_machine_again(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = known_machine()
    monkeypatch.setattr(calibrate, "Probe", KnownProbe)
    blank = Hardware.from_dict(
        {
            **hardware_by_name("desktop").as_dict(),
            "bandwidth_curve": [list(p) for p in truth.bandwidth_curve],
        }
    )
    options = {"backend": "native"}
    found = calibrate.measure_engine(blank, dtype="float32", options=options)
    # The machine slows down by half before the format's turn: that is taken off.
    monkeypatch.setattr(KnownProbe, "slower", 1.5)
    found = calibrate.measure_format(found, INT4, "float32", options)
    shape = calibrate.probe_spec(layers=6, hidden=288, inner=768, heads=6, vocab=32000)
    large = calibrate.probe_spec(layers=40, hidden=640, inner=1536, heads=10, vocab=8000)
    for spec in (shape, large):
        low = [m.name for m in spec_work(spec).matrices if not m.head]
        rounded = dataclasses.replace(spec, formats=dict.fromkeys(low, INT4))
        for work in (spec_work(spec, "float32"), spec_work(rounded, "float32")):
            for batch in (1, 8, 32):
                for context in (128, 1024):
                    cost = step_cost(work, uniform(batch, context))
                    expected = predict(cost, truth).seconds
                    assert predict(cost, found).seconds == pytest.approx(expected, rel=0.1)


def test_probes_are_in_the_format_that_they_measure() -> None:
    spec = calibrate.probe_spec(layers=3, hidden=128, inner=256, heads=2, format=INT4)
    decoder = repeated_decoder(spec, "bfloat16")
    linears = [m for m in decoder.modules() if isinstance(m, Linear)]
    held = [m.quantized for m in linears if m.quantized is not None]
    assert len(held) == 3 * 7
    assert {weight.format for weight in held} == {INT4}
    places = {weight.values.data_ptr() for weight in held}
    assert len(places) == len(held), "layers share memory, and the second would come from the cache"
    assert torch.equal(held[0].values, held[7].values)


def test_a_format_that_the_engine_cannot_hold_is_refused() -> None:
    from skimp.kernels import native

    if not native.available():
        pytest.skip("the native kernels are not built")
    odd = dataclasses.replace(INT4, group_size=20)
    spec = calibrate.probe_spec(layers=1, hidden=64, format=odd)
    with pytest.raises(FormatRefused, match="groups of a multiple"):
        calibrate.Probe(spec, "bfloat16", {"backend": "native"})


def test_timings_are_taken_in_turn() -> None:
    seen: list[tuple[str, int]] = []

    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

        def step_s(self, batch: int, context: int) -> float:
            seen.append((self.name, batch))
            return float(len(seen))

    one, two = Named("one"), Named("two")
    timings = [Timing(probe=p, rows=n, context=4) for n in (1, 8) for p in (one, two)]
    took = time_all(timings, passes=3)
    assert seen == [("one", 1), ("two", 1), ("one", 8), ("two", 8)] * 4
    assert took[timings[1]] == [6.0, 10.0, 14.0]  # the first pass does not count


def test_calibration_is_kept_and_a_damaged_file_is_measured_anew(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "this_machine", lambda **kw: known_machine())
    calls: list[str] = []

    def measured(hardware: Hardware, *, dtype: str, options: dict) -> Hardware:
        calls.append(dtype)
        return hardware

    monkeypatch.setattr(calibrate, "measure_engine", measured)

    def get() -> Hardware:
        return calibrate.calibrated(dtype="float32", device="cpu", backend="plain", threads=1)

    assert get() == get() == known_machine()
    assert calls == ["float32"]
    (file,) = (tmp_path / "skimp").iterdir()
    file.write_text("{}")
    assert get() == known_machine()
    assert calls == ["float32", "float32"]


def test_speed_module_times_only_prefill_in_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    steps = 0
    original = engine.step

    def counted():
        nonlocal steps
        steps += 1
        return original()

    monkeypatch.setattr(engine, "step", counted)
    speed.time_prefill(engine, [[5] * 48])
    assert steps == 2  # 48 tokens under a budget of 24
