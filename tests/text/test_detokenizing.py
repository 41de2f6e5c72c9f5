"""Streams: no broken characters, the whole is what ``decode`` gives, constant time a token."""

from __future__ import annotations

import itertools
import lzma
import random
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

from skimp.text import Tokenizer
from skimp.text.detokenize import DecodePlan

TEXTS = [
    "The quick brown fox",
    " two  spaces ",
    "naïve café – 10 €",
    "日本語 한국어 русский",
    "😀👍🏽 family 👨‍👩‍👧",
    "tabs\t\nlines\r\n",
    "e\u0301 combining",
    "",
    " ",
]


def wrap(backend: Backend) -> Tokenizer:
    return Tokenizer(backend.to_str(), {})


def stream(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip_special=skip)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


def library(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True) -> str:
    return tokenizer._backend.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", ["byte-level", "byte-fallback", "byte-fallback-no-strip"])
def test_text_streams_to_itself(backends: dict[str, Backend], name: str) -> None:
    tokenizer = wrap(backends[name])
    for text in TEXTS:
        ids = tokenizer.encode(text)
        parts = stream(tokenizer, ids)
        assert "".join(parts) == library(tokenizer, ids) == tokenizer.decode(ids)
        assert "".join(parts) == (" " + text if "no-strip" in name and text else text)
        assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize("name", ["byte-level", "metaspace", "word-piece"])
def test_any_token_sequence_equals_the_library(backends: dict[str, Backend], name: str) -> None:
    tokenizer = wrap(backends[name])
    r = random.Random(0)
    for _ in range(3000):
        ids = [r.randrange(tokenizer.vocab_size) for _ in range(r.randrange(15))]
        for skip in (True, False):
            got = "".join(stream(tokenizer, ids, skip=skip))
            assert got == library(tokenizer, ids, skip=skip), ids


def test_random_bytes_through_byte_level(backends: dict[str, Backend]) -> None:
    """Arbitrary bytes, valid UTF-8 or not, as single-byte tokens: Python's own decoder agrees."""
    tokenizer = wrap(backends["byte-level"])
    from skimp.text.detokenize import byte_characters

    ids = {byte: tokenizer.token_id(char) for char, byte in byte_characters().items()}
    assert len(ids) == 256 and None not in ids.values()
    r = random.Random(1)
    for _ in range(2000):
        data = _random_bytes(r)
        got = stream(tokenizer, [ids[b] for b in data])  # type: ignore[misc]
        assert "".join(got) == data.decode("utf-8", "replace")


@pytest.mark.parametrize("name", ["byte-fallback", "byte-fallback-no-strip"])
def test_byte_fallback_runs(backends: dict[str, Backend], name: str) -> None:
    """Equal to the library where a run of bytes is whole or has no valid character in it."""
    tokenizer = wrap(backends[name])
    r = random.Random(2)
    compared = 0
    for _ in range(4000):
        ids: list[int] = []
        exact = True
        for _ in range(r.randrange(1, 5)):
            data = _random_bytes(r)
            ids += [3 + b for b in data]
            ids.append(r.randrange(259, tokenizer.vocab_size))
            text = data.decode("utf-8", "ignore")
            exact &= text == "" or text.encode() == data
        got = "".join(stream(tokenizer, ids))
        if exact:
            assert got == library(tokenizer, ids), ids
            compared += 1
        # every valid character of a broken run survives, every other byte is one U+FFFD
        tail = _strict(bytes(i - 3 for i in itertools.takewhile(lambda i: i < 259, ids)))
        start = got if name.endswith("no-strip") or not tail.startswith(" ") else " " + got
        assert start.startswith(tail), ids
    assert compared > 500


def _strict(data: bytes) -> str:
    """Valid characters, and U+FFFD for each byte that is in none."""
    text, at = "", 0
    while at < len(data):
        for size in range(1, 5):
            try:
                text += data[at : at + size].decode("utf-8")
            except UnicodeDecodeError:
                continue
            if at + size <= len(data):
                at += size
                break
        else:
            text += "\ufffd"
            at += 1
    return text


def _random_bytes(r: random.Random) -> bytes:
    kind = r.random()
    if kind < 0.4:
        return "".join(r.choice("aé€😀 \n") for _ in range(r.randrange(6))).encode()
    if kind < 0.6:
        return "".join(r.choice("é€😀") for _ in range(3)).encode()[: r.randrange(9)]
    odd = b"\x20A\x80\xbf\xc0\xc3\xe2\x82\xed\xa0\xf0\x9f\x98\x80\xf4\x90\xff"
    return bytes(r.choice(odd) for _ in range(r.randrange(8)))


def test_characters_come_out_whole_and_as_soon_as_possible(backends: dict[str, Backend]) -> None:
    tokenizer = wrap(backends["byte-fallback"])
    euro = [3 + b for b in "€€".encode()]
    assert stream(tokenizer, euro) == ["", "", "€", "", "", "€", ""]
    assert stream(tokenizer, euro[:2]) == ["", "", "\ufffd\ufffd"]


def test_text_that_continues_keeps_its_space(backends: dict[str, Backend]) -> None:
    for name in ("byte-fallback", "metaspace"):
        tokenizer = wrap(backends[name])
        prompt, whole = tokenizer.encode("the"), tokenizer.encode("the quick")
        detokenizer = tokenizer.detokenizer(continues=True)
        assert whole[: len(prompt)] == prompt
        tail = "".join(detokenizer.push(i) for i in whole[len(prompt) :])
        assert tail + detokenizer.flush() == " quick"


def test_ids_without_a_token_have_no_text(backends: dict[str, Backend]) -> None:
    for backend in backends.values():
        tokenizer = wrap(backend)
        assert tokenizer.decode([tokenizer.vocab_size + 5, 10**9]) == ""


def test_plans() -> None:
    assert DecodePlan.parse({"type": "ByteLevel"}) == DecodePlan(byte_level=True)
    assert DecodePlan.parse({"type": "Sequence", "decoders": [{"type": "ByteLevel"}]}) is not None
    assert DecodePlan.parse(None) is None
    assert DecodePlan.parse({"type": "CTC"}) is None
    regex = {"type": "Replace", "pattern": {"Regex": "x"}, "content": ""}
    assert DecodePlan.parse({"type": "Sequence", "decoders": [regex]}) is None


def test_time_does_not_grow_with_length(backends: dict[str, Backend]) -> None:
    for backend in backends.values():
        tokenizer = wrap(backend)
        r = random.Random(3)
        ids = [r.randrange(3, tokenizer.vocab_size) for _ in range(20_000)]
        detokenizer = tokenizer.detokenizer()
        times = []
        for part in range(10):
            start = time.perf_counter()
            for i in ids[2000 * part : 2000 * part + 2000]:
                detokenizer.push(i)
            times.append(time.perf_counter() - start)
        assert min(times[5:]) < 4 * min(times[:5])


@pytest.mark.parametrize(
    "folder", ["tokenizers/gpt-neox-20b", "tokenizers/torchtitan-test", "models/stories260K"]
)
def test_real_tokenizers(shared: Path, folder: str) -> None:
    tokenizer = Tokenizer.load(shared / folder)
    with lzma.open(shared / "text" / "african_storybook_multilingual.jsonl.xz", "rt") as file:
        text = file.read(40_000).encode().decode("unicode_escape", "ignore")
    text = text.encode("utf-8", "ignore").decode()
    for sample in (*TEXTS, text):
        ids = tokenizer.encode(sample)
        assert "".join(stream(tokenizer, ids)) == library(tokenizer, ids)
    r = random.Random(4)
    if "stories" not in folder:  # mixed byte runs differ there on purpose
        for _ in range(1000):
            ids = [r.randrange(tokenizer.vocab_size) for _ in range(20)]
            assert "".join(stream(tokenizer, ids)) == library(tokenizer, ids)
