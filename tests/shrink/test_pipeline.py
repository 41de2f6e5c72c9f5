"""The pipeline: resuming, refusing, forms between steps, memory."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from shrink.drive import apart, logits
from shrink.runs import SHARD, Victim, hashes, run, small_tokens, work_of, write_small
from shrink.steps import REGISTRY
from tiny_models import tiny_decoder, tiny_spec

from skimp.errors import ShrinkError
from skimp.formats import QuantizedWeight
from skimp.model.loading import load_decoder, load_spec
from skimp.model.manifest import verify
from skimp.model.saving import module_tensors, save_checkpoint
from skimp.shrink import pipeline
from skimp.shrink.plan import plan_job, size_of
from skimp.shrink.recipe import parse_recipe

LOOK = "- look: {}"
INT8 = "- quantize: {format: int8}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("pipeline") / "model")


def _stop_at(count: int) -> object:
    def progress(done: int, total: int) -> None:
        if done == count:
            raise KeyboardInterrupt

    return progress


def _begin(model: Path, text: str, output: Path, stop: int = 8) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(model, text, output, progress=_stop_at(stop))


def test_16_bits_is_the_identity(tmp_path: Path) -> None:
    decoder = tiny_decoder(tiny_spec((None,) * 4), dtype="bfloat16")
    base = save_checkpoint(tmp_path / "base", decoder.spec, decoder, shard_bytes=SHARD)
    out = run(base, "- quantize: {format: bf16}", tmp_path / "out").output
    before, after = hashes(base), hashes(out)
    shards = [name for name in before if name.startswith("model-")]
    assert len(shards) == 3 and all(before[name] == after[name] for name in shards)
    tokens = [5, 17, 200, 33, 9]
    a, b = (logits(load_decoder(d, dtype="float32"), tokens) for d in (base, out))
    assert apart(a, b) <= 1e-4


@pytest.mark.parametrize("stop", range(1, 31))
def test_stopped_after_any_unit(
    model: Path, tmp_path: Path, stop: int, reference: dict[str, str]
) -> None:
    text = "- look: {}\n- rotate: {}\n- quantize: {format: int4, method: gptq, group_size: 32}"
    _begin(model, text, tmp_path / "out", stop)
    assert not (tmp_path / "out").exists()
    outcome = run(model, text, tmp_path / "out")
    assert outcome.resumed == stop and outcome.visits == 30
    assert hashes(outcome.output) == reference
    assert not work_of(outcome.output).exists()


@pytest.fixture(scope="module")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    text = "- look: {}\n- rotate: {}\n- quantize: {format: int4, method: gptq, group_size: 32}"
    return hashes(run(model, text, tmp_path_factory.mktemp("whole") / "out").output)


MIXED = """
- quantize: {target_bits: 5.5, candidates: [int4-g32, int4-g32-asym, int8], method: gptq}
- cache: {format: int8}
"""


@pytest.fixture(scope="module")
def mixed_reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return hashes(run(model, MIXED, tmp_path_factory.mktemp("mixed") / "out").output)


@pytest.mark.parametrize("stop", [1, 3, 5, 6, 7, 11, 12, 13])
def test_mixed_precision_stopped(
    model: Path, tmp_path: Path, stop: int, mixed_reference: dict[str, str]
) -> None:
    """Its choice is made in the sixth visit, and made once."""
    _begin(model, MIXED, tmp_path / "out", stop)
    outcome = run(model, MIXED, tmp_path / "out")
    assert outcome.resumed == stop and outcome.visits == 18
    assert hashes(outcome.output) == mixed_reference
    assert len({form.name for form in outcome.spec.formats.values()}) > 1
    assert outcome.notes[0].startswith("mixed precision: ")


def test_a_mixed_plan_is_a_bound(model: Path, tmp_path: Path) -> None:
    job = pipeline.prepare(model, parse_recipe(MIXED, "r.yaml", model.parent, REGISTRY))
    plan = plan_job(job, small_tokens().numel())
    assert [step.passes for step in plan.steps] == [2, 1]
    assert plan.steps[0].choices == "int4-g32, int4-g32-asym, int8"
    assert not plan.before.at_most and plan.after.at_most
    assert plan.after.formats == {"to be chosen": 28, "float32": 1}
    found = size_of(run(model, MIXED, tmp_path / "out").spec)
    assert 0.9 * plan.after.disk_bytes < found.disk_bytes <= plan.after.disk_bytes
    assert found.weight_bytes_per_token <= plan.after.weight_bytes_per_token
    assert found.bits_per_weight <= plan.after.bits_per_weight


def test_a_step_that_fails_leaves_what_was_done(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run(model, "- look: {fail_at: 3}", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RuntimeError):
        run(model, "- look: {fail_at: 3}", tmp_path / "out")


def test_low_bit_matrices_pass_between_steps(model: Path, tmp_path: Path) -> None:
    form = "- quantize: {format: int4, method: hqq, group_size: 32}"
    low = load_decoder(run(model, form, tmp_path / "low").output)
    wide = load_decoder(run(model, f"{form}\n- widen: {{}}", tmp_path / "wide").output)
    dense = module_tensors(wide)
    count = 0
    for name, value in module_tensors(low).items():
        if isinstance(value, QuantizedWeight):
            count += 1
            value = value.dequantize()
        assert torch.equal(value, dense[name])
    assert count == 28


def test_what_is_said_of_a_run(model: Path, tmp_path: Path) -> None:
    outcome = run(model, LOOK, tmp_path / "out")
    assert outcome.notes[0] == "look: embed" and len(outcome.notes) == 6
    verdict = verify(outcome.output, deep=True)
    assert verdict.manifest and not verdict.damages
    assert verdict.about["recipe"]["steps"] == [{"look": {}}]
    assert (outcome.output / "recipe.yaml").read_text() == LOOK
    units = json.loads((outcome.output / "skimp_shrink.json").read_text())["units"]
    assert len(units) == 12 and all("sha256" in unit for unit in units[6:])


# ---- refusals ---------------------------------------------------------------------------------


def test_taken_outputs(model: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("full", "file", "link"):
        with pytest.raises(ShrinkError, match=f"{name}: exists already"):
            run(model, LOOK, tmp_path / name)
    assert (tmp_path / "full" / "x").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full", "link"]
    (tmp_path / "empty").mkdir()
    assert not verify(run(model, LOOK, tmp_path / "empty").output).damages


def test_an_output_that_appears_is_left_alone(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    _begin(model, LOOK, output)
    output.mkdir()
    (output / "x").write_text("mine")
    with pytest.raises(ShrinkError, match="exists already"):
        run(model, LOOK, output)
    assert [p.name for p in output.iterdir()] == ["x"]


def test_other_arguments_are_refused(model: Path, tmp_path: Path) -> None:
    other = write_small(tmp_path / "other", seed=1)
    output = tmp_path / "out"
    _begin(model, LOOK, output)
    with pytest.raises(ShrinkError, match=r"its model differs.*--restart"):
        run(other, LOOK, output)
    for text in (INT8, f"seed: 1\nsteps: [{LOOK[2:]}]"):
        with pytest.raises(ShrinkError, match="its recipe differs"):
            run(model, text, output)
    reference = hashes(run(model, INT8, tmp_path / "int8").output)
    assert hashes(run(model, INT8, output, restart=True).output) == reference


def test_other_calibration_is_refused(model: Path, tmp_path: Path) -> None:
    text = "- smooth: {}"
    _begin(model, text, tmp_path / "out", 3)
    with pytest.raises(ShrinkError, match="its calibration text differs"):
        run(model, text, tmp_path / "out", tokens=small_tokens().flip(0))


def test_another_version_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _begin(model, LOOK, tmp_path / "out")
    monkeypatch.setattr("skimp.__version__", "9.9")
    with pytest.raises(ShrinkError, match=r"its skimp version differs \('.*', now '9.9'\)"):
        run(model, LOOK, tmp_path / "out")


def test_a_second_run_at_once_is_refused(model: Path, tmp_path: Path) -> None:
    seen = []

    def progress(done: int, total: int) -> None:
        if done == 3:
            with pytest.raises(ShrinkError, match="another run is writing it") as caught:
                run(model, LOOK, tmp_path / "out")
            seen.append(caught)

    outcome = run(model, LOOK, tmp_path / "out", progress=progress)
    assert seen and not verify(outcome.output).damages


def test_a_second_process_is_refused_and_a_dead_one_is_not(model: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "log"
    os.mkfifo(fifo)  # the first visit waits for a reader
    text = f"- look: {{log: {fifo}}}"
    victim = Victim(model, text, tmp_path / "out")
    while not (work_of(tmp_path / "out") / "journal.jsonl").exists():
        pass
    with pytest.raises(ShrinkError, match="another run is writing it"):
        run(model, text, tmp_path / "out")
    assert victim.kill_after(0)
    fifo.unlink()
    assert run(model, text, tmp_path / "out").output.exists()


@pytest.mark.parametrize("victim", ["unit", "journal", "hidden", "missing"])
def test_damaged_work_is_refused(model: Path, tmp_path: Path, victim: str) -> None:
    text = "- smooth: {}\n- quantize: {format: int8}"
    output = tmp_path / "out"
    _begin(model, text, output, 4)
    names = {"journal": "journal.jsonl", "hidden": "hidden-1.safetensors"}
    path = work_of(output) / names.get(victim, "step-01/unit-00002.safetensors")
    if victim == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    with pytest.raises(ShrinkError, match=f"{path.name}: is .*--restart"):
        run(model, text, output)
    assert not verify(run(model, text, output, restart=True).output).damages


def test_a_torn_journal_line_is_dropped(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    reference = hashes(run(model, LOOK, tmp_path / "whole").output)
    _begin(model, LOOK, output)
    journal = work_of(output) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    outcome = run(model, LOOK, output)
    assert outcome.resumed == 7 and hashes(output) == reference


def test_killed_between_the_last_rename_and_the_end(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    reference = hashes(run(model, LOOK, output).output)
    work_of(output).mkdir()
    (work_of(output) / "journal.jsonl").write_text("")
    assert run(model, LOOK, output).resumed == 12
    assert hashes(output) == reference and not work_of(output).exists()


def test_a_step_that_does_not_fit_is_named(model: Path, tmp_path: Path) -> None:
    text = "- rotate\n- quantize: {format: int4, group_size: 48}"
    with pytest.raises(ShrinkError, match=r"r.yaml: step 2 \(quantize\): group_size: "):
        pipeline.prepare(model, parse_recipe(text, "r.yaml", tmp_path, REGISTRY))


# ---- plan and memory --------------------------------------------------------------------------


@pytest.mark.parametrize("text", [INT8, "- rotate", "- rotate\n- quantize: {format: int8}"])
def test_the_predicted_size_is_the_size(model: Path, tmp_path: Path, text: str) -> None:
    job = pipeline.prepare(model, parse_recipe(text, "r.yaml", tmp_path, REGISTRY))
    predicted = plan_job(job).after
    output = run(model, text, tmp_path / "out").output
    size = sum(p.stat().st_size for p in output.glob("*.safetensors"))
    assert abs(size - predicted.disk_bytes) < 0.1 * size  # headers
    assert predicted == size_of(dataclasses.replace(load_spec(output), config={}))


MEASURE = """
import sys, threading, psutil
from pathlib import Path
from shrink.runs import run
RECIPE = "- rotate: {residual: false}\\n- quantize: {format: bf16}"
me, peak, stop = psutil.Process(), [0], threading.Event()
def watch():
    while not stop.wait(0.002):
        peak[0] = max(peak[0], me.memory_info().rss)
model, output = Path(sys.argv[1]), Path(sys.argv[2])
run(Path(sys.argv[3]), RECIPE, output.parent / "warm")
before = me.memory_info().rss
threading.Thread(target=watch, daemon=True).start()
run(model, RECIPE, output)
stop.set()
print(peak[0] - before)
"""


def test_memory_is_a_few_layers(tmp_path: Path) -> None:
    from skimp.model.loading import random_decoder

    base = tiny_spec((None,) * 24)
    layer = base.layers[0]
    ffn = dataclasses.replace(layer.ffn, intermediate_size=2048)
    spec = dataclasses.replace(
        base, hidden_size=256, layers=(dataclasses.replace(layer, ffn=ffn),) * 24
    )
    big = save_checkpoint(tmp_path / "big", spec, random_decoder(spec))
    small = write_small(tmp_path / "small")
    model_bytes = sum(p.stat().st_size for p in big.glob("*.safetensors"))
    command = [sys.executable, "-c", MEASURE, big, tmp_path / "out", small]
    here = Path(__file__).parents[1]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={
            "PYTHONPATH": f"{here}:{here.parent / 'src'}",
            "OMP_NUM_THREADS": "1",
            "PATH": "/usr/bin:/bin",
        },
    )
    grown = int(done.stdout)
    layer_bytes = model_bytes / 24
    assert psutil.virtual_memory().total > model_bytes
    print(f"model {model_bytes / 1e6:.0f} MB, grown {grown / 1e6:.0f} MB")
    assert grown < 8 * layer_bytes
