"""Experts in MXFP4, as gpt-oss is published, become the bfloat16 numbers they stand for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_spec
from torch import Tensor

from skimp.errors import CheckpointError, ConfigError, SkimpError
from skimp.formats import mxfp4
from skimp.model import families
from skimp.model.loading import load_decoder, load_spec, random_decoder
from skimp.model.saving import save_checkpoint

os.environ.setdefault("HF_HUB_OFFLINE", "1")
GPT_OSS = {
    "model_type": "gpt_oss",
    "vocab_size": 80,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "torch_dtype": "bfloat16",
}
METHOD = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
}


def random_parts(shape: tuple[int, int, int]) -> dict[str, Tensor]:
    e, k, n = shape
    draw = torch.Generator().manual_seed(k)
    blocks = torch.randint(256, (e, n, k // 32, 16), generator=draw)
    scales = torch.randint(115, 125, (e, n, k // 32), generator=draw)
    return {"blocks": blocks.to(torch.uint8), "scales": scales.to(torch.uint8)}


def test_numbers_are_those_of_transformers() -> None:
    pytest.importorskip("transformers")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    shape = (3, 64, 10)
    parts = random_parts(shape)
    wanted = convert_moe_packed_tensors(parts["blocks"], parts["scales"])
    assert wanted.shape == shape and wanted.dtype == torch.bfloat16
    assert torch.equal(mxfp4.decode(shape, parts), wanted)


def test_the_largest_and_smallest_numbers_are_exact() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 1, 16)
    for exponent in (0, 1, 126, 127, 252):
        scales = torch.full((1, 16, 1), exponent, dtype=torch.uint8)
        found = mxfp4.decode((1, 32, 16), {"blocks": blocks, "scales": scales})[0].T.flatten()
        signed = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
        signed = torch.cat((signed, -signed))
        nibbles = torch.stack((torch.arange(256) & 15, torch.arange(256) >> 4), -1).flatten()
        assert torch.equal(found.double(), signed[nibbles] * 2.0 ** (exponent - 127))


def checkpoint(folder: Path) -> tuple[Path, Path]:
    """The same model twice: with dense experts, and with theirs in MXFP4."""
    spec = families.to_spec(GPT_OSS)
    dense = random_decoder(spec, seed=1, dtype="bfloat16")
    packed: dict[str, Tensor] = {}
    for name, ours in (("gate_up_proj", (4, 64, 64)), ("down_proj", (4, 32, 64))):
        for layer in range(2):
            parts = random_parts(ours)
            target = dense.get_parameter(f"layers.{layer}.ffn.experts.{name}")
            target.data.copy_(mxfp4.decode(ours, parts))
            for part, tensor in parts.items():
                packed[f"model.layers.{layer}.mlp.experts.{name}_{part}"] = tensor.clone()
    first = save_checkpoint(folder / "dense", spec, dense)
    second = folder / "packed"
    second.mkdir()
    stored = load_file(first / "model.safetensors")
    kept = {n: t for n, t in stored.items() if not n.endswith(("gate_up_proj", "down_proj"))}
    save_file(kept | packed, second / "model.safetensors")
    write_config(first, second, METHOD)
    return first, second


def write_config(source: Path, target: Path, method: dict[str, Any]) -> None:
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": method}))


@pytest.mark.parametrize("some_dense", [False, True])
def test_published_checkpoints_are_read(some_dense: bool, tmp_path: Path) -> None:
    first, second = checkpoint(tmp_path)
    if some_dense:
        stored, file = load_file(second / "model.safetensors"), second / "model.safetensors"
        name = "model.layers.0.mlp.experts.down_proj"
        stored = {n: t for n, t in stored.items() if not n.startswith(f"{name}_b")}
        del stored[f"{name}_scales"]
        whole = load_file(first / "model.safetensors")
        save_file(stored | {n: t for n, t in whole.items() if n.startswith(name)}, file)
    wanted, found = load_decoder(first), load_decoder(second)
    assert found.spec == wanted.spec and not found.spec.formats
    theirs = dict(wanted.named_parameters())
    for name, parameter in found.named_parameters():
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, theirs[name]), name
    again = save_checkpoint(tmp_path / "again", found.spec, found)
    assert load_spec(again) == wanted.spec
    assert "quantization_config" not in json.loads((again / "config.json").read_text())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"down_proj_scales": None}, "layers.0.mlp.experts.down_proj_scales' missing"),
        ({"down_proj_scales": None, "down_proj_blocks": None}, "experts.down_proj' and 2 more"),
        ({"down_proj": torch.zeros(4, 32, 64)}, "are the same"),
        ({"down_proj_blocks": torch.zeros(4, 64, 1, 8).byte()}, "has shape [4, 64, 1, 8]"),
        ({"down_proj_scales": torch.zeros(4, 64, 1)}, "is torch.float32"),
        ({"down_proj_scales": torch.full((4, 64, 1), 255).byte()}, "scales: one is not a number"),
    ],
    ids=["no scales", "neither", "both", "shape", "dtype", "NaN"],
)
def test_damaged_checkpoints_name_the_tensor(
    damage: dict[str, Tensor | None], words: str, tmp_path: Path
) -> None:
    _, second = checkpoint(tmp_path)
    stored = load_file(second / "model.safetensors")
    for part, tensor in damage.items():
        name = f"model.layers.0.mlp.experts.{part}"
        stored.pop(name, None)
        if tensor is not None:
            stored[name] = tensor
    save_file(stored, second / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_decoder(second)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_not_understood_is_refused() -> None:
    with pytest.raises(ConfigError, match="quantization_config: block_size=16"):
        families.to_spec(GPT_OSS | {"quantization_config": METHOD | {"block_size": 16}})
    qwen = families.to_config(tiny_spec((None,)))
    with pytest.raises(SkimpError, match="'mxfp4' is read where all experts"):
        families.to_spec(qwen | {"quantization_config": METHOD})
