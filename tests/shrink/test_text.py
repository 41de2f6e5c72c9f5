"""Calibration text."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from skimp.errors import ShrinkError
from skimp.model.locate import embedded_models
from skimp.shrink.recipe import Calibration
from skimp.shrink.text import chat_warning, divergence, load_samples, samples, unlike
from skimp.text import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(embedded_models()["tales"])


def test_samples_are_pieces_of_the_text() -> None:
    ids = list(range(1000))
    found = samples(ids, Calibration(samples=7, tokens=50), 3, None)
    assert found.shape == (7, 50) and found.dtype == torch.int64
    assert all(row.tolist() == list(range(int(row[0]), int(row[0]) + 50)) for row in found)
    assert len({int(row[0]) for row in found}) == 7 and all(int(row[0]) % 50 == 0 for row in found)
    assert torch.equal(found, samples(ids, Calibration(samples=7, tokens=50), 3, None))
    assert not torch.equal(found, samples(ids, Calibration(samples=7, tokens=50), 4, None))
    begun = samples(ids, Calibration(samples=7, tokens=50), 3, 777)
    assert begun.shape == (7, 50) and set(begun[:, 0].tolist()) == {777}
    assert samples(ids, Calibration(tokens=50), 0, None).shape == (20, 50)


def test_too_short() -> None:
    with pytest.raises(ShrinkError, match=r"the text has 99 tokens, and 2 samples of 50 need 100"):
        samples(list(range(99)), Calibration(samples=2, tokens=50), 0, None)
    with pytest.raises(ShrinkError, match="1 samples of 512 need 512"):
        samples(list(range(99)), Calibration(), 0, None)


def test_default_text(tokenizer: Tokenizer) -> None:
    found = load_samples(Calibration(), tokenizer, 0, 1 << 20)
    assert found.shape[1] == 512 and len(found) >= 32


def test_chat(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "A fox ran."}]
    path.write_text((json.dumps({"messages": turns}) + "\n") * 40)
    settings = Calibration(chat=str(path), samples=4, tokens=32)
    found = load_samples(settings, tokenizer, 0, 1 << 20)
    assert found.shape == (4, 32) and "A fox ran." in tokenizer.decode(found[0].tolist())
    assert chat_warning(settings, tokenizer) is None
    assert "plain" in str(chat_warning(Calibration(), tokenizer))
    for line, says in [
        ("{", "line 2: not JSON"),
        ('{"a": 1}', "line 2: messages: missing"),
        ('{"messages": 5}', "line 2: messages"),
    ]:
        path.write_text(json.dumps({"messages": turns}) + "\n" + line)
        with pytest.raises(ShrinkError, match=says):
            load_samples(settings, tokenizer, 0, 1 << 20)
    path.write_bytes(b"\xff")
    with pytest.raises(ShrinkError, match="not UTF-8 at byte 0"):
        load_samples(settings, tokenizer, 0, 1 << 20)


def test_vocabulary(tokenizer: Tokenizer) -> None:
    with pytest.raises(ShrinkError, match="beyond the model's 10"):
        load_samples(Calibration(), tokenizer, 0, 10)


def test_likeness() -> None:
    rng = random.Random(0)
    low, high = [[rng.randrange(a, a + 50) for _ in range(4000)] for a in (0, 25)]
    assert divergence(low, low) == 0
    assert divergence([1, 2], [3, 4]) == 1
    assert unlike(low, low[2000:]) is None
    warning = unlike(low, high)
    assert warning is not None and "unlike" in warning


def test_likeness_of_the_packaged_texts(tokenizer: Tokenizer) -> None:
    from skimp.shrink.text import default_text

    ours = tokenizer.encode(default_text().read_text())
    theirs = tokenizer.encode(default_text().with_name("evaluation.txt").read_text())
    code = tokenizer.encode(Path(__file__).read_text())
    assert unlike(ours, code) is not None
    assert divergence(ours[:5000], theirs[:5000]) < divergence(ours[:2000], code[:2000])
