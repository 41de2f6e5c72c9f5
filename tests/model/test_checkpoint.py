"""Damaged, dishonest and hostile checkpoints: each a one-line error that names the culprit."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from skimp.errors import CheckpointError, SkimpError
from skimp.model import families
from skimp.model.checkpoint import INDEX_FILE, map_tensors, read_header
from skimp.model.loading import load_decoder, load_spec, random_decoder, stop_token_ids
from skimp.model.saving import save_checkpoint

CONFIG = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
Q = "model.layers.0.self_attn.q_proj.weight"
EMBED = "model.embed_tokens.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A sound single-file checkpoint to damage."""
    spec = families.to_spec(CONFIG)
    return save_checkpoint(tmp_path / "model", spec, random_decoder(spec))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    spec = families.to_spec(CONFIG)
    found = save_checkpoint(tmp_path / "model", spec, random_decoder(spec), shard_bytes=6000)
    assert len(list(found.glob("*.safetensors"))) > 2
    return found


def weights(model: Path) -> Path:
    return model / "model.safetensors"


def tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    found = {k: v.clone() for k, v in load_file(weights(model)).items()}
    change(found)
    save_file(found, weights(model))


def header(model: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the header of a file, keeping its data."""
    raw = weights(model).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + length])
    replaced = change(entries)
    text = replaced if isinstance(replaced, bytes) else json.dumps(entries).encode()
    weights(model).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def config(model: Path, **changes: Any) -> None:
    (model / "config.json").write_text(json.dumps(CONFIG | changes))


def index(model: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    found = json.loads((model / INDEX_FILE).read_text())
    change(found)
    (model / INDEX_FILE).write_text(json.dumps(found))


def cut(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])


def to_pickle(model: Path) -> None:
    weights(model).unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def link_out(model: Path) -> None:
    outside = model.parent / "outside.safetensors"
    weights(model).rename(outside)
    weights(model).symlink_to(outside)


def as_fifo(model: Path) -> None:
    weights(model).unlink()
    os.mkfifo(weights(model))


def as_directory(model: Path) -> None:
    weights(model).unlink()
    weights(model).mkdir()


def deep(model: Path) -> None:
    (model / "config.json").write_text("[" * 100_000)


def swap_offsets(entries: dict[str, Any]) -> None:
    begin, end = entries[Q]["data_offsets"]
    entries[Q]["data_offsets"] = [end, begin]


DAMAGE: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no config": (lambda m: (m / "config.json").unlink(), ("config.json",)),
    "config cut": (lambda m: cut(m / "config.json", 30), ("config.json", "JSON")),
    "config list": (lambda m: (m / "config.json").write_text("[]"), ("config.json", "list")),
    "config bytes": (lambda m: (m / "config.json").write_bytes(b"\xff\xfe"), ("config.json",)),
    "config deep": (deep, ("config.json", "deep")),
    "config NaN": (
        lambda m: (m / "config.json").write_text('{"rms_norm_eps": NaN}'),
        ("config.json", "NaN"),
    ),
    "config twice": (
        lambda m: (m / "config.json").write_text('{"vocab_size": 1, "vocab_size": 2}'),
        ("config.json", "'vocab_size'"),
    ),
    "no weights": (lambda m: weights(m).unlink(), ("model.safetensors",)),
    "pickle only": (to_pickle, ("pytorch_model.bin", "unpickling")),
    "empty file": (lambda m: cut(weights(m), 0), ("model.safetensors", "truncated")),
    "cut in length": (lambda m: cut(weights(m), 5), ("model.safetensors", "truncated")),
    "cut in header": (lambda m: cut(weights(m), 100), ("model.safetensors", "truncated")),
    "cut in data": (lambda m: cut(weights(m), -1), ("truncated",)),
    "longer": (
        lambda m: weights(m).write_bytes(weights(m).read_bytes() + b"\0"),
        ("model.safetensors", "end at byte"),
    ),
    "huge header": (
        lambda m: weights(m).write_bytes(b"\xff" * 8 + weights(m).read_bytes()[8:]),
        ("model.safetensors", str(2**64 - 1)),
    ),
    "header text": (lambda m: header(m, lambda e: b"not json"), ("model.safetensors", "'{'")),
    "header json": (lambda m: header(m, lambda e: b'{"a": }'), ("model.safetensors", "JSON")),
    "header list": (lambda m: header(m, lambda e: e.update({Q: []})), (Q, "dtype")),
    "header twice": (lambda m: header(m, lambda e: b'{"a":1,"a":2}'), ("twice",)),
    "header deep": (lambda m: header(m, lambda e: b'{"a":' * 100_000), ("model.safetensors",)),
    "metadata": (
        lambda m: header(m, lambda e: e.update(__metadata__={"a": 1})),
        ("__metadata__",),
    ),
    "header dtype": (lambda m: header(m, lambda e: e[Q].update(dtype="F4")), (Q, "'F4'")),
    "header shape": (
        lambda m: header(m, lambda e: e[Q].update(shape=[16, 17])),
        (Q, "[16, 17]", "1088", "1024"),
    ),
    "negative shape": (lambda m: header(m, lambda e: e[Q].update(shape=[-16, -16])), (Q, "shape")),
    "overflowing shape": (
        lambda m: header(m, lambda e: e[Q].update(shape=[2**62, 2**62])),
        (Q, str(2**62)),
    ),
    "gigantic shape": (lambda m: header(m, lambda e: e[Q].update(shape=[10**4000])), (Q, "shape")),
    "float shape": (lambda m: header(m, lambda e: e[Q].update(shape=[16.0, 16])), (Q, "shape")),
    "one offset": (lambda m: header(m, lambda e: e[Q].update(data_offsets=[0])), (Q, "offsets")),
    "swapped offsets": (lambda m: header(m, swap_offsets), (Q, "offsets")),
    "overlap": (lambda m: header(m, lambda e: e[Q].update(data_offsets=[0, 1024])), ("starts at",)),
    "missing": (lambda m: tensors(m, lambda t: t.pop(Q)), (Q, "missing")),
    "extra": (lambda m: tensors(m, lambda t: t.update(evil=torch.ones(2))), ("'evil'",)),
    "renamed": (lambda m: tensors(m, lambda t: t.update(other=t.pop(Q))), (Q, "'other'")),
    "extra bias": (
        lambda m: tensors(m, lambda t: t.update({Q[:-6] + "bias": torch.ones(16)})),
        (Q[:-6] + "bias",),
    ),
    "wrong shape": (
        lambda m: tensors(m, lambda t: t.update({Q: torch.ones(16, 15)})),
        (Q, "[16, 15]", "[16, 16]"),
    ),
    "wrong dtype": (
        lambda m: tensors(m, lambda t: t.update({Q: torch.ones(16, 16, dtype=torch.int64)})),
        (Q, "int64", "float32"),
    ),
    "other head": (
        lambda m: tensors(m, lambda t: t.update({"lm_head.weight": t[EMBED] + 1})),
        ("lm_head.weight", EMBED, "tie_word_embeddings"),
    ),
    "untied lie": (lambda m: config(m, tie_word_embeddings=False), ("lm_head.weight", "missing")),
    "layers lie": (lambda m: config(m, num_hidden_layers=3), ("layers.2.", "missing")),
    "fewer layers": (lambda m: config(m, num_hidden_layers=1), ("layers.1.",)),
    "vocab lie": (lambda m: config(m, vocab_size=51), (EMBED, "[50, 16]", "[51, 16]")),
    "heads lie": (lambda m: config(m, num_key_value_heads=4), ("k_proj", "[8, 16]", "[16, 16]")),
    "family lie": (lambda m: config(m, model_type="qwen3", head_dim=4), ("q_norm", "missing")),
    "link out": (link_out, ("model.safetensors", "link out")),
    "pipe": (as_fifo, ("model.safetensors", "regular")),
    "directory": (as_directory, ("model.safetensors", "regular")),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage(case: str, model: Path) -> None:
    damage, words = DAMAGE[case]
    damage(model)
    with pytest.raises(SkimpError) as caught:
        load_decoder(model)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    for word in words:
        assert word in message


def move(model: Path, name: str, file: str) -> None:
    index(model, lambda i: i["weight_map"].update({name: file}))


def first_shard(model: Path) -> Path:
    return sorted(model.glob("*.safetensors"))[0]


def duplicate(model: Path) -> None:
    """The first shard's first tensor also in the second, which the index cannot say."""
    shards = sorted(model.glob("*.safetensors"))[:2]
    one, two = load_file(shards[0]), load_file(shards[1])
    name = next(iter(one))
    save_file(two | {name: one[name].clone()}, shards[1])


def both(model: Path) -> None:
    shutil.copy(first_shard(model), model / "model.safetensors")


def link_shard(model: Path, target: Path) -> None:
    file = first_shard(model)
    file.rename(target)
    file.symlink_to(target)


def loop(model: Path) -> None:
    file = first_shard(model)
    file.unlink()
    file.symlink_to(file)


SHARD_DAMAGE: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "missing shard": (lambda m: first_shard(m).unlink(), ("-00001-of-", "missing")),
    "truncated shard": (lambda m: cut(first_shard(m), 50), ("-00001-of-", "truncated")),
    "absolute": (lambda m: move(m, EMBED, "/etc/passwd"), ("'/etc/passwd'", "leaves")),
    "parent": (lambda m: move(m, EMBED, "../model/x.safetensors"), ("'../model", "leaves")),
    "hidden parent": (lambda m: move(m, EMBED, "a/../../x.safetensors"), ("leaves",)),
    "backslash": (lambda m: move(m, EMBED, "..\\x.safetensors"), ("leaves",)),
    "empty name": (lambda m: move(m, EMBED, ""), ("leaves",)),
    "NUL": (lambda m: move(m, EMBED, "a\0b"), ("leaves",)),
    "number": (lambda m: index(m, lambda i: i["weight_map"].update({EMBED: 3})), (EMBED,)),
    "no map": (lambda m: index(m, lambda i: i.pop("weight_map")), ("weight_map",)),
    "index cut": (lambda m: cut(m / INDEX_FILE, 40), (INDEX_FILE, "JSON")),
    "unlisted": (lambda m: index(m, lambda i: i["weight_map"].pop(EMBED)), (EMBED, "index")),
    "listed only": (
        lambda m: move(m, "ghost", first_shard(m).name),
        ("'ghost'", "-00001-of-"),
    ),
    "elsewhere": (
        lambda m: move(m, EMBED, sorted(m.glob("*.safetensors"))[1].name),
        (EMBED, "-00002-of-"),
    ),
    "duplicate": (duplicate, (EMBED, "both")),
    "single too": (both, ("model.safetensors", INDEX_FILE)),
    "link out": (lambda m: link_shard(m, m.parent / "x"), ("-00001-of-", "link out")),
    "blobs of another": (
        lambda m: ((m.parent / "blobs").mkdir(), link_shard(m, m.parent / "blobs" / "x")),
        ("-00001-of-", "link out"),
    ),
    "link loop": (loop, ("-00001-of-",)),
}


@pytest.mark.parametrize("case", SHARD_DAMAGE)
def test_shard_damage(case: str, sharded: Path) -> None:
    damage, words = SHARD_DAMAGE[case]
    load_decoder(sharded)
    damage(sharded)
    with pytest.raises(CheckpointError) as caught:
        load_decoder(sharded)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    for word in words:
        assert word in message


def test_links_that_are_fine(sharded: Path, tmp_path: Path) -> None:
    """The Hub cache's snapshots link into the blobs beside them; links inside are harmless."""
    hub = tmp_path / "models--a--b"
    snapshot = hub / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (hub / "blobs").mkdir()
    for number, file in enumerate(sorted(sharded.iterdir())):
        file.rename(hub / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    load_decoder(snapshot)
    load_decoder(tmp_path / "models--a--b" / "snapshots" / ".." / "snapshots" / "abc")


def test_harmless_extras(model: Path) -> None:
    expected = dict(load_decoder(model).named_parameters())
    tensors(
        model,
        lambda t: t.update(
            {
                "lm_head.weight": t[EMBED].clone(),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
            }
        ),
    )
    found = dict(load_decoder(model).named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_changed_between_check_and_use(model: Path) -> None:
    stored = read_header(weights(model))
    data = weights(model).read_bytes()
    weights(model).unlink()
    weights(model).write_bytes(data[:-4] + b"\0\0\0\0")
    with pytest.raises(CheckpointError, match="changed while"):
        list(map_tensors(stored))


def test_unaligned_and_empty_tensors(tmp_path: Path) -> None:
    """Legal, if rare: data at odd offsets, tensors without elements, scalars."""
    entries: dict[str, Any] = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "odd": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        "none": {"dtype": "F32", "shape": [0, 3], "data_offsets": [9, 9]},
        "one": {"dtype": "F32", "shape": [], "data_offsets": [9, 13]},
    }
    raw = json.dumps(entries).encode()
    data = b"\7" + torch.tensor([1.5, -2.0]).numpy().tobytes() + torch.tensor(3.0).numpy().tobytes()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    found = dict(map_tensors(read_header(file)))
    assert found["odd"].tolist() == [1.5, -2.0] and found["byte"].tolist() == [7]
    assert found["none"].shape == (0, 3) and found["one"].item() == 3.0


def test_never_laxer_than_the_safetensors_library(model: Path) -> None:
    """800 damaged headers: what the library refuses we refuse, what we read it reads alike."""
    random.seed(0)
    raw = weights(model).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    accepted = 0
    for _ in range(800):
        damaged = bytearray(raw)
        for _ in range(random.choice((1, 1, 2, 5))):
            at = random.choice((random.randrange(end), random.randrange(8)))
            damaged[at] = random.choice((*b'0123456789{}[]",:-', random.randrange(256)))
        weights(model).write_bytes(damaged)
        try:
            ours = dict(map_tensors(read_header(weights(model))))
        except CheckpointError as error:
            assert "\n" not in str(error)
            continue
        accepted += 1
        with safe_open(weights(model), framework="pt") as theirs:
            assert set(theirs.keys()) == set(ours)
            for name, tensor in ours.items():
                assert torch.equal(
                    tensor.view(torch.uint8), theirs.get_tensor(name).view(torch.uint8)
                )
    assert accepted > 5  # a letter of a name may change


def test_names_from_files_cannot_flood_or_steer_a_terminal(model: Path) -> None:
    tensors(model, lambda t: t.update({"\x1b[2J\n" + "a" * 10**6: torch.ones(1)}))
    with pytest.raises(CheckpointError) as caught:
        load_decoder(model)
    assert len(str(caught.value)) < 1100 and str(caught.value).isprintable()
    assert str(CheckpointError("a\x1b[0m\n\udc80")) == "a\\x1b[0m \\udc80"


def test_stop_tokens(model: Path) -> None:
    spec = load_spec(model)
    assert stop_token_ids(model, spec) == spec.eos_token_ids == (2,)
    (model / "generation_config.json").write_text('{"eos_token_id": [7, 2], "temperature": 0.6}')
    assert stop_token_ids(model, spec) == (2, 7)
    (model / "generation_config.json").write_text('{"eos_token_id": 50}')
    with pytest.raises(SkimpError, match="eos_token_id"):
        stop_token_ids(model, spec)
