"""Bits per byte: windows, documents, the interval. The model is a stub that is easy to sum."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from skimp.meter.quality import (
    Block,
    block_tokens,
    bootstrap,
    evaluate,
    score_windows,
)
from skimp.text.documents import split_documents


class ByteTokenizer:
    """A token a byte, shifted by one to make room for the begin token 0."""

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        return [0] * add_special + [b + 1 for b in text.encode()]

    def decode(self, ids: list[int]) -> str:
        return bytes(i - 1 for i in ids).decode(errors="replace")


class StubEngine:
    """Gives the token at offset i of a window -(i + 1) / 100 nats, and remembers the windows."""

    def __init__(self, max_context: int = 17, bos: int | None = 0, eos=()) -> None:
        self.spec = SimpleNamespace(bos_token_id=bos, eos_token_ids=eos, max_positions=64)
        self.tokenizer = ByteTokenizer()
        self.max_context = max_context
        self.windows: list[list[int]] = []

    def score(self, ids: list[int]) -> np.ndarray:
        assert len(ids) < self.max_context
        self.windows.append(list(ids))
        return -np.arange(1, len(ids)) / 100


def test_documents_are_parted_by_separator_lines() -> None:
    text = "one\ntwo\n<|endoftext|>\nthree <|endoftext|> inline\n<|endoftext|>\n\n<|endoftext|>"
    assert split_documents(text) == ["one\ntwo", "three <|endoftext|> inline"]
    assert split_documents("no separator\n") == ["no separator"]
    assert split_documents("a\r\n<|endoftext|>\r\nb") == ["a\r", "b"]


def test_every_token_is_scored_once_with_half_a_context_behind_it() -> None:
    engine = StubEngine()
    ids = list(range(1, 60))
    found = score_windows(engine.score, 0, ids, context=16)
    assert found.shape == (59,)
    assert engine.windows[0] == [0, *range(1, 16)]
    for before, after in zip(engine.windows, engine.windows[1:]):
        assert after[:8] == before[-8:]
        assert len(after) <= 16
    assert engine.windows[-1][-1] == 59
    assert (found < 0).all()
    np.testing.assert_allclose(found[:15], -np.arange(1, 16) / 100)
    np.testing.assert_allclose(found[15:23], -np.arange(8, 16) / 100)


@pytest.mark.parametrize("length", [1, 14, 15, 16, 17, 23, 24, 31, 100])
@pytest.mark.parametrize("context", [2, 3, 16])
def test_windows_cover_any_length(length: int, context: int) -> None:
    seen: list[int] = []

    def score(ids: list[int]) -> np.ndarray:
        assert 2 <= len(ids) <= context
        seen.extend(ids[-1:])
        return -np.array(ids[1:], dtype=float)

    ids = list(range(1, length + 1))
    np.testing.assert_array_equal(score_windows(score, 0, ids, context), -np.array(ids))


def test_bits_per_byte_by_hand() -> None:
    engine = StubEngine(max_context=100)
    result = evaluate(engine, "abc\n<|endoftext|>\né!\n")
    # The begin token conditions both documents: offsets 0, 1, 2 of each window of three bytes.
    nats = 2 * (1 + 2 + 3) / 100
    assert engine.windows == [[0, 98, 99, 100], [0, 0xC3 + 1, 0xA9 + 1, 34]]
    assert result.bytes == 6
    assert result.tokens == 6
    assert result.documents == 2
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / 6)
    assert result.ci95[0] <= result.bits_per_byte <= result.ci95[1]
    assert result.perplexity == pytest.approx(math.exp(nats / 6))
    assert set(result.as_dict()) >= {"bits_per_byte", "ci95", "tokens", "bytes", "perplexity"}


def test_end_token_conditions_when_there_is_no_begin_token() -> None:
    engine = StubEngine(max_context=100, bos=None, eos=(7, 9))
    evaluate(engine, "ab")
    assert engine.windows == [[7, 98, 99]]


def test_max_bytes_stops_after_the_document_that_reaches_it() -> None:
    text = "\n<|endoftext|>\n".join(["a" * 10] * 5)
    assert evaluate(StubEngine(), text, max_bytes=11).documents == 2


@pytest.mark.parametrize(
    ("change", "text", "options", "field"),
    [
        ({}, "", {}, "text"),
        ({}, "<|endoftext|>\n \n", {}, "text"),
        ({}, "a", {"context": 1}, "context"),
        ({}, "a", {"context": 17}, "context"),
        ({}, "a", {"max_bytes": 0}, "max_bytes"),
        ({"tokenizer": None}, "a", {}, "tokenizer"),
        ({"spec": SimpleNamespace(bos_token_id=None, eos_token_ids=())}, "a", {}, "bos_token_id"),
        ({"score": lambda ids: np.full(len(ids) - 1, -np.inf)}, "a", {}, "finite"),
    ],
)
def test_refusals_name_the_cause(change, text, options, field) -> None:
    engine = StubEngine()
    for name, value in change.items():
        setattr(engine, name, value)
    with pytest.raises(ValueError, match=field):
        evaluate(engine, text, **options)


def test_blocks_are_sized_for_about_a_hundred_of_them() -> None:
    assert block_tokens(10) == 16
    assert block_tokens(10_000) == 100
    assert block_tokens(10_000_000) == 512


def test_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for seed in range(60):
        blocks = [Block(amount=float(b), size=100.0) for b in rng.normal(150, 30, 80)]
        low, high = bootstrap(blocks, seed=seed)
        inside += low <= 1.5 <= high
    assert 51 <= inside <= 60


def test_interval_is_wide_for_passages_and_repeatable() -> None:
    blocks = [Block(amount=100.0, size=100.0), Block(amount=300.0, size=100.0)] * 10
    low, high = bootstrap(blocks)
    assert low < 1.7 < 2.3 < high
    assert bootstrap(blocks) == (low, high)
