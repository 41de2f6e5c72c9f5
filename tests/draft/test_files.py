"""The published layout of draft heads: what is written is read back, what is not ours refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from draft.heads import tiny_head, tiny_head_spec
from safetensors.torch import load_file, save_file
from tiny_models import tiny_decoder, tiny_spec

from skimp.draft import read_head, training_record, write_head
from skimp.draft.files import default_taps, read_spec
from skimp.errors import CheckpointError, ConfigError, SkimpError, SkimpWarning
from skimp.model.draft_head import DraftHead

TARGET = tiny_spec()
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_head(tmp_path / "head", tiny_head(TARGET))


def edit(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def rewrite(directory: Path, change: Callable[[Tensors], Any]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def assert_same(a: DraftHead, b: DraftHead) -> None:
    assert a.spec == b.spec and torch.equal(a.token_ids, b.token_ids)
    pairs = dict(a.named_parameters()), dict(b.named_parameters())
    assert pairs[0].keys() == pairs[1].keys()
    for name, parameter in pairs[0].items():
        assert parameter.dtype == pairs[1][name].dtype, name
        assert torch.equal(parameter, pairs[1][name]), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "bfloat16"},
        {"draft_vocab_size": TARGET.vocab_size},
        {"taps": (1, 2)},
        {"taps": (3,), "norm_eps": 1e-5},
    ],
    ids=str,
)
def test_round_trip(tmp_path: Path, changes: dict[str, Any]) -> None:
    head = tiny_head(TARGET, **changes)
    record = {"tokens": 5, "held_out": {"drawn": 1.5}}
    write_head(tmp_path / "head", head, record=record)
    again = read_head(tmp_path / "head", TARGET)
    assert_same(head, again)
    assert training_record(tmp_path / "head") == record
    assert read_spec(tmp_path / "head", TARGET) == head.spec
    wider = read_head(tmp_path / "head", TARGET, dtype="float32")
    assert all(p.dtype == torch.float32 for p in wider.parameters())


def test_the_published_names_and_shapes(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    size, inner, words = 64, 80, 48
    layer = "midlayer."
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "fc.weight": (size, 3 * size),
        f"{layer}input_layernorm.weight": (size,),
        f"{layer}hidden_norm.weight": (size,),
        f"{layer}self_attn.q_proj.weight": (64, 2 * size),
        f"{layer}self_attn.k_proj.weight": (32, 2 * size),
        f"{layer}self_attn.v_proj.weight": (32, 2 * size),
        f"{layer}self_attn.o_proj.weight": (size, 64),
        f"{layer}post_attention_layernorm.weight": (size,),
        f"{layer}mlp.gate_proj.weight": (inner, size),
        f"{layer}mlp.up_proj.weight": (inner, size),
        f"{layer}mlp.down_proj.weight": (size, inner),
        "norm.weight": (size,),
        "lm_head.weight": (words, size),
        "d2t": (words,),
        "t2d": (TARGET.vocab_size,),
    }
    head = read_head(directory, TARGET)
    assert torch.equal(torch.arange(words) + tensors["d2t"], head.token_ids)
    assert torch.equal(tensors["t2d"].nonzero()[:, 0], head.token_ids)
    q = tensors[f"{layer}self_attn.q_proj.weight"]
    assert torch.equal(q[:, :size], head.get_parameter("embed_qkv.0.weight"))
    assert torch.equal(q[:, size:], head.get_parameter("feature_qkv.0.weight"))
    fc = tensors["fc.weight"]
    assert torch.equal(fc[:, size : 2 * size], head.get_parameter("fusion.parts.1.weight"))
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["eagle_aux_hidden_state_layer_ids"] == [0, 2, 3]


def test_other_exports(directory: Path) -> None:
    """Half-precision floats, the layer's other name, no maps where there is nothing to map, and an
    embedding table that is the target's."""
    head = tiny_head(TARGET, draft_vocab_size=TARGET.vocab_size, dtype="float16")
    write_head(directory, head, overwrite=True)
    table = tiny_decoder().embed_tokens.weight
    assert table is not None

    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith("midlayer.")]:
            tensors[name.replace("midlayer.", "layers.0.")] = tensors.pop(name)
        del tensors["t2d"], tensors["d2t"]
        tensors["embed_tokens.weight"] = table.detach().clone()

    head.token_ids = torch.arange(TARGET.vocab_size)
    rewrite(directory, change)
    edit(directory, draft_vocab_size=...)
    again = read_head(directory, TARGET, table=table)
    assert again.dtype == torch.float32 and torch.equal(again.token_ids, head.token_ids)
    with pytest.raises(CheckpointError, match=r"embed_tokens.*is not there to compare"):
        read_head(directory, TARGET)
    with pytest.raises(CheckpointError, match=r"'embed_tokens.weight' differs from the target's"):
        read_head(directory, TARGET, table=table + 1)


@pytest.mark.parametrize(
    ("outer", "inner", "taps"),
    [
        (..., {}, (2, 4, 5)),
        (..., {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}, (2, 4, 5)),
        (..., {"eagle_aux_hidden_state_layer_ids": [2, 3, 6]}, (2, 3, 6)),
        ([1, 3, 4], {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}, (1, 3, 4)),
    ],
)
def test_taps(directory: Path, outer: Any, inner: dict[str, Any], taps: tuple[int, ...]) -> None:
    deep = dataclasses.replace(TARGET, layers=TARGET.layers * 2)
    assert default_taps(8) == (2, 4, 5)
    edit(directory, eagle_aux_hidden_state_layer_ids=outer, eagle_config=inner)
    assert read_head(directory, deep).spec.taps == taps


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["LlamaEagle"]}, r"architectures=\['LlamaEagle'\] is not a draft head's"),
    ({"model_type": "qwen3"}, r"model_type='qwen3' is not llama"),
    ({"norm_before_residual": True}, r"norm_before_residual=True is not supported"),
    ({"num_hidden_layers": 2}, r"num_hidden_layers=2: heads of one layer"),
    ({"attention_bias": True}, r"attention_bias=True is not supported"),
    ({"mlp_bias": True}, r"mlp_bias=True is not supported"),
    ({"hidden_size": 32}, r"hidden_size=32, but the target has 64"),
    ({"target_hidden_size": 128}, r"target_hidden_size=128, but the target has 64"),
    ({"vocab_size": 300}, r"vocab_size=300, but the target has 320"),
    ({"draft_vocab_size": 400}, r"draft_vocab_size=400, but the target has 320 words"),
    ({"draft_vocab_size": True}, r"draft_vocab_size must be an integer"),
    ({"sliding_window": 64}, r"sliding_window=64 is not supported"),
    ({"fc_norm": True}, r"fc_norm=True is not supported"),
    ({"layer_scale": 2}, r"layer_scale=2 is not a field of this class"),
    ({"eagle_config": {"use_aux_hidden_state": False}}, r"eagle_config.use_aux_hidden_state=False"),
    ({"eagle_config": {"parallel_draft_step": 4}}, r"eagle_config.parallel_draft_step=4 is not"),
    ({"eagle_config": {"mystery": 4}}, r"eagle_config.mystery=4 is not supported"),
    ({"eagle_aux_hidden_state_layer_ids": [3, 1]}, r"\[3, 1\]: layers in order"),
    ({"eagle_aux_hidden_state_layer_ids": [0, 2, 5]}, r"must be between 0 and 4, got 5"),
    ({"eagle_aux_hidden_state_layer_ids": "all"}, r"must be a list of layers, got 'all'"),
    ({"eagle_aux_hidden_state_layer_ids": ..., "eagle_config": {}}, r"a target of 4 layers has no"),
    ({"rope_scaling": {"rope_type": "mystery"}}, r"rope_scaling.rope_type='mystery'"),
    ({"skimp": 3}, r"skimp must be an object"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_configs_refused(directory: Path, fields: dict[str, Any], message: str) -> None:
    edit(directory, **fields)
    with pytest.raises(ConfigError, match=message) as error:
        read_head(directory, TARGET)
    assert str(directory / "config.json") in str(error.value)


def test_unknown_fields_are_named(directory: Path) -> None:
    edit(directory, colour="blue")
    with pytest.warns(SkimpWarning, match="colour"):
        read_head(directory, TARGET)


def _set(name: str, tensor: torch.Tensor) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.__setitem__(name, tensor)


DAMAGED: list[tuple[Callable[[Tensors], Any], str]] = [
    (lambda t: t.pop("fc.weight"), r"'fc.weight' is missing"),
    (lambda t: t.pop("d2t"), r"'d2t' is missing, though draft_vocab_size=48 is not"),
    (_set("fc.weight", torch.zeros(64, 128)), r"'fc.weight' has shape \[64, 128\]"),
    (_set("norm.weight", torch.zeros(64, dtype=torch.int8)), r"'norm.weight' is torch.int8"),
    (_set("midlayer.self_attn.q_proj.bias", torch.zeros(64)), r"no place for '.*q_proj.bias'"),
    (_set("d2t", torch.full((48,), 300)), r"'d2t' leads out of the 320 target words"),
    (_set("d2t", -torch.arange(48)), r"'d2t' leads to a word twice"),
    (_set("t2d", torch.ones(320, dtype=torch.bool)), r"'t2d' and 'd2t' disagree"),
    (_set("layers.0.hidden_norm.weight", torch.zeros(64)), r"are the same"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGED, ids=[m for _, m in DAMAGED])
def test_tensors_refused(directory: Path, change: Callable[[Tensors], Any], message: str) -> None:
    rewrite(directory, change)
    with pytest.raises(CheckpointError, match=message):
        read_head(directory, TARGET)


def test_what_the_layout_cannot_say(tmp_path: Path) -> None:
    mixer = tiny_head_spec(TARGET).mixer
    for field, value in (("window", 8), ("softcap", 3.0), ("scale", 1.0)):
        head = tiny_head(TARGET, mixer=dataclasses.replace(mixer, **{field: value}))
        with pytest.raises(ConfigError, match=f"mixer.{field} is"):
            write_head(tmp_path / "head", head)
    head = tiny_head(TARGET)
    head.lm_head.take()
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' is missing, or a backend has"):
        write_head(tmp_path / "head", head)
    assert list(tmp_path.iterdir()) == []


def test_only_heads_are_overwritten(directory: Path, tmp_path: Path) -> None:
    head = tiny_head(TARGET, seed=1)
    with pytest.raises(CheckpointError, match="exists already"):
        write_head(directory, head)
    write_head(directory, head, overwrite=True)
    assert_same(read_head(directory, TARGET), head)
    other = tmp_path / "other"
    other.mkdir()
    (other / "diary.txt").write_text("dear diary")
    with pytest.raises(SkimpError, match="is not a draft head, and so is not overwritten"):
        write_head(other, head, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head", "other"]
