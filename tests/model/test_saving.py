"""What is written loads in transformers, is all there or not there, and carries no code."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from skimp.errors import CheckpointError, ConfigError
from skimp.model import families, saving
from skimp.model.loading import load_decoder, load_spec, random_decoder
from skimp.model.saving import save_checkpoint

BASE = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": {"model_type": "llama", "attention_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "gemma2": {"model_type": "gemma2", "sliding_window": 5},
    "gemma3_text": {"model_type": "gemma3_text", "sliding_window": 5, "sliding_window_pattern": 2},
    "cwm": {"model_type": "cwm", "sliding_window": 5},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 5,
    },
}
IDS = list(range(3, 43))


@pytest.mark.parametrize("shard_bytes", [10**9, 9000])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_it(name: str, shard_bytes: int, tmp_path: Path, tools: Any) -> None:
    transformers = pytest.importorskip("transformers")
    spec = families.to_spec(BASE | MODELS[name])
    decoder = random_decoder(spec, seed=3)
    for parameter in decoder.parameters():
        if parameter.dim() == 2:
            parameter.mul_(10)
    directory = save_checkpoint(tmp_path / "out", spec, decoder, shard_bytes=shard_bytes)
    assert (len(list(directory.glob("*.safetensors"))) > 1) == (shard_bytes < 10**9)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0]
    again = load_decoder(directory)
    assert again.spec == spec
    assert tools.distance(tools.whole(again, IDS), expected) < 1e-4


def test_file_format(tmp_path: Path) -> None:
    spec = families.to_spec(BASE | MODELS["llama"])
    directory = save_checkpoint(tmp_path / "out", spec, random_decoder(spec, dtype="bfloat16"))
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(families.tensor_names(spec).values())
    config = json.loads((directory / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"  # what the tensors are, not what the spec was
    assert (directory / "config.json").stat().st_mode & 0o777 == 0o666 & ~_umask()
    again = save_checkpoint(tmp_path / "again", load_spec(directory), load_decoder(directory))
    for file in directory.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_companions(tmp_path: Path) -> None:
    spec = families.to_spec(BASE | MODELS["llama"])
    source = tmp_path / "source"
    source.mkdir()
    wanted = ("tokenizer.json", "chat_template.jinja", "generation_config.json", "merges.txt")
    for name in (*wanted, "modeling.py", "pytorch_model.bin", "config.json", "other.safetensors"):
        (source / name).write_text(f"{name}\n")
    out = save_checkpoint(tmp_path / "out", spec, random_decoder(spec), tokenizer_files_from=source)
    written = {*wanted, "config.json", "model.safetensors", "skimp_manifest.json"}
    assert {f.name for f in out.iterdir()} == written
    assert (out / "merges.txt").read_text() == "merges.txt\n"
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        save_checkpoint(tmp_path / "x", spec, random_decoder(spec), tokenizer_files_from=source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure at any flush leaves no directory, under the name or beside it."""
    spec = families.to_spec(BASE | MODELS["llama"])
    decoder = random_decoder(spec)
    real, count = os.fsync, 0

    def failing(descriptor: int) -> None:
        nonlocal count
        count -= 1
        if count == 0:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(saving.os, "fsync", failing)
    for count in range(1, 8):  # noqa: B007 (the closure reads it)
        with pytest.raises(CheckpointError, match="No space left"):
            save_checkpoint(tmp_path / "out", spec, decoder, shard_bytes=9000)
        assert list(tmp_path.iterdir()) == []
    count = -1
    save_checkpoint(tmp_path / "out", spec, decoder, shard_bytes=9000)


def test_killed_run_leaves_nothing_that_loads(tmp_path: Path) -> None:
    """The state at any moment before the rename: a hidden directory without config.json."""
    spec = families.to_spec(BASE | MODELS["llama"])
    seen: list[Path] = []

    class Watch(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            seen.extend(tmp_path.glob(".*.partial"))
            assert not (tmp_path / "out").exists()
            for partial in tmp_path.glob(".*.partial"):
                with pytest.raises(CheckpointError):
                    load_decoder(partial)
            return super().__getitem__(name)

    tensors = Watch((n, p.detach()) for n, p in random_decoder(spec).named_parameters())
    save_checkpoint(tmp_path / "out", spec, tensors)
    assert seen


def test_refusals(tmp_path: Path) -> None:
    spec = families.to_spec(BASE | MODELS["llama"])
    tensors = {n: p.detach() for n, p in random_decoder(spec).named_parameters()}
    name = "layers.1.ffn.up_proj.weight"
    out = tmp_path / "out"
    for changed, words in (
        ({name: torch.ones(3, 3)}, (name, "[3, 3]", "[48, 32]")),
        ({name: tensors[name].double()}, (name, "float64")),
        ({"x": torch.ones(1)}, ("'x'", "no place")),
    ):
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(out, spec, tensors | changed)
        assert all(word in str(caught.value) for word in words)
    decoder = random_decoder(spec)
    decoder.get_submodule("layers.1.ffn.up_proj").weight = None
    with pytest.raises(CheckpointError, match=r"layers\.1\.ffn\.up_proj\.weight.*packed"):
        save_checkpoint(out, spec, decoder)
    with pytest.raises(ConfigError, match="logit_softcap"):
        save_checkpoint(out, dataclasses.replace(spec, logit_softcap=1.0), tensors)
    out.mkdir()
    (out / "file").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        save_checkpoint(out, spec, tensors)
    (out / "file").unlink()
    save_checkpoint(out, spec, tensors)  # an empty directory is as good as none
    with pytest.raises(CheckpointError, match="exists already"):
        save_checkpoint(out, spec, tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
