"""Stop strings and tokens: the outcome never depends on where the tokens are cut."""

from __future__ import annotations

import itertools
import random
import time
from typing import Any

import pytest

from skimp.decoding import ParamsError, SamplingParams, StopChecker, StopStrings


class Pieces:
    """A detokenizer whose token i is the i-th piece."""

    def __init__(self, pieces: list[str], rest: str = "") -> None:
        self.pieces, self.rest = pieces, rest

    def push(self, token_id: int) -> str:
        return self.pieces[token_id]

    def flush(self) -> str:
        return self.rest


def splits(text: str) -> list[list[str]]:
    """All ways to cut a short text into pieces."""
    found = []
    for cuts in itertools.product((False, True), repeat=len(text) - 1):
        pieces, last = [], 0
        for i, cut in enumerate(cuts, start=1):
            if cut:
                pieces.append(text[last:i])
                last = i
        found.append([*pieces, text[last:]])
    return found


def run(pieces: list[str], **kwargs: Any) -> tuple[list[str], str | None, str | int | None]:
    checker = StopChecker(SamplingParams(**kwargs), eos_ids=[], stream=Pieces(pieces))
    shown = []
    for i in range(len(pieces)):
        text, reason = checker.push(i)
        shown.append(text)
        if reason is not None:
            shown.append(checker.finish(reason))
            return shown, reason, checker.stop_reason
    shown.append(checker.finish("abort"))
    return shown, None, None


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """By definition: the stop completed first, the longest of those completed together."""
    for end in range(1, len(text) + 1):
        done = [s for s in stops if text[:end].endswith(s)]
        if done:
            stop = max(done, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("hello STOP x", ["STOP"]),
        ("aaab aab", ["aab"]),
        ("abababac", ["ababac"]),
        ("xabcy", ["abcd", "bc"]),
        ("xabcy", ["abc", "bc"]),
        ("xxyxxz", ["xxz", "zz"]),
        ("no stop STO", ["STOP"]),
        ("é😀\nß", ["\nß", "😀x"]),
        ("STOP", ["STOP"]),
    ],
)
def test_every_split_gives_the_same(text: str, stops: list[str], include: bool) -> None:
    want, stop = expected(text, stops, include)
    for pieces in splits(text):
        shown, reason, why = run(pieces, stop=stops, include_stop=include)
        assert "".join(shown) == want, pieces
        assert (reason, why) == (("stop", stop) if stop else (None, None))


def test_random_texts_over_a_small_alphabet() -> None:
    r = random.Random(0)
    for _ in range(3000):
        text = "".join(r.choice("ab") for _ in range(r.randrange(1, 30)))
        stops = ["".join(r.choice("ab") for _ in range(r.randrange(3, 9))) for _ in range(3)]
        pieces, at = [], 0
        while at < len(text):
            step = r.randrange(1, 6)
            pieces.append(text[at : at + step])
            at += step
        want, stop = expected(text, stops, False)
        shown, _, why = run(pieces, stop=stops)
        assert ("".join(shown), why) == (want, stop), (text, stops, pieces)


def test_nothing_of_a_stop_string_is_shown_and_no_more_is_held_than_needed() -> None:
    strings = StopStrings(["<end>"])
    assert strings.push("a<e") == ("a", None)
    assert strings.push("nd") == ("", None)
    assert strings.push("x<") == ("<endx", None)
    assert strings.push("end>tail") == ("", "<end>")


def test_hostile_stop_strings_are_fast() -> None:
    stops = ["a" * n + "b" for n in range(960, 1024)]
    strings = StopStrings(stops)
    start = time.perf_counter()
    for _ in range(500):
        strings.push("a" * 4)
    assert time.perf_counter() - start < 2.0


def test_end_and_stop_tokens() -> None:
    pieces = ["a", "b", "</s>", "c"]

    def outcome(**kwargs: Any) -> tuple[str, str | None, str | int | None]:
        checker = StopChecker(SamplingParams(**kwargs), eos_ids=[2], stream=Pieces(pieces))
        text = ""
        for i in range(4):
            more, reason = checker.push(i)
            text += more
            if reason is not None:
                return text + checker.finish(reason), reason, checker.stop_reason
        return text + checker.finish("abort"), None, None

    assert outcome() == ("ab", "stop", 2)
    assert outcome(include_stop=True) == ("ab</s>", "stop", 2)
    assert outcome(ignore_eos=True) == ("ab</s>c", None, None)
    assert outcome(stop_token_ids=[1]) == ("a", "stop", 1)
    assert outcome(stop_token_ids=[2], ignore_eos=True) == ("ab", "stop", 2)
    assert outcome(max_tokens=2) == ("ab", "length", None)
    assert outcome(min_tokens=3) == ("ab</s>c", None, None)
    assert outcome(stop=["ab"], min_tokens=2) == ("ab", "stop", 2)  # completed too early to count
    assert outcome(stop=["b"], max_tokens=2) == ("a", "stop", "b")  # stop before length
    assert outcome(stop=["bX"]) == ("ab", "stop", 2)  # held text is not lost


def test_a_stop_string_may_begin_before_min_tokens() -> None:
    shown, reason, _ = run(["a", "b", "c"], stop=["abc"], min_tokens=2)
    assert ("".join(shown), reason) == ("", "stop")


def test_the_rest_of_the_stream_comes_out_at_the_end() -> None:
    checker = StopChecker(SamplingParams(stop=["xy"]), stream=Pieces(["ax"], rest="\ufffd"))
    assert checker.push(0) == ("a", None)
    assert checker.finish("length") == "x\ufffd"
    assert checker.finish("length") == ""
    checker = StopChecker(SamplingParams(stop=["xy"]), stream=Pieces(["ax"], rest="\ufffd"))
    checker.push(0)
    assert checker.finish("error") == "x"


def test_without_a_tokenizer() -> None:
    checker = StopChecker(SamplingParams(max_tokens=2), eos_ids=[7], stream=None)
    assert checker.push(1) == ("", None)
    assert checker.push(3) == ("", "length")
    with pytest.raises(ParamsError, match="stop needs a tokenizer"):
        StopChecker(SamplingParams(stop=["x"]), stream=None)
