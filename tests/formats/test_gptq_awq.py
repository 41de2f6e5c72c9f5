"""GPTQ and AWQ checkpoints, packed here a number at a time from the layouts' descriptions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_spec
from torch import Tensor

from skimp.errors import CheckpointError, ConfigError, SkimpWarning
from skimp.formats import QuantizedWeight, WeightFormat, quantize
from skimp.formats.checkpoints import spelling
from skimp.model import families
from skimp.model.loading import load_decoder, random_decoder
from skimp.model.saving import save_checkpoint
from skimp.model.spec import ModelSpec

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which column a word's fields hold, the lowest first
Packer = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]


def words(rows: list[list[int]], bits: int) -> Tensor:
    """Fields to int32 words, the first lowest."""
    per = 32 // bits
    out = []
    for row in rows:
        row = row + [0] * (-len(row) % per)
        packed = []
        for start in range(0, len(row), per):
            word = 0
            for place, field in enumerate(row[start : start + per]):
                word |= (field & ((1 << bits) - 1)) << (bits * place)
            packed.append(word - (1 << 32) if word >= 1 << 31 else word)
        out.append(packed)
    return torch.tensor(out, dtype=torch.int32)


def gptq(bits: int, offset: int, index: list[int] | None = None) -> Packer:
    """From unsigned values [N, K], zero points [N, G] and scales [N, G]."""

    def pack(q: Tensor, zero: Tensor, scale: Tensor) -> dict[str, Tensor]:
        stored = {
            "qweight": words(q.tolist(), bits).T.contiguous(),
            "qzeros": words((zero - offset).T.tolist(), bits),
            "scales": scale.T.contiguous(),
        }
        if index is not None:
            stored["g_idx"] = torch.tensor(index, dtype=torch.int32)
        return stored

    return pack


def awq(q: Tensor, zero: Tensor, scale: Tensor) -> dict[str, Tensor]:
    def shuffled(columns: Tensor) -> list[list[int]]:
        rows = columns.T.unflatten(1, (-1, 8))
        return rows[:, :, torch.tensor(AWQ_ORDER)].flatten(1).tolist()

    return {
        "qweight": words(shuffled(q), 4),
        "qzeros": words(shuffled(zero), 4),
        "scales": scale.T.contiguous(),
    }


def unsigned(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor]:
    middle = 1 << weight.format.bits - 1
    zero = torch.zeros_like(weight.scale) if weight.zero is None else weight.zero
    return weight.stored().long() + middle, zero.long() + middle, weight.scale


def config(method: str, form: WeightFormat, **more: Any) -> dict[str, Any]:
    found = {"quant_method": method, "bits": form.bits, "group_size": form.group_size or -1}
    return found | ({"zero_point": True, "version": "gemm"} if method == "awq" else {}) | more


CASES: dict[str, tuple[WeightFormat, dict[str, Any], Packer]] = {}
for _bits, _group, _symmetric in ((4, 32, True), (4, 16, False), (8, 32, False), (8, None, True)):
    _form = WeightFormat(kind="int", bits=_bits, group_size=_group, symmetric=_symmetric)
    for _version, _offset in (("gptq", 1), ("gptq_v2", 0)):
        CASES[f"{_version}-{_form.name}"] = (
            _form,
            config("gptq", _form, sym=_symmetric, checkpoint_format=_version),
            gptq(_bits, _offset),
        )
_form = WeightFormat(kind="int", bits=4, group_size=32, symmetric=False)
CASES["awq"] = (_form, config("awq", _form), awq)


def write(
    directory: Path, form: WeightFormat, quantization: dict[str, Any], pack: Packer
) -> tuple[ModelSpec, dict[str, QuantizedWeight]]:
    """A checkpoint in float16 as those tools write it; and its spec and matrices."""
    base = dataclasses.replace(tiny_spec((None,)), dtype="float16")
    decoder = random_decoder(base, seed=1, dtype="float16")
    save_checkpoint(directory, base, decoder)
    tensors = load_file(directory / "model.safetensors")
    stored = families.tensor_names(base)
    found: dict[str, QuantizedWeight] = {}
    for name, theirs in stored.items():
        if name.startswith("layers.") and "proj" in name:
            weight = quantize(tensors.pop(theirs).float(), form, scale_dtype=torch.float16)
            if weight.zero is not None:
                weight.zero[0, 0] = weight.format.limits[0]  # 0 of the unsigned numbers
            module = theirs.removesuffix("weight")
            tensors |= {module + part: value for part, value in pack(*unsigned(weight)).items()}
            found[name.removesuffix(".weight")] = weight
    save_file(tensors, directory / "model.safetensors")
    told = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(told | {"quantization_config": quantization}))
    return base, found


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint(case: str, tmp_path: Path) -> None:
    form, quantization, pack = CASES[case]
    _, wanted = write(tmp_path / "model", form, quantization, pack)
    decoder = load_decoder(tmp_path / "model")
    assert decoder.spec.formats == dict.fromkeys(wanted, form)
    for name, weight in wanted.items():
        found = decoder.get_submodule(name).quantized
        assert torch.equal(found.dequantize(), weight.dequantize())
        assert all(tensor.is_contiguous() for tensor in found.tensors())


@pytest.mark.parametrize("case", CASES)
def test_written_again_as_compressed_tensors(case: str, tmp_path: Path) -> None:
    form, quantization, pack = CASES[case]
    _, wanted = write(tmp_path / "model", form, quantization, pack)
    decoder = load_decoder(tmp_path / "model")
    again = load_decoder(save_checkpoint(tmp_path / "again", decoder.spec, decoder))
    assert again.spec.formats == decoder.spec.formats
    for name, weight in wanted.items():
        assert torch.equal(again.get_submodule(name).quantized.dequantize(), weight.dequantize())


def test_order_by_activation_is_held_dense(tmp_path: Path) -> None:
    form, quantization, _ = CASES["gptq-int4-g16-asym"]
    shuffle = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    index = (shuffle // 16).tolist()
    trivial = gptq(4, 1, [k // 16 for k in range(64)])
    by_index = gptq(4, 1, index)

    def pack(q: Tensor, zero: Tensor, scale: Tensor) -> dict[str, Tensor]:
        k = q.shape[1]
        return by_index(q, zero, scale) if k == 64 else gptq(4, 1)(q, zero, scale)

    _, wanted = write(tmp_path / "model", form, quantization | {"desc_act": True}, pack)
    with pytest.warns(SkimpWarning, match="g_idx"):
        decoder = load_decoder(tmp_path / "model", dtype="float32")
    dense = 0
    for name, weight in wanted.items():
        linear = decoder.get_submodule(name)
        if weight.in_features != 64:
            assert linear.quantized is not None
            continue
        q, zero, scale = unsigned(weight)
        groups = torch.tensor(index)
        by_hand = (q - zero[:, groups]).float() * scale.float()[:, groups]
        assert torch.equal(linear.weight, by_hand)
        assert name not in decoder.spec.formats
        dense += 1
    assert dense == 6
    save_checkpoint(tmp_path / "again", decoder.spec, decoder)  # the spec is what it holds
    write(
        tmp_path / "trivial",
        form,
        quantization | {"desc_act": True},
        lambda q, zero, scale: (trivial if q.shape[1] == 64 else gptq(4, 1))(q, zero, scale),
    )
    assert len(load_decoder(tmp_path / "trivial").spec.formats) == 7


def test_biases_that_a_tool_added(tmp_path: Path) -> None:
    form, quantization, pack = CASES["gptq-int4-g32"]

    def with_bias(value: float) -> Packer:
        return lambda q, z, s: pack(q, z, s) | {"bias": torch.full((len(q),), value).half()}

    write(tmp_path / "zero", form, quantization, with_bias(0.0))
    load_decoder(tmp_path / "zero")
    write(tmp_path / "other", form, quantization, with_bias(0.5))
    with pytest.raises(CheckpointError, match="bias"):
        load_decoder(tmp_path / "other")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ({"g_idx": torch.full((64,), 9, dtype=torch.int32)}, "g_idx"),
        ({"qzeros": torch.zeros(2, 8, dtype=torch.int32)}, "qzeros"),
        ({"scales": torch.zeros(2, 63)}, "scales"),
        ({"qweight": torch.zeros(8, 64, dtype=torch.int8)}, "qweight"),
        ({"qweight": None}, "qweight"),
        ({"qbias": torch.zeros(3)}, "qbias"),
    ],
)
def test_damaged_parts_are_named(damage: dict[str, Any], named: str, tmp_path: Path) -> None:
    form, quantization, pack = CASES["gptq-int4-g32"]
    write(tmp_path / "model", form, quantization, pack)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    for part, value in damage.items():
        name = f"model.layers.0.self_attn.q_proj.{part}"
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match=named) as caught:
        load_decoder(tmp_path / "model")
    assert "q_proj" in str(caught.value)


MODULES = {
    "layers.0.mixer.q_proj": "model.layers.0.self_attn.q_proj",
    "layers.0.ffn.up_proj": "model.layers.0.mlp.up_proj",
    "embed_tokens": "model.embed_tokens",
    "lm_head": "lm_head",
}


def read(quantization: dict[str, Any]) -> list[str]:
    return list(spelling(quantization).read_config(quantization, MODULES)[0])


@pytest.mark.parametrize(
    ("method", "changes", "named"),
    [
        ("gptq", {"bits": 3}, "bits"),
        ("gptq", {"bits": None}, "bits"),
        ("gptq", {"group_size": 0}, "group_size"),
        ("gptq", {"group_size": "128"}, "group_size"),
        ("gptq", {"sym": "yes"}, "sym"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format"),
        ("gptq", {"format": "gptq_v2", "checkpoint_format": "gptq"}, "checkpoint_format"),
        ("gptq", {"is_marlin_format": True}, "is_marlin_format"),
        ("gptq", {"dynamic": {"-:mlp": {}}}, "dynamic"),
        ("gptq", {"pack_dtype": "int16"}, "pack_dtype"),
        ("gptq", {"adapter": {"path": "x"}}, "adapter"),
        ("gptq", {"rotation": "hadamard"}, "rotation"),
        ("gptq", {"modules_to_not_convert": "mlp"}, "modules_to_not_convert"),
        ("gptq", {"modules_in_block_to_quantize": "mlp"}, "modules_in_block_to_quantize"),
        ("gptq", {"modules_in_block_to_quantize": ["mlp"]}, "must be a list of names"),
        ("awq", {"bits": 8}, "bits"),
        ("awq", {"version": "gemv"}, "version"),
        ("awq", {"version": None, "format": "llm-awq"}, "version"),
        ("awq", {"zero_point": False}, "zero_point"),
        ("awq", {"group_size": 0}, "group_size"),
        ("awq", {"desc_act": True}, "desc_act"),
        ("awq", {"modules_to_not_convert": [1]}, "modules_to_not_convert"),
        ("awq", {"clip": 3}, "clip"),
        ("marlin", {}, "quant_method"),
        (["gptq"], {}, "quant_method"),
    ],
)
def test_what_is_not_understood_is_refused(method: Any, changes: dict, named: str) -> None:
    form = WeightFormat(kind="int", bits=4, group_size=128)
    with pytest.raises(ConfigError, match=named):
        read(config(method, form) | changes)


def test_which_matrices_are_converted() -> None:
    form = WeightFormat(kind="int", bits=4, group_size=128)
    layers = ["layers.0.mixer.q_proj", "layers.0.ffn.up_proj"]
    assert read(config("gptq", form)) == layers == read(config("awq", form, version="GEMM"))
    assert read(config("gptq", form, lm_head=True)) == [*layers, "lm_head"]
    assert read(config("awq", form, modules_to_not_convert=["mlp", "lm_head"])) == layers[:1]
    inside = [["self_attn.q_proj"], ["mlp.gate_proj"]]
    assert read(config("gptq", form, modules_in_block_to_quantize=inside)) == layers[:1]
