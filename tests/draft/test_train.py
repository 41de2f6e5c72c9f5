"""Training a draft head for a small model: what it learns, what is written, what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shrink.heal_runs import write_healable
from tiny_models import mixed_spec, tiny_decoder, tiny_spec, with_latents

from skimp.draft import read_head, training_record
from skimp.draft.loss import Loss
from skimp.draft.options import TrainOptions
from skimp.draft.start import choose_words, head_spec, start_tensors
from skimp.draft.train import Outcome, train_head
from skimp.errors import OptionError, SkimpError
from skimp.model.loading import load_spec

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK: dict[str, Any] = {
    "tokens": 8192,
    "length": 64,
    "batch": 256,
    "unroll": 3,
    "lr": 0.01,
    "held_out": 512,
    "layers": (0, 1),
    "measurements": 4,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_healable(tmp_path_factory.mktemp("draft"))


def train(model: Path, output: Path, **changes: Any) -> Outcome:
    text = changes.pop("text", model.parent / "text.txt")
    return train_head(model, output, TrainOptions(**{**QUICK, **changes}), text=text)


@pytest.mark.parametrize("loss", ["tv", "lk"])
def test_it_learns(model: Path, tmp_path: Path, loss: Loss) -> None:
    outcome = train(model, tmp_path / "head", loss=loss)
    first, last = outcome.curve[0], outcome.curve[-1]
    print(f"{loss}: accepted {first['accepted']} and then {last['accepted']}")
    assert last["loss"] < first["loss"]
    assert all(b > a for a, b in zip(first["accepted"], last["accepted"]))
    assert outcome.report.drawn > 1.3 and len(outcome.report.agreed) == 3
    assert outcome.covered == 1.0


def test_what_is_written(model: Path, tmp_path: Path) -> None:
    outcome = train(model, tmp_path / "head", tokens=512, vocabulary=12, heads=2, ffn=24)
    spec = load_spec(model)
    head = read_head(tmp_path / "head", spec)
    assert head.spec == outcome.spec and head.spec.dtype == spec.dtype
    assert head.spec.mixer.num_heads == 2 and head.spec.ffn.intermediate_size == 24
    assert len(head.token_ids) == 12 and 0.5 < outcome.covered < 1.0
    record = training_record(tmp_path / "head")
    assert record["text"] == "text.txt" and record["tokens"] == 512
    assert record["held_out"]["covered"] == outcome.covered
    assert record["held_out"]["accepted"] == list(outcome.report.accepted)
    assert str(model.parent) not in (tmp_path / "head" / "config.json").read_text()
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    assert config["draft_vocab_size"] == 12


def test_the_same_again(model: Path, tmp_path: Path) -> None:
    """Bit for bit, on one thread."""
    for name in ("a", "b"):
        train(model, tmp_path / name, tokens=1024)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert a == b


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"text": "self", "self_tokens": 3000}])
def test_other_ways(model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    outcome = train(model, tmp_path / "head", tokens=4096, **changes)
    assert outcome.report.accepted[0] > outcome.curve[0]["accepted"][0]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"layers": None}, r"layers: a target of 2 layers has no default"),
    ({"layers": (1, 0)}, r"layers: 1,0: name layers in order, of 0 to 2"),
    ({"layers": (0, 3)}, r"layers: 0,3: name layers in order"),
    ({"vocabulary": 300}, r"vocabulary: 300 words, and the target has 260"),
    ({"length": 300, "batch": 512}, r"length: 300 tokens, and the model has 256 positions"),
    ({"kv_heads": 3}, r"kv_heads: 3 do not divide 4 heads"),
    ({"held_out": 10**6}, r"held_out: 1,000,000 tokens are to be held out"),
    ({"self_tokens": 100}, r"self_tokens: how much the target writes, but text is not self"),
    ({"lr": 1e30}, r"lr: "),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_refused(model: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SkimpError, match=message):
        train(model, tmp_path / "head", **{"tokens": 1024, **changes})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", 0),
        ("loss", "hinge"),
        ("unroll", 0),
        ("unroll", 63),
        ("decay", 0.0),
        ("lr", -1.0),
        ("batch", 63),
        ("layers", ()),
        ("vocabulary", 0),
        ("device", "tpu"),
        ("dtype", "float16"),
        ("seed", -1),
    ],
)
def test_options_refused(field: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"^{field}: "):
        TrainOptions(**{**QUICK, field: value})


def test_shapes_follow_the_target() -> None:
    options = TrainOptions(tokens=1, layers=(0, 1, 2))
    spec = head_spec(tiny_spec(), options, 100)
    assert (spec.mixer.num_heads, spec.mixer.num_kv_heads, spec.mixer.head_dim) == (4, 2, 16)
    assert spec.mixer.window is None and not spec.mixer.qk_norm
    assert spec.ffn.intermediate_size == 96 and spec.draft_vocab_size == 100
    assert head_spec(mixed_spec(), options, 100).mixer == spec.mixer
    latents = head_spec(with_latents(tiny_spec(), None), options, 100).mixer
    assert (latents.num_heads, latents.num_kv_heads, latents.head_dim) == (1, 1, 64)
    assert latents.rope is not None and not latents.rope.interleaved
    assert latents.rope.rotary_dim == 64


def test_the_most_frequent_words() -> None:
    docs = [np.array([5, 5, 7, 1], dtype=np.int32), np.array([7, 5, 9], dtype=np.int32)]
    assert choose_words(docs, 12, 3).tolist() == [1, 5, 7]
    assert choose_words(docs, 12, 6).tolist() == [0, 1, 2, 5, 7, 9]
    assert choose_words(docs, 12, None).tolist() == list(range(12))


def test_first_weights_are_the_targets_output() -> None:
    target = tiny_decoder(dataclasses.replace(tiny_spec(), logit_scale=0.5))
    words = torch.tensor([3, 4, 200])
    spec = head_spec(target.spec, TrainOptions(tokens=1, layers=(0, 3)), 3)
    start = start_tensors(spec, target, words, seed=0)
    assert target.head.weight is not None
    torch.testing.assert_close(start["lm_head.weight"], 0.5 * target.head.weight[words])
    torch.testing.assert_close(start["norm.weight"], target.norm.weight)
    last = target.layers[-1]
    torch.testing.assert_close(
        start["ffn.up_proj.weight"], last.get_parameter("ffn.up_proj.weight")
    )
    again = start_tensors(spec, target, words, seed=0)
    assert all(torch.equal(tensor, again[name]) for name, tensor in start.items())
    other = start_tensors(spec, target, words, seed=1)
    assert not torch.equal(start["o_proj.weight"], other["o_proj.weight"])
