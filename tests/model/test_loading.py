"""Dtypes, mapping without copies, random weights, and where a model name leads."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from skimp.errors import CheckpointError, ConfigError, ModelNotFoundError
from skimp.model import families, locate
from skimp.model.loading import load_decoder, random_decoder
from skimp.model.locate import locate_model
from skimp.model.saving import save_checkpoint

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize(
    ("stored", "asked", "got"),
    [
        ("float32", "auto", torch.float32),
        ("bfloat16", "auto", torch.bfloat16),
        ("float16", "auto", torch.float32),
        ("bfloat16", "float32", torch.float32),
        ("float32", torch.bfloat16, torch.bfloat16),
        ("bfloat16", "float16", torch.float16),
    ],
)
def test_dtypes(stored: str, asked: Any, got: torch.dtype, tmp_path: Path) -> None:
    spec = families.to_spec(CONFIG)
    source = random_decoder(spec, dtype=stored)
    save_checkpoint(tmp_path / "m", spec, source)
    decoder = load_decoder(tmp_path / "m", dtype=asked)
    assert decoder.spec.dtype == stored
    for name, parameter in decoder.named_parameters():
        assert parameter.dtype == got and not parameter.requires_grad
        assert torch.equal(parameter, source.get_parameter(name).to(got))


def test_mixed_dtypes_become_the_configs(tmp_path: Path) -> None:
    spec = families.to_spec(CONFIG)
    parameters = dict(random_decoder(spec, dtype="bfloat16").named_parameters())
    mixed = {n: p.float() if "norm" in n else p.detach() for n, p in parameters.items()}
    save_checkpoint(tmp_path / "m", spec, mixed)
    assert {p.dtype for p in load_decoder(tmp_path / "m").parameters()} == {torch.bfloat16}


def test_dtype_nobody_has(tmp_path: Path) -> None:
    spec = families.to_spec(CONFIG)
    save_checkpoint(tmp_path / "m", spec, random_decoder(spec))
    for dtype in ("float8_e4m3fn", "nonsense", "nn", torch.int8):
        with pytest.raises(ConfigError, match="dtype="):
            load_decoder(tmp_path / "m", dtype=dtype)


def test_writing_to_a_weight_leaves_the_file_alone(tmp_path: Path) -> None:
    spec = families.to_spec(CONFIG)
    save_checkpoint(tmp_path / "m", spec, random_decoder(spec))
    first, second = load_decoder(tmp_path / "m"), load_decoder(tmp_path / "m")
    before = second.norm.weight.clone()
    first.norm.weight.add_(1)
    assert torch.equal(second.norm.weight, before)
    assert torch.equal(load_decoder(tmp_path / "m").norm.weight, before)


def test_weights_survive_their_file(tmp_path: Path) -> None:
    spec = families.to_spec(CONFIG)
    source = random_decoder(spec)
    save_checkpoint(tmp_path / "m", spec, source)
    decoder = load_decoder(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    assert torch.equal(decoder.get_parameter("norm.weight"), source.norm.weight)


PEAK = """
import json, sys
import torch
from skimp.model.layers import Linear
from skimp.model.loading import load_decoder

def resident():
    # Anonymous, file-backed and shared pages of this process, as the kernel counts them now.
    fields = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Rss"))
    return sum(int(value.split()[0]) * 1024 for value in fields.values())

load_decoder(sys.argv[2])  # a tiny model first: modules and thread pools are not weights
start = resident()
decoder = load_decoder(sys.argv[1])
weights = sum(p.numel() * p.element_size() for p in decoder.parameters())
loaded = peak = resident() - start
packed = []
for module in decoder.modules():
    if isinstance(module, Linear):
        packed.append(module.weight.detach().clone())
        peak = max(peak, resident() - start)
        module.weight = None
print(json.dumps({"weights": weights, "loaded": loaded, "peak": peak}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("shard_bytes", [10**10, 10 * 10**6])
def test_packing_never_needs_two_copies(shard_bytes: int, tmp_path: Path) -> None:
    """A backend that packs one matrix after another peaks below 1.3 times the weights, counting
    anonymous and file pages together; loading alone touches next to nothing."""
    wide = CONFIG | {
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "head_dim": 64,
    }
    for name, config in (("big", wide), ("small", CONFIG)):
        spec = families.to_spec(config)
        source = random_decoder(spec, dtype="bfloat16")
        save_checkpoint(tmp_path / name, spec, source, shard_bytes=shard_bytes)
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "big"), str(tmp_path / "small")],
        capture_output=True,
        text=True,
        check=True,
    )
    figures = json.loads(run.stdout)
    assert figures["weights"] > 40 * 10**6
    assert figures["loaded"] < 0.1 * figures["weights"], figures
    assert figures["peak"] < 1.3 * figures["weights"], figures


def test_random_weights() -> None:
    spec = families.to_spec(CONFIG | {"vocab_size": 40_000, "hidden_size": 64})
    one, same, other = (random_decoder(spec, seed) for seed in (5, 5, 6))
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, same.get_parameter(name))
        assert not torch.equal(parameter, other.get_parameter(name))
        centre = 1.0 if "norm" in name else 0.0
        assert abs(float(parameter.mean()) - centre) < 0.02
        assert 0.01 < float(parameter.std()) < 0.03
    q, k = one.get_parameter("layers.0.mixer.q_proj.weight"), one.embed_tokens.weight
    assert k is not None and not torch.equal(q.view(-1)[:64], k.view(-1)[:64])
    rounded = random_decoder(spec, 5, "bfloat16")
    assert torch.equal(rounded.norm.weight, one.norm.weight.bfloat16())
    torch.set_num_threads(2)
    assert torch.equal(random_decoder(spec, 5).embed_tokens.weight, one.embed_tokens.weight)  # type: ignore[arg-type]
    gemma = random_decoder(dataclasses.replace(spec, norm_plus_one=True))
    assert abs(float(gemma.norm.weight.mean())) < 0.02


def test_names_lead_to_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "assets" / "tales").mkdir(parents=True)
    (tmp_path / "org" / "tales").mkdir(parents=True)
    monkeypatch.setattr(locate, "embedded_models", lambda: {"tales": tmp_path / "assets" / "tales"})
    monkeypatch.chdir(tmp_path)
    assert locate_model("tales") == tmp_path / "assets" / "tales"
    assert locate_model("org/tales") == Path("org/tales")
    assert locate_model(tmp_path / "org" / "tales") == tmp_path / "org" / "tales"
    (tmp_path / "file.gguf").touch()
    for name, words in {
        "./nowhere": "no such directory",
        "/nowhere/at/all": "no such directory",
        "~/nowhere-at-all": "no such directory",
        "a/b/c": "no such directory",
        "nowhere": "embedded: tales",
        "": "empty",
        "file.gguf": "not a directory",
        "..\\x": "no such directory",
        "~no-such-user-here/x": "not",
        "a/" + "b" * 300: "not",
        "a--b/c": "Hub",
        "nul\0byte": "no such directory",
    }.items():
        with pytest.raises(ModelNotFoundError) as caught:
            locate_model(name)
        assert words in str(caught.value), name
    with pytest.raises(ModelNotFoundError, match="no such directory"):
        locate_model(Path("org/nowhere"))


def test_hub_ids(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    calls: list[dict[str, Any]] = []

    def download(repository: str, **options: Any) -> str:
        calls.append(options)
        if repository == "org/offline":
            raise LocalEntryNotFoundError("cannot find\nthe requested files")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate_model("org/model-0.5B") == tmp_path
    assert not any(p.endswith((".bin", ".py", ".pt")) for p in calls[0]["allow_patterns"])
    with pytest.raises(ModelNotFoundError, match=r"org/offline: .*cannot be reached"):
        locate_model("org/offline")


def test_directory_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        load_decoder(tmp_path / "nothing")
