"""The heal step: what it repairs, what it keeps, what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from shrink.heal_runs import heal, tensors, write_healable
from shrink.runs import run
from shrink.steps import REGISTRY

from skimp.errors import ShrinkError, SkimpError
from skimp.model.loading import load_decoder
from skimp.model.saving import save_checkpoint
from skimp.shrink import pipeline
from skimp.shrink.curve import read_curves
from skimp.shrink.heal import Heal
from skimp.shrink.heal.schedule import has_settled, rate
from skimp.shrink.heal.weights import Adapter, Weights, build
from skimp.shrink.plan import plan_job
from skimp.shrink.recipe import parse_recipe

SHORT = "length: 64, batch: 256, held_out: 512"
QUICK = f"tokens: 1024, {SHORT}, lr: 0.01"
LONGER = f"tokens: 8192, {SHORT}, lr: 0.01"
DAMAGE = "- damage: {layer: 1, noise: 1.0}"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_healable(tmp_path_factory.mktemp("heal"))


def _kls(outcome: pipeline.Outcome) -> list[float]:
    (curve,) = outcome.curves
    return [row["held_out_kl"] for row in curve]


# ---- what it does -----------------------------------------------------------------------------


def test_the_identity_stays(model: Path, tmp_path: Path) -> None:
    """Nothing is broken, so there is no gradient, and not one weight moves."""
    outcome = heal(model, tmp_path / "out", QUICK)
    assert all(kl == 0.0 for kl in _kls(outcome))
    before, after = tensors(model), tensors(outcome.output)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_damaged_model_gets_most_back(model: Path, tmp_path: Path) -> None:
    outcome = heal(model, tmp_path / "out", LONGER, DAMAGE)
    kls = _kls(outcome)
    print(f"held-out KL {kls[0]:.4f} before, {kls[-1]:.4f} after")
    assert kls[0] > 0.05 and kls[-1] < 0.35 * kls[0]


@pytest.mark.parametrize("more", ["", ", lora: {rank: 8, alpha: 8}", ", compute: bfloat16"])
def test_latents_heal(model: Path, tmp_path: Path, more: str) -> None:
    """Their projection has rows so small that an optimiser's step would drown them."""
    ids = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(1))
    before = "- mla: {latent: 12, rope: 4}"
    fields = f"tokens: 8192, {SHORT}, lr: 0.003{more}"
    outcome = heal(model, tmp_path / "out", fields, before, tokens=ids)
    kls = _kls(outcome)
    print(f"held-out KL {kls[0]:.4f} before, {kls[-1]:.4f} after")
    assert kls[-1] < 0.5 * kls[0]
    assert outcome.spec.family == "deepseek_v3"
    down = tensors(outcome.output)["layers.0.mixer.kv_a_proj.weight"][:12]
    assert 0 < float(down.abs().max()) < 1e-3


def test_the_curve_is_in_the_account(model: Path, tmp_path: Path) -> None:
    outcome = heal(model, tmp_path / "out", f"{QUICK}, measure_every: 2", DAMAGE)
    account = json.loads((outcome.output / "skimp_shrink.json").read_text())
    curve = account["steps"][1]["curve"]
    assert tuple(curve) == outcome.curves[0]
    points = tuple((row["tokens"], row["held_out_kl"]) for row in curve)
    assert read_curves(outcome.output) == (points,) and read_curves(model) == ()
    assert [row["step"] for row in curve] == [0, 2, 4, 4]
    assert [row["tokens"] for row in curve] == [0, 512, 1024, 1024]
    assert [row["written"] for row in curve] == [False, False, False, True]
    assert curve[0]["loss"] is None and curve[1]["loss"] > 0 and curve[1]["lr"] > 0
    assert any("held-out KL" in note for note in outcome.notes)


def test_micro_batches_add_up(model: Path, tmp_path: Path) -> None:
    fields = f"tokens: 512, {SHORT}, lr: 0.01"
    one = heal(model, tmp_path / "one", fields, DAMAGE)
    many = heal(model, tmp_path / "many", f"{fields}, micro_batch: 64", DAMAGE)
    a, b = tensors(one.output), tensors(many.output)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


def test_what_trains(model: Path, tmp_path: Path) -> None:
    fields = f"{QUICK}, train: ['layers.*.ffn.*', norm], frozen: ['*.up_proj']"
    out = tensors(heal(model, tmp_path / "out", fields, DAMAGE).output)
    start = tensors(run(model, DAMAGE, tmp_path / "damaged").output)
    moved = {name for name in out if not torch.equal(out[name], start[name])}
    ffn = {f"layers.{i}.ffn.{m}_proj.weight" for i in range(2) for m in ("gate", "down")}
    assert moved == ffn | {"norm.weight"}


def test_zeros_stay(model: Path, tmp_path: Path) -> None:
    decoder = load_decoder(model)
    weight = decoder.get_parameter("layers.1.ffn.up_proj.weight")
    weight.data[:, ::2] = 0
    sparse = save_checkpoint(tmp_path / "m", decoder.spec, decoder, tokenizer_files_from=model)
    text = f"text: {model.parent / 'text.txt'}"
    for lora in ("", ", lora: {rank: 2, alpha: 4}"):
        fields = f"{text}, {QUICK}{lora}"
        damage = "- damage: {layer: 0}"
        kept = tensors(
            heal(sparse, tmp_path / f"k{lora}", f"{fields}, keep_zeros: true", damage).output
        )
        free = tensors(heal(sparse, tmp_path / f"f{lora}", fields, damage).output)
        name = "layers.1.ffn.up_proj.weight"
        assert not kept[name][:, ::2].any() and free[name][:, ::2].any()
        assert not torch.equal(kept[name][:, 1::2], weight[:, 1::2])


def test_text_in_json_lines(model: Path, tmp_path: Path) -> None:
    plain = heal(model, tmp_path / "plain", QUICK, DAMAGE).output
    lines = heal(model, tmp_path / "lines", f"text: text.jsonl, {QUICK}", DAMAGE).output
    a, b = tensors(plain), tensors(lines)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_its_own_text(model: Path, tmp_path: Path) -> None:
    fields = f"text: self, self_tokens: 4000, {LONGER}"
    kls = _kls(heal(model, tmp_path / "out", fields, DAMAGE))
    assert kls[-1] < 0.5 * kls[0]


def test_layerwise_and_long(model: Path, tmp_path: Path) -> None:
    """Mixers first, to the original's outputs; then all; then longer pieces."""
    damage = "- damage: {layer: 1, noise: 1.0, of: mixer}"
    fields = f"{QUICK}, layerwise: {{tokens: 4096, lr: 0.01}}, measure_every: 4"
    outcome = heal(model, tmp_path / "out", f"{fields}, long: {{tokens: 512, length: 128}}", damage)
    (curve,) = outcome.curves
    assert [row["part"] for row in curve] == ["layerwise"] * 5 + ["heal", "long", "long"]
    assert curve[4]["loss"] < 0.5 * curve[1]["loss"]
    assert curve[4]["held_out_kl"] < 0.7 * curve[0]["held_out_kl"]
    assert curve[-1]["step"] == 16 + 4 + 2


def test_layerwise_trains_mixers_of_changed_layers_alone(model: Path, tmp_path: Path) -> None:
    damage = "- damage: {layer: 1, noise: 1.0, of: mixer}"
    start = tensors(run(model, damage, tmp_path / "damaged").output)
    fields = f"tokens: 1, lr: 1.0e-30, {SHORT}, layerwise: {{tokens: 1024, lr: 0.01}}"
    out = tensors(heal(model, tmp_path / "out", fields, damage).output)
    moved = {name for name in out if not torch.equal(out[name], start[name])}
    assert moved == {f"layers.1.mixer.{m}_proj.weight" for m in "qkvo"}


def test_layerwise_with_nothing_changed_says_so(model: Path, tmp_path: Path) -> None:
    outcome = heal(model, tmp_path / "out", f"{QUICK}, layerwise: {{tokens: 512, lr: 0.01}}")
    assert any(note.startswith("layerwise: no mixer differs") for note in outcome.notes)


def test_it_stops_when_nothing_is_gained(model: Path, tmp_path: Path) -> None:
    fields = (
        f"tokens: 65536, {SHORT}, lr: 1.0e-9, measure_every: 1, stop: {{slope: 0.1, window: 3}}"
    )
    (curve,) = heal(model, tmp_path / "out", fields, DAMAGE).curves
    assert [row["step"] for row in curve] == [0, 1, 2, 3, 3]


def test_between_other_steps(model: Path, tmp_path: Path) -> None:
    text = f"{DAMAGE}\n- heal: {{text: text.txt, {QUICK}}}\n- quantize: {{format: int8}}"
    outcome = run(model, text, tmp_path / "out")
    assert {form.name for form in outcome.spec.formats.values()} == {"int8"}
    assert outcome.curves and outcome.visits == 12


# ---- adapters, dtypes -------------------------------------------------------------------------


def test_adapters_are_merged_exactly(model: Path) -> None:
    """What is written is, bit for bit, what the trained student computed with."""
    decoder = load_decoder(model)
    start = tensors(model)
    student = build(
        decoder.spec, start, compute=torch.float32, device=torch.device("cpu"), positions=64
    )
    names = [n for n, t in start.items() if t.dim() == 2 and n.startswith("layers.")]
    weights = Weights(student, start, names, adapter=Adapter(3, 6.0), seed=1)
    assert set(weights.masters) == {f"{n}.lora_{x}" for n in names for x in "ab"}
    unmoved = weights.written()
    assert all(torch.equal(unmoved[name], start[name]) for name in start)
    for master in weights.masters.values():
        master.add_(torch.randn_like(master))
    weights.moved()
    written = weights.written()
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, written[name])
        assert torch.equal(parameter, start[name]) == (name not in names)
    name = names[0]
    down, up = weights.masters[f"{name}.lora_a"], weights.masters[f"{name}.lora_b"]
    torch.testing.assert_close(written[name], start[name] + 2.0 * up @ down)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_gradients_of_adapters_are_autograds(model: Path, compute: torch.dtype) -> None:
    start = tensors(model)
    spec = load_decoder(model).spec
    student = build(spec, start, compute=compute, device=torch.device("cpu"), positions=64)
    name = "layers.0.ffn.up_proj.weight"
    weights = Weights(student, start, [name], adapter=Adapter(2, 2.0), seed=1)
    up = weights.masters[f"{name}.lora_b"]
    up.add_(1.0)
    weights.moved()
    pull = torch.randn(start[name].shape)
    parameter = student.get_parameter(name)
    for _ in range(2):  # two micro-batches
        (parameter * pull.to(compute)).sum().backward()
    assert parameter.grad is None
    a, b = (weights.masters[name + x].clone().requires_grad_() for x in (".lora_a", ".lora_b"))
    (2 * (b @ a) * pull.to(compute).float()).sum().backward()
    torch.testing.assert_close(weights.masters[f"{name}.lora_a"].grad, a.grad)
    torch.testing.assert_close(up.grad, b.grad)


def test_adapters_heal(model: Path, tmp_path: Path) -> None:
    fields = f"{LONGER}, lora: {{rank: 8, alpha: 16}}"
    outcome = heal(model, tmp_path / "out", fields, DAMAGE)
    kls = _kls(outcome)
    assert kls[-1] < 0.6 * kls[0]
    start = tensors(run(model, DAMAGE, tmp_path / "damaged").output)
    out = tensors(outcome.output)
    for name in out:
        trained = name.startswith("layers.") and out[name].dim() == 2
        assert torch.equal(out[name], start[name]) != trained


def test_bfloat16(model: Path, tmp_path: Path) -> None:
    """A bfloat16 checkpoint, computed with in bfloat16 over float32 masters: it gets well, and what
    is measured at last is what was written."""
    decoder = load_decoder(model, dtype="bfloat16")
    spec = dataclasses.replace(decoder.spec, dtype="bfloat16")
    base = save_checkpoint(tmp_path / "base", spec, decoder, tokenizer_files_from=model)
    text = f"text: {model.parent / 'text.txt'}"
    for compute in ("float32", "bfloat16"):
        fields = f"{text}, {LONGER}, compute: {compute}"
        outcome = heal(base, tmp_path / compute, fields, DAMAGE)
        kls = _kls(outcome)
        assert kls[-1] < 0.4 * kls[0]
        assert all(t.dtype == torch.bfloat16 for t in tensors(outcome.output).values())


def test_the_last_measurement_is_of_what_is_written(model: Path) -> None:
    spec = load_decoder(model).spec
    start = {name: t.bfloat16() for name, t in tensors(model).items()}
    student = build(spec, start, compute=torch.float32, device=torch.device("cpu"), positions=64)
    weights = Weights(student, start, list(start))
    for master in weights.masters.values():
        master.add_(0.01 * torch.randn_like(master))
    weights.moved()
    written = weights.written()
    assert not all(torch.equal(p, written[n].float()) for n, p in student.named_parameters())
    weights.settle()
    assert all(torch.equal(p, written[n].float()) for n, p in student.named_parameters())
    assert all(torch.equal(t, written[name]) for name, t in weights.written().items())


# ---- plan -------------------------------------------------------------------------------------


def _job(model: Path, text: str) -> pipeline.Job:
    return pipeline.prepare(model, parse_recipe(text, "r.yaml", model.parent, REGISTRY))


def test_the_plan_says_what_it_takes(model: Path) -> None:
    small, large = (
        plan_job(_job(model, f"- heal: {{text: text.txt, tokens: 1000, {SHORT}{more}}}"))
        for more in (", lora: {rank: 2, alpha: 2}", "")
    )
    assert small.disk_bytes < large.disk_bytes and small.memory_bytes < large.memory_bytes
    count = sum(t.numel() for t in tensors(model).values())
    assert f"trains {count:,} numbers on 1,024 tokens in 4 steps" in large.steps[0].work
    assert large.memory_bytes > 5 * 4 * count  # two models, a gradient, two moments


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ("{}", "tokens: missing"),
        ("{tokens: 0}", "tokens: "),
        ("{tokens: 10, text: none.txt}", "text: .*none.txt: no such file"),
        ("{tokens: 10, text: text.txt, chat: text.txt}", "chat: text is given too"),
        ("{tokens: 10, length: 64, batch: 32}", "batch: 32 tokens a step hold no sequence of 64"),
        ("{tokens: 10, length: 64, batch: 128, micro_batch: 32}", "micro_batch: between"),
        ("{tokens: 10, length: 64, long: {tokens: 1, length: 64}}", "long.length: more than"),
        ("{tokens: 10, length: 512}", "length: 512 tokens, and the model has 256 positions"),
        ("{tokens: 10, length: 64, long: {tokens: 1, length: 300}}", "long.length: 300 tokens"),
        ("{tokens: 10, length: 64, train: [mixer]}", "train: no parameter is called 'mixer'"),
        ("{tokens: 10, length: 64, frozen: [x]}", "frozen: no parameter is called 'x'"),
        ("{tokens: 10, length: 64, frozen: ['*']}", "train: these patterns leave no parameter"),
        (
            "{tokens: 10, length: 64, train: ['*norm'], lora: {rank: 1, alpha: 1}}",
            "train: these patterns leave no matrix",
        ),
        ("{tokens: 10, length: 64, lora: {rank: 0, alpha: 1}}", "lora.rank: "),
        ("{tokens: 10, length: 64, schedule: linear}", "schedule: "),
        ("{tokens: 10, length: 64, betas: [0.9, 1.0]}", "betas: "),
        ("{tokens: 10, length: 64, self_tokens: 100}", "self_tokens: "),
        ("{tokens: 10, length: 64, lr: .nan}", "lr: "),
        ("{tokens: 10, length: 64, epochs: 1}", "epochs: unknown field"),
    ],
)
def test_refused_by_name(model: Path, fields: str, says: str) -> None:
    with pytest.raises(ShrinkError, match=rf"r.yaml: step 1 \(heal\): {says}"):
        _job(model, f"- heal: {fields}")


def test_low_bit_students_are_refused(model: Path) -> None:
    text = f"- quantize: {{format: int8}}\n- heal: {{text: text.txt, {QUICK}}}"
    with pytest.raises(ShrinkError, match=r"step 2 \(heal\): heal: layers.0.* is int8 already"):
        _job(model, text)


def test_another_vocabulary_is_refused(model: Path) -> None:
    original = load_decoder(model).spec
    step = Heal(tokens=10, length=64)
    with pytest.raises(ShrinkError, match="vocab_size: 100 tokens, and 260 in the original"):
        step.need_beside(dataclasses.replace(original, vocab_size=100), original)
    short = dataclasses.replace(original, layers=original.layers[:1])
    step = step.model_copy(update={"layerwise": {"tokens": 1, "lr": 1.0}})
    with pytest.raises(ShrinkError, match="layerwise: the model has 1 layers"):
        step.need_beside(short, original)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("bad.jsonl", '{"text": "a"}\nnonsense\n', "bad.jsonl: line 2: not JSON"),
        ("bad.jsonl", '{"txt": "a"}\n', "bad.jsonl: line 1: text: missing"),
        ("empty.txt", "\n\n", "text: there is nothing in it"),
        ("bytes.txt", b"\xff\xfe\xfd", "bytes.txt: not UTF-8 at byte 0"),
        ("few.txt", "Only a few words.", "held_out: 512 tokens are to be held out"),
    ],
)
def test_unusable_texts(
    model: Path, tmp_path: Path, name: str, content: str | bytes, says: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SkimpError, match=says):
        heal(model, tmp_path / "out", f"text: {path}, {QUICK}")


def test_an_unusable_text_is_found_before_earlier_steps_work(model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("nonsense")
    log = tmp_path / "log"
    fields = f"text: {tmp_path / 'bad.jsonl'}, {QUICK}"
    with pytest.raises(ShrinkError, match=r"step 2 \(heal\): text: .*not JSON"):
        heal(model, tmp_path / "out", fields, f"- look: {{log: {log}}}")
    assert not log.exists()


def test_a_rate_that_is_too_high_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ShrinkError, match="lr: "):
        heal(model, tmp_path / "out", f"tokens: 8192, {SHORT}, lr: 1.0e+20", DAMAGE)


# ---- schedules --------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_schedules(schedule: Any) -> None:
    rates = [rate(i, 100, schedule, warmup=0.1, final=0.1) for i in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and max(rates) == 1.0
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert all(b <= a for a, b in itertools.pairwise(rates[9:]))
    if schedule == "wsd":
        assert rates[79] == 1.0 and rates[80] < 1.0
    assert rate(0, 1, schedule, warmup=0.0, final=1.0) == 1.0


def test_settling() -> None:
    assert not has_settled([1.0, 0.9], 0.5, 2)
    assert has_settled([1.0, 0.9, 0.8], 0.5, 2)
    assert not has_settled([1.0, 0.9, 0.4], 0.5, 2)
