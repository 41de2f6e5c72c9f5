"""Calibration text."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from skimp.errors import ShrinkError
from skimp.model.locate import embedded_models
from skimp.shrink.recipe import Calibration
from skimp.shrink.text import Imprint, chat_warning, divergence, load_samples, samples
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


def imprint(ids: list[int], begin: int | None = None) -> Imprint:
    tokens = torch.tensor(ids[: len(ids) // 8 * 8]).view(8, -1)
    if begin is not None:
        tokens = torch.cat((torch.full((8, 1), begin), tokens), dim=1)
    return Imprint.of(tokens)


def test_likeness() -> None:
    rng = random.Random(0)
    low, high = [[rng.randrange(a, a + 50) for _ in range(4000)] for a in (0, 25)]
    assert divergence(Counter(low), Counter(low)) == 0
    assert divergence(Counter([1, 2]), Counter([3, 4])) == 1
    assert imprint(low).unlike(low[3000:]) is None
    warning = imprint(low).unlike(high)
    assert warning is not None and "unlike" in warning
    assert imprint(low).unlike(high[:20]) is None  # too few to tell


def test_likeness_does_not_depend_on_the_texts_lengths() -> None:
    rng = random.Random(1)
    texts = [[int(rng.paretovariate(0.7)) % 3000 for _ in range(n)] for n in (40000, 300, 4000)]
    for text in texts[1:]:
        assert imprint(texts[0]).unlike(text) is None
        assert imprint(text).unlike(texts[0]) is None


def test_an_imprint_is_kept_without_the_begin_token() -> None:
    kept = imprint([1, 2, 2, 3] * 6, begin=9)
    assert kept == imprint([1, 2, 2, 3] * 6)
    assert Imprint.from_dict(json.loads(json.dumps(kept.as_dict()))) == kept
    assert kept.as_dict() == {"tokens": 24, "halves": ["1:3 2:6 3:3", "1:3 2:6 3:3"]}


@pytest.mark.parametrize(
    "wrong", ["x", [], {"halves": ["1:2"]}, {"halves": ["1:0", "1:1"]}, {"halves": ["1", "1:1"]}]
)
def test_a_damaged_imprint_is_named(wrong: object, tmp_path: Path) -> None:
    assert Imprint.read(tmp_path) is None
    (tmp_path / "skimp_shrink.json").write_text(json.dumps({"calibration_text": wrong}))
    with pytest.raises(ShrinkError, match=r"skimp_shrink\.json: calibration_text"):
        Imprint.read(tmp_path)


def test_likeness_of_the_packaged_texts(tokenizer: Tokenizer) -> None:
    from skimp.shrink.text import default_text

    ours = imprint(tokenizer.encode(default_text().read_text()))
    theirs = tokenizer.encode(default_text().with_name("evaluation.txt").read_text())
    code = tokenizer.encode(Path(__file__).read_text())
    assert ours.unlike(theirs) is None
    assert ours.unlike(code) is not None
