"""A model directory small enough to load in every test, and ways to run a command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from skimp.cli import make_app

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "torch_dtype": "float32",
}


def write_model(directory: Path, **changes: Any) -> Path:
    """A llama of random weights and a tokenizer of single bytes, with ChatML tokens."""
    from safetensors.torch import save_file
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    from skimp.model import families
    from skimp.model.loading import random_decoder

    directory.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **changes}
    spec = families.to_spec(config)
    names = families.tensor_names(spec)
    decoder = random_decoder(spec, seed=3)
    tensors = {names[name]: p.detach().clone() for name, p in decoder.named_parameters()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"})
    )
    return directory


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("configs") / "small.json"
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test measures this machine, or writes to the user's cache."""
    from skimp.cost import hardware_by_name

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    desktop = hardware_by_name("desktop")
    monkeypatch.setattr("skimp.cost.this_machine", lambda **kw: desktop)
    monkeypatch.setattr("skimp.meter.calibrate.engine_hardware", lambda engine: desktop)
    monkeypatch.setattr("skimp.meter.calibrate.this_machine", lambda **kw: desktop)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def skimp() -> Callable[..., Any]:
    """Runs a command in this process: ``skimp("generate", model, "text", input=...)``."""
    app = make_app()

    def run(*args: object, input: str | bytes | None = None) -> Any:
        return CliRunner().invoke(app, [str(a) for a in args], input=input)

    return run


@pytest.fixture
def script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command in a process of its own."""

    def run(*args: object, **kw: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "skimp", *(str(a) for a in args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, **kw)

    return run
