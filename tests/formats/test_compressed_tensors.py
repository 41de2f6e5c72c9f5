"""Checkpoints in compressed-tensors: ours in transformers, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_spec

from skimp.errors import CheckpointError, ConfigError
from skimp.formats import QuantizedWeight, WeightFormat, quantize
from skimp.formats.compressed_tensors import (
    decode,
    encode,
    layout_of,
    parts,
    read_config,
    write_config,
)
from skimp.kernels.plain import PlainOps
from skimp.model import families
from skimp.model.checkpoint import read_directory
from skimp.model.decoder import Decoder
from skimp.model.loading import load_decoder, load_spec, random_decoder
from skimp.model.saving import module_tensors, save_checkpoint
from skimp.model.spec import ModelSpec
from skimp.shrink.capture import whole_text

os.environ.setdefault("HF_HUB_OFFLINE", "1")
INT8 = WeightFormat(kind="int", bits=8)
FORMATS = [
    INT8,
    WeightFormat(kind="int", bits=8, activations="int8"),
    WeightFormat(kind="int", bits=4, group_size=32),
    WeightFormat(kind="int", bits=4, group_size=32, symmetric=False),
    WeightFormat(kind="int", bits=4, group_size=128),
    WeightFormat(kind="float", bits=8, activations="fp8"),
    WeightFormat(kind="float", bits=8),
    WeightFormat(kind="int", bits=4, group_size=32, activations="int8"),
]


def quantized_spec(form: WeightFormat, **changes: Any) -> ModelSpec:
    spec = dataclasses.replace(tiny_spec((None, None)), **changes)
    if form.group_size == 128:
        layer = spec.layers[0]
        mixer = dataclasses.replace(layer.mixer, num_heads=8)
        ffn = dataclasses.replace(layer.ffn, intermediate_size=256)
        layer = dataclasses.replace(layer, mixer=mixer, ffn=ffn)
        spec = dataclasses.replace(spec, hidden_size=128, layers=(layer,) * 2)
    names = [n for n in families.tensor_names(spec) if n.startswith("layers.") and "proj" in n]
    return dataclasses.replace(spec, formats={n.removesuffix(".weight"): form for n in names})


def logits(decoder: Decoder, ids: list[int]) -> torch.Tensor:
    ops = PlainOps()
    with torch.no_grad():
        return decoder.bind(ops)(whole_text(torch.tensor(ids, dtype=torch.int32)), ops)


def test_ours_in_the_library() -> None:
    """Zero points: transformers 5.24 with compressed-tensors 0.20 expects them unpacked and fails
    on what the library itself writes, so the library's own reading is the oracle."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    for form in (f for f in FORMATS if layout_of(f) == "pack-quantized"):
        weight = quantize(torch.randn(24, 256), form)
        group = write_config({"a": form}, None, {"a": "a"})["config_groups"]["group_0"]
        group.pop("format")
        library = BaseCompressor.get_value_from_registry("pack-quantized")
        theirs = library.decompress(dict(encode(weight)), QuantizationScheme(**group))["weight"]
        assert torch.equal(theirs.float(), weight.dequantize())


@pytest.mark.parametrize("form", [f for f in FORMATS if f.symmetric], ids=lambda form: form.name)
def test_ours_in_transformers(form: WeightFormat, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    decoder = random_decoder(quantized_spec(form), seed=3)
    for norm in (p for n, p in decoder.named_parameters() if "norm" not in n):
        norm.data.mul_(4)
    saved = save_checkpoint(tmp_path / "model", decoder.spec, decoder)
    ids = torch.randint(300, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    ours = logits(load_decoder(saved), ids)
    assert torch.equal(ours, logits(decoder, ids))
    model = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].float()
    assert (ours - theirs).norm() / theirs.norm() < 1e-2


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_back_bit_for_bit(form: WeightFormat, tmp_path: Path) -> None:
    decoder = random_decoder(quantized_spec(form), seed=4, dtype="bfloat16")
    saved = save_checkpoint(tmp_path / "model", decoder.spec, decoder, shard_bytes=20_000)
    spec = load_spec(saved)
    assert spec.formats == decoder.spec.formats
    back, before = module_tensors(load_decoder(saved)), module_tensors(decoder)
    assert back.keys() == before.keys()
    for name, tensor in before.items():
        found = back[name]
        if isinstance(tensor, QuantizedWeight):
            assert isinstance(found, QuantizedWeight) and found.format == form
            for a, b in zip(tensor.tensors(), found.tensors()):
                assert a.dtype == b.dtype and torch.equal(a.float(), b.float())
        else:
            assert torch.equal(tensor, found)


def test_mixed_formats_and_a_quantized_table(tmp_path: Path) -> None:
    spec = quantized_spec(FORMATS[2])
    formats = dict(spec.formats) | {"embed_tokens": INT8, "layers.0.mixer.q_proj": FORMATS[3]}
    del formats["layers.1.ffn.down_proj"]
    spec = dataclasses.replace(spec, formats=formats)
    decoder = random_decoder(spec, seed=5)
    saved = save_checkpoint(tmp_path / "model", spec, decoder)
    assert load_spec(saved).formats == formats
    assert torch.equal(logits(load_decoder(saved), [5, 6, 7]), logits(decoder, [5, 6, 7]))


@pytest.mark.parametrize("n", [3, 16, 21])
@pytest.mark.parametrize("k", [31, 64, 77])
@pytest.mark.parametrize("form", FORMATS[:4], ids=lambda form: form.name)
def test_parts(form: WeightFormat, n: int, k: int) -> None:
    weight = quantize(torch.randn(n, k), form)
    stored = dict(encode(weight))
    wanted = parts(form, (n, k))
    assert set(stored) <= set(wanted)
    for name, part in wanted.items():
        if name in stored:
            assert tuple(stored[name].shape) in part.shapes and stored[name].dtype in part.dtypes
        else:
            assert part.instead in stored or not part.required
    assert torch.equal(decode(form, (n, k), stored).dequantize(), weight.dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_may_lie_unpacked(bits: int, symmetric: bool) -> None:
    """As int-quantized and naive-quantized files have them, with one scale for all at times."""
    form = WeightFormat(kind="int", bits=bits, group_size=None, symmetric=symmetric)
    weight = quantize(torch.randn(6, 40), form)
    stored = {"weight": weight.stored().to(torch.int8), "weight_scale": weight.scale}
    if weight.zero is not None:
        stored["weight_zero_point"] = weight.zero
    for name, tensor in stored.items():
        part = parts(form, (6, 40))[name]
        assert tuple(tensor.shape) in part.shapes and tensor.dtype in part.dtypes
    assert torch.equal(decode(form, (6, 40), stored).dequantize(), weight.dequantize())
    stored["weight_scale"] = torch.tensor([0.5])
    assert torch.equal(decode(form, (6, 40), stored).scale, torch.full((6, 1), 0.5))
    with pytest.raises(CheckpointError, match="both"):
        decode(form, (6, 40), stored | {"weight_packed": torch.zeros(6, 10, dtype=torch.int32)})
    if bits == 4:
        stored["weight"][3, 3] = 9
        with pytest.raises(CheckpointError, match=r"outside -8\.\.7"):
            decode(form, (6, 40), stored)


def test_names_come_before_patterns_and_classes() -> None:
    config = config_of(FORMATS[1])
    group = config["config_groups"]["group_0"]
    group["targets"] = ["Linear"]
    for index, (form, target) in enumerate(zip(FORMATS[2:5], ("re:.*b$", "model.b", "model.a"))):
        written = write_config({"a": form}, None, {"a": "model.a"})
        other = written["config_groups"]["group_0"] | {"targets": [target]}
        config["config_groups"][f"more_{index}"] = other
    config["ignore"] = ["re:.*[.]d"]
    modules = {name: f"model.{name}" for name in "abcd"} | {"e": "model.embed_tokens"}
    wanted = {"a": FORMATS[4], "b": FORMATS[3], "c": FORMATS[1]}
    assert read_config(config, modules) == (wanted, None)


def test_a_cache_format_alone() -> None:
    config = write_config({}, "int8", {"a": "model.a"})
    assert read_config(config, {"a": "model.a"}) == ({}, "int8")


def config_of(form: WeightFormat) -> dict[str, Any]:
    return write_config({"a": form}, None, {"a": "model.a", "b": "model.b"})


def changed(path: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(config_of(FORMATS[1]))
    place: Any = config
    *way, last = path.split(".")
    for step in way:
        place = place[step]
    place[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("quantization_status", "frozen", "quantization_status"),
        ("config_groups", {}, "config_groups"),
        ("config_groups.group_0", 3, "group_0"),
        ("config_groups.group_0.targets", "Linear", "targets"),
        ("config_groups.group_0.targets", ["re:("], "regular expression"),
        ("config_groups.group_0.targets", ["model.c"], "match no matrix"),
        ("config_groups.group_0.format", "nvfp4-pack-quantized", "format"),
        ("config_groups.group_0.weights", None, "weights"),
        ("config_groups.group_0.weights.num_bits", 3, "bits"),
        ("config_groups.group_0.weights.type", "bfp", "type"),
        ("config_groups.group_0.weights.strategy", "block", "strategy"),
        ("config_groups.group_0.weights.dynamic", True, "dynamic"),
        ("config_groups.group_0.weights.actorder", "group", "actorder"),
        ("config_groups.group_0.weights.block_structure", [128, 128], "block_structure"),
        ("config_groups.group_0.input_activations.dynamic", False, "dynamic"),
        ("config_groups.group_0.input_activations.num_bits", 4, "num_bits"),
        ("config_groups.group_0.input_activations.strategy", "group", "strategy"),
        ("config_groups.group_0.input_activations.symmetric", False, "symmetric"),
        ("config_groups.group_0.output_activations", {"num_bits": 8}, "output_activations"),
        ("config_groups.group_0.targets", None, "match no matrix"),
        ("config_groups.group_0.weights.group_size", 64, "group_size"),
        ("config_groups.group_0.weights.symmetric", "no", "symmetric"),
        ("config_groups.group_0.weights.zeros", [1], "weights.zeros"),
        ("config_groups.group_0.bias", {"num_bits": 8}, "bias"),
        ("config_groups.group_0.input_activations.strategy", None, "strategy"),
        ("config_groups.group_0.input_activations.type", "bfp", "type"),
        ("config_groups.group_0.input_activations.levels", 7, "levels"),
        ("kv_cache_scheme", {"num_bits": 4}, "kv_cache_scheme"),
        ("kv_cache_scheme", {"num_bits": 8, "type": "mx"}, "kv_cache_scheme"),
        ("kv_cache_scheme", [8], "kv_cache_scheme"),
        ("moe_sparsity_config", {"n": 2}, "moe_sparsity_config"),
        ("sparsity_config", {"format": "sparse-24-bitmask"}, "sparsity_config"),
        ("transform_config", {"config_groups": {"R1": {}}}, "transform_config"),
        ("ignore", [3], "ignore"),
    ],
)
def test_what_is_not_understood_is_refused(path: str, value: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read_config(changed(path, value), {"a": "model.a", "b": "model.b"})


def test_configs_go_there_and_back() -> None:
    modules = {name: f"model.{name}" for name in "abcd"}
    formats = {"a": FORMATS[0], "b": FORMATS[3], "d": FORMATS[5]}
    assert read_config(write_config(formats, "fp8", modules), modules) == (formats, "fp8")


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "dtype", "says"])
def test_damaged_parts_are_named(damage: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    decoder = random_decoder(quantized_spec(FORMATS[3]), seed=6)
    saved = save_checkpoint(tmp_path / "model", decoder.spec, decoder)
    tensors = load_file(saved / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight_packed"
    if damage == "missing":
        del tensors[name]
    elif damage == "extra":
        tensors[name + "s"] = tensors[name].clone()
    elif damage == "shape":
        tensors[name] = tensors[name][:, :-1].contiguous()
    elif damage == "dtype":
        tensors[name] = tensors[name].float()
    else:
        name = name.replace("packed", "shape")
        tensors[name] = torch.tensor([1, 2])
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match="up_proj"):
        load_decoder(saved)
    assert name.rpartition(".")[0] in " ".join(read_directory(saved))
