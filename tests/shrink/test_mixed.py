"""The allocation is the optimum, and what it rests on is measured."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import sys

import pytest
import torch
from pydantic import ValidationError
from shrink.drive import apart, decoder_of, logits, named, run_step, spec_like, unit_of, varied
from tiny_models import tiny_decoder, tiny_spec
from torch import Tensor

from skimp.errors import ShrinkError
from skimp.formats.weight import QuantizedWeight, WeightFormat, quantize
from skimp.model.spec import ModelSpec
from skimp.shrink.quantize import Quantize
from skimp.shrink.quantize.mixed import (
    STATE,
    Group,
    MixedPrecision,
    _packed,
    _unpacked,
    allocate,
    average_bits,
)
from skimp.shrink.step import Run, Unit, unit_names


def int_format(bits: int, group: int | None = None) -> WeightFormat:
    return WeightFormat(kind="int", bits=bits, group_size=group)


INT4, INT8 = int_format(4, 32), int_format(8)
TOKENS = torch.randint(320, (3, 24), generator=torch.Generator().manual_seed(1))


def survey(
    mixed: MixedPrecision, spec: ModelSpec, tensors: dict[str, Tensor], tokens: Tensor
) -> dict[str, list[dict[str, object]]]:
    """The state after the pass that looks; it survives JSON after every unit."""
    mixed.check(spec)
    run = Run(pass_index=0, state={}, tokens=tokens)
    for index, name in enumerate(unit_names(spec)):
        own = {n: t for n, t in tensors.items() if unit_of(n) == name}
        table = tensors["embed_tokens.weight"] if name == "head" and spec.tie_embeddings else None
        unit = Unit(name=name, index=index, spec=spec, tensors=own, table=table)
        result = mixed.look(unit, run)
        assert result.tensors is None
        run.hidden, run.state = result.hidden, json.loads(json.dumps(run.state))
    return run.state


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_the_optimum(seed: int) -> None:
    rng = random.Random(seed)
    groups = []
    for i in range(6):
        names = ["a", "b", "c"][: rng.randint(1, 3)]
        bits = dict(zip(names, (4.125, 8.04, 16.0)))
        damage = {n: 10.0 ** rng.uniform(-7, 0) / bits[n] for n in names}
        weights = rng.randint(1, 2000)
        groups.append(Group(matrices=(str(i),), weights=weights, damage=damage, bits=bits))
    options = list(itertools.product(*(g.damage for g in groups)))
    every = sorted(average_bits(groups, names) for names in options)
    for target in (every[0], every[len(every) // 3], every[len(every) // 2] + 1e-4, every[-1]):

        def cost(names: tuple[str, ...]) -> float:
            return sum(g.damage[n] for g, n in zip(groups, names))

        fitting = [o for o in options if average_bits(groups, o) <= target + 1e-9]
        chosen = allocate(groups, target)
        assert average_bits(groups, chosen) <= target + 1e-6
        assert cost(tuple(chosen)) <= min(map(cost, fitting)) * (1 + 1e-6) + 1e-9


def test_a_target_out_of_range() -> None:
    group = Group(matrices=("m",), weights=9, damage={"a": 1, "b": 0}, bits={"a": 4.5, "b": 8})
    for target in (3.0, 9.0):
        with pytest.raises(ShrinkError, match=r"^target_bits: .* 4\.5 to 8"):
            allocate([group], target)


def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS leaves a line on stdout in some of these."""
    rng = random.Random(1)
    bits = dict(zip("abcd", (4.125, 4.3125, 4.625, 8.03)))
    for _ in range(8):
        groups = [
            Group(
                matrices=(str(i),),
                weights=rng.randint(1, 20000),
                bits=bits,
                damage={n: 10 ** rng.uniform(-6, -2) * 4**-b for n, b in bits.items()},
            )
            for i in range(32)
        ]
        allocate(groups, 4.5)
    print("still there")
    assert capfd.readouterr().out == "still there\n"


def test_survey_measures_the_harm_at_the_end() -> None:
    """A group whose output nobody can hear costs nothing; a loud one gets the bits."""
    spec = spec_like(tiny_spec(), tied=False)
    tensors = named(tiny_decoder(spec))
    tensors["layers.1.ffn.down_proj.weight"][:] *= 1e-4
    tensors["layers.2.mixer.o_proj.weight"][:] *= 30
    mixed = MixedPrecision(target_bits=6, candidates=(INT4, INT8, None), lm_head=True)
    state = survey(mixed, spec, tensors, TOKENS)
    groups = {e["matrices"][0]: e for e in state[STATE]}  # type: ignore[index]
    assert len(groups) == 4 * spec.num_layers + 1
    for entry in groups.values():
        damage = entry["damage"]
        assert damage["int4-g32"] > damage["int8"] > damage["dense"] == 0  # type: ignore[index]
    harm = {name: entry["damage"]["int4-g32"] for name, entry in groups.items()}  # type: ignore[index]
    assert harm["layers.1.ffn.down_proj"] < 1e-3 * harm["layers.0.ffn.down_proj"]
    chosen = mixed.formats(state)
    assert chosen["layers.1.ffn.down_proj"] == INT4
    assert chosen.get("layers.2.mixer.o_proj") != INT4
    for names in ("mixer.q_proj mixer.k_proj mixer.v_proj", "ffn.gate_proj ffn.up_proj"):
        for i in range(spec.num_layers):
            assert len({chosen.get(f"layers.{i}.{name}") for name in names.split()}) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_damage_is_the_divergence_of_a_whole_forward(tied: bool) -> None:
    spec = dataclasses.replace(spec_like(tiny_spec(), tied=tied), logit_softcap=3.0)
    tensors = named(varied(tiny_decoder(spec)))
    mixed = MixedPrecision(target_bits=4.5, candidates=(INT4,), lm_head=not tied)
    state = survey(mixed, spec, tensors, TOKENS)

    def end(weights: dict[str, Tensor]) -> Tensor:
        decoder = decoder_of(spec, weights)
        return torch.stack([logits(decoder, s.tolist()).log_softmax(-1) for s in TOKENS])

    base = end(tensors)
    for entry in state[STATE][:3] + state[STATE][-3:]:
        names = [f"{name}.weight" for name in entry["matrices"]]  # type: ignore[attr-defined]
        low = {name: quantize(tensors[name], INT4).dequantize() for name in names}
        kl = (base.exp() * (base - end(tensors | low))).sum(-1).mean()
        assert float(kl) > 0
        assert entry["damage"]["int4-g32"] == pytest.approx(float(kl), rel=2e-3)  # type: ignore[index]


def test_packing_windows() -> None:
    windows = list(torch.randn(5, 7, 4).split(1))
    rows = _packed(windows, 16)
    assert rows.shape == (3, 16, 4)
    assert torch.equal(torch.stack(_unpacked(rows, 5, 7)), torch.cat(windows))


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny_spec()
    for fields, match in (
        ({"candidates": ()}, "^candidates: "),
        ({"candidates": (INT4, INT4)}, "^candidates: int4-g32 is named twice"),
        ({"candidates": (INT4,), "lm_head": True}, "^lm_head: "),
    ):
        with pytest.raises(ShrinkError, match=match):
            MixedPrecision(target_bits=4.5, **fields).check(spec)
    odd = MixedPrecision(target_bits=4.5, candidates=(int_format(4, 48),))
    with pytest.raises(ShrinkError, match=r"^candidates: no group_size divides the 64 inputs"):
        odd.check(spec)
    with pytest.raises(ShrinkError, match=r"^target_bits: 6 is outside 4.5 to 4.5"):
        MixedPrecision(target_bits=6, candidates=(INT4,)).check(spec)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ShrinkError, match=r"skimp\[shrink\]"):
        MixedPrecision(target_bits=4.5, candidates=(INT4,)).check(spec)


# ---- as a step of a recipe --------------------------------------------------------------------


def step(**fields: object) -> Quantize:
    given = {"target_bits": 6.0, "candidates": ["int4-g32", "int4-g32-asym", "int8", "dense"]}
    return Quantize.model_validate_json(json.dumps(given | fields), strict=True)


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq", "awq"])
def test_every_method_takes_the_choice(method: str) -> None:
    spec = spec_like(tiny_spec(), tied=False)
    tensors = named(varied(tiny_decoder(spec)))
    tensors["layers.2.mixer.o_proj.weight"][:] *= 30
    mixed = step(method=method, include=["lm_head"], exclude=["layers.0.ffn.*"])
    out_spec, out, run = run_step(mixed, spec, tensors, TOKENS)
    assert len({form.name for form in out_spec.formats.values()}) > 1
    assert not any(name.startswith("layers.0.ffn") for name in out_spec.formats)
    for name, tensor in out.items():
        matrix = name.removesuffix(".weight")
        if isinstance(tensor, QuantizedWeight):
            assert tensor.format == out_spec.formats[matrix]
        else:
            assert matrix not in out_spec.formats
    (note,) = run.notes
    assert note.startswith("mixed precision: ") and note.endswith(" bits a weight on average")
    base = logits(decoder_of(spec, tensors), TOKENS[0].tolist())
    low = dataclasses.replace(out_spec, formats={})
    assert 0 < apart(base, logits(decoder_of(low, out), TOKENS[0].tolist())) < 3


def test_the_plan_of_a_step() -> None:
    spec = tiny_spec()
    need = step().need(spec)
    assert need.passes == 2 and need.calibration
    assert need.open_bits == dict.fromkeys(step().planned_spec(spec).formats, 6.0)
    assert {form.name for form in step().planned_spec(spec).formats.values()} == {"int8"}
    with pytest.raises(ShrinkError, match=r"^target_bits: 6 is outside 4\.5 to 4\.625"):
        step(candidates=["int4-g32", "int4-g32-asym"]).need(spec)
    with pytest.raises(ShrinkError, match=r"^exclude: it leaves no matrix"):
        step(exclude=["layers.*"]).need(spec)
    with pytest.raises(ShrinkError, match=r"layers\.0\.mixer\.q_proj is int8 already"):
        step().need(step().planned_spec(spec))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"format": "int4"}, "format: target_bits is given"),
        ({"group_size": 64}, "group_size: target_bits is given"),
        ({"symmetric": True}, "symmetric: target_bits is given"),
        ({"activations": "none"}, "activations: target_bits is given"),
        ({"candidates": []}, "candidates: there is none"),
        ({"candidates": ["int8", "int8"]}, "candidates: int8 is named twice"),
        ({"candidates": ["int8", "int3"]}, "'int3' is no format"),
        ({"include": ["embed_tokens"]}, "include: embed_tokens"),
        ({"target_bits": None}, "format: missing"),
        ({"target_bits": None, "format": "int4"}, "candidates: they go with target_bits"),
        ({"target_bits": 0}, "target_bits"),
        ({"target_bits": "4.5"}, "target_bits"),
        ({"damping": 0.1}, "damping: only method gptq"),
    ],
)
def test_malformed_fields(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        step(**fields)
