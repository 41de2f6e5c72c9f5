"""Manifests: a thousand damages, all caught, and named where they lie."""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_decoder, tiny_spec

from skimp.errors import CheckpointError
from skimp.model.checkpoint import read_header
from skimp.model.manifest import MANIFEST_FILE, verify
from skimp.model.saving import save_checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manifest")
    source = folder / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "tokenizer_config.json").write_text('{"a": 1}')
    decoder = tiny_decoder(tiny_spec((None,) * 4))
    return save_checkpoint(
        folder / "whole",
        decoder.spec,
        decoder,
        tokenizer_files_from=source,
        shard_bytes=60_000,
        about={"made_by": "a test"},
    )


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_whole(whole: Path) -> None:
    verdict = verify(whole, deep=True)
    assert verdict.manifest and not verdict.damages and not verdict.notes
    assert verdict.about == {"made_by": "a test"}
    assert verdict.files == len(list(whole.iterdir())) - 1


def test_a_thousand_damages(copy: Path) -> None:
    rng = random.Random(11)
    names = sorted(p.name for p in copy.iterdir())
    shards = [n for n in names if n.endswith(".safetensors")]
    assert len(shards) > 4
    kept = {name: (copy / name).read_bytes() for name in names}
    kinds = dict.fromkeys(("flip", "cut", "grow", "swap", "remove", "add", "mix"), 0)
    for _ in range(1000):
        kind = rng.choice(["flip"] * 12 + ["cut", "grow", "swap", "remove", "add", "mix"])
        name = rng.choice(names)
        if kind in ("swap", "mix"):
            name = rng.choice(shards)
        if kind == "remove" and name == MANIFEST_FILE:
            continue  # then nothing says that there was one
        kinds[kind] += 1
        data, path = kept[name], copy / name
        touched = [name]
        if kind == "flip":
            changed = bytearray(data)
            bit = rng.randrange(8 * len(data))
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
        elif kind == "cut":
            path.write_bytes(data[: rng.randrange(len(data))])
        elif kind == "grow":
            path.write_bytes(data + rng.randbytes(rng.randint(1, 64)))
        elif kind == "swap":
            other = rng.choice([n for n in shards if n != name])
            path.write_bytes(kept[other])
            (copy / other).write_bytes(data)
            touched.append(other)
        elif kind == "mix":  # a shard whose bytes are of the right number, but from elsewhere
            half = len(data) // 2
            path.write_bytes(data[:half] + bytes(b ^ 0x55 for b in data[half:]))
        elif kind == "remove":
            path.unlink()
        else:
            name = rng.choice(["model.safetensors", "extra.bin", "added_tokens.json", "x.py"])
            touched = [name]
            (copy / name).write_bytes(rng.randbytes(20))
        found = {damage.file for damage in verify(copy).damages}
        assert set(touched) == found, (kind, touched, found)
        for one in touched:
            if one in kept:
                (copy / one).write_bytes(kept[one])
            else:
                (copy / one).unlink()
    assert min(kinds.values()) > 10 and kinds["flip"] > 500
    assert not verify(copy).damages


def test_the_tensor_is_named(copy: Path) -> None:
    for shard in sorted(copy.glob("*.safetensors")):
        data = shard.read_bytes()
        for tensor in read_header(shard).values():
            changed = bytearray(data)
            changed[(tensor.begin + tensor.end) // 2] ^= 16
            shard.write_bytes(changed)
            (damage,) = verify(copy).damages
            assert (damage.file, damage.tensor) == (shard.name, tensor.name)
        shard.write_bytes(data[:8] + data[8:30].replace(b"_", b"-") + data[30:])
        (damage,) = verify(copy).damages
        assert damage.tensor is None and "header" in damage.problem
        shard.write_bytes(data)


def test_swapped_shards_are_told(copy: Path) -> None:
    a, b = sorted(copy.glob("*.safetensors"))[:2]
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    problems = {d.file: d.problem for d in verify(copy).damages}
    assert problems == {
        a.name: f"holds what {b.name} should",
        b.name: f"holds what {a.name} should",
    }


def test_links_out_and_directories(copy: Path, tmp_path: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[0]
    elsewhere = tmp_path / "elsewhere"
    shard.rename(elsewhere)
    shard.symlink_to(elsewhere)  # the right bytes, but not in the directory
    assert [d.file for d in verify(copy).damages] == [shard.name]
    shard.unlink()
    shard.mkdir()
    assert [d.file for d in verify(copy).damages] == [shard.name]


def test_what_does_not_change_the_model(copy: Path) -> None:
    (copy / "README.md").write_text("a card")
    (copy / ".cache").mkdir()
    verdict = verify(copy)
    assert not verdict.damages and len(verdict.notes) == 2


def test_a_manifest_that_lies(copy: Path) -> None:
    path = copy / MANIFEST_FILE
    value = json.loads(path.read_text())
    value["files"]["../../etc/passwd"] = value["files"]["config.json"]
    path.write_text(json.dumps(value))
    (damage,) = verify(copy).damages
    assert damage.file == MANIFEST_FILE
    path.write_text("[" * 100_000)
    assert verify(copy).damages[0].file == MANIFEST_FILE


# ---- checkpoints of others --------------------------------------------------------------------


@pytest.fixture
def foreign(copy: Path) -> Path:
    (copy / MANIFEST_FILE).unlink()
    return copy


def test_without_a_manifest_the_structure_is_checked(foreign: Path) -> None:
    verdict = verify(foreign, deep=True)
    assert not verdict.manifest and not verdict.damages and "structure" in verdict.notes[0]


def test_foreign_damages(foreign: Path, tmp_path: Path) -> None:
    shards = sorted(foreign.glob("*.safetensors"))
    kept = {p: p.read_bytes() for p in foreign.iterdir()}
    bomb = struct.pack("<Q", 1 << 40) + b"{}"
    deep = b"[" * 100_000
    cases = [
        (shards[0], kept[shards[0]][:-1]),
        (shards[0], bomb),
        (shards[0], struct.pack("<Q", len(deep)) + deep),
        (shards[1], kept[shards[0]]),
        (foreign / "config.json", b"{"),
    ]
    for path, data in cases:
        path.write_bytes(data)
        damages = verify(foreign).damages
        assert damages and damages[0].problem, path
        path.write_bytes(kept[path])
    index = foreign / "model.safetensors.index.json"
    (tmp_path / "outside.safetensors").write_bytes(kept[shards[0]])
    index.write_bytes(kept[index].replace(shards[0].name.encode(), b"../outside.safetensors"))
    (damage,) = verify(foreign).damages
    assert damage.file == index.name and "leaves the model directory" in damage.problem
    index.write_bytes(kept[index])
    assert not verify(foreign).damages


def test_pickles_are_refused(foreign: Path) -> None:
    for path in foreign.glob("model*"):
        path.unlink()
    (foreign / "pytorch_model.bin").write_bytes(b"\x80\x04")
    (damage,) = verify(foreign).damages
    assert damage.file == "pytorch_model.bin" and "can run code" in damage.problem


def test_numbers_that_are_none(tmp_path: Path) -> None:
    decoder = tiny_decoder(tiny_spec((None,)))
    decoder.layers[0].ffn.down_proj.weight.data[3, 4] = torch.nan
    out = save_checkpoint(tmp_path / "out", decoder.spec, decoder)
    assert not verify(out).damages
    (damage,) = verify(out, deep=True).damages
    assert damage.tensor == "model.layers.0.mlp.down_proj.weight" and "NaN" in damage.problem


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        verify(tmp_path / "none")
