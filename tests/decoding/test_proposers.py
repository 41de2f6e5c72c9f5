"""Lookup and suffix guesses against a search by hand, and what a salt keeps apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skimp.decoding.lookup import LONGEST, SHORTEST, Lookup
from skimp.decoding.params import SamplingParams
from skimp.decoding.proposal import Ask, Draft
from skimp.decoding.rows import RowState
from skimp.decoding.suffix import KEPT, KEPT_OF_ALL, PLACES, Suffix, SuffixIndex

ROW = RowState(SamplingParams(), vocab_size=1000)
texts = st.lists(st.integers(0, 3), min_size=0, max_size=60)


def ask(
    tokens: Sequence[int], key: object = 0, most: int = 8, prompt: int = 0, salt: str | None = None
) -> Ask:
    return Ask(key=key, tokens=tokens, num_prompt=prompt, most=most, row=ROW, salt=salt)


def looked_up(tokens: list[int], most: int) -> tuple[int, ...]:
    """Longest end of the text that occurs before, its last occurrence, and what followed."""
    for size in range(LONGEST, SHORTEST - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if len(tokens) >= size and tokens[end - size : end] == tokens[len(tokens) - size :]:
                whole = list(tokens)
                while len(whole) < len(tokens) + most:
                    whole.append(whole[len(whole) - (len(tokens) - end)])
                return tuple(whole[len(tokens) :])
    return ()


@settings(max_examples=200, deadline=None)
@given(texts, st.integers(1, 6))
def test_lookup_finds_the_longest_and_latest(tokens: list[int], most: int) -> None:
    whole, growing, text = Lookup(), Lookup(), []
    for token in tokens:
        text.append(token)
        assert growing.propose([ask(text, most=most)]) == [Draft(looked_up(text, most))]
    if tokens:
        assert whole.propose([ask(tokens, most=most)]) == [Draft(looked_up(tokens, most))]


def test_lookup_goes_round_a_loop() -> None:
    assert Lookup().propose([ask([7, 1, 2, 3, 1, 2, 3])])[0].tokens == (1, 2, 3, 1, 2, 3, 1, 2)


def voted(tokens: list[int], text: list[int], most: int) -> tuple[int, ...]:
    """The first guess of a suffix index over ``tokens``, by trying every place."""
    agreed: dict[int, int] = {}
    pairs = [
        place
        for place in range(2, len(tokens) + 1)
        if len(text) > 1 and tokens[place - 2 : place] == text[-2:]
    ][-PLACES:]
    for place in pairs:
        if place < len(tokens):
            length = 2
            while length < min(place, len(text), 32) and (
                tokens[place - length - 1] == text[-length - 1]
            ):
                length += 1
            agreed[place] = length
    best = max(agreed.values(), default=0)
    votes = Counter(tokens[place] for place in reversed(agreed) if agreed[place] == best)
    if not votes or votes.most_common(1)[0][1] / votes.total() < 0.15:
        return ()
    return (votes.most_common(1)[0][0],)


@settings(max_examples=300, deadline=None)
@given(texts)
def test_suffix_votes_of_the_longest_agreement(tokens: list[int]) -> None:
    index = SuffixIndex()
    index.extend(tokens)
    assert index.guess(tokens, 1)[0] == voted(tokens, tokens, 1)
    long, expected = index.guess(tokens, 5)
    assert long[:1] == index.guess(tokens, 1)[0]
    assert len(long) <= 5 and 0 <= expected <= len(long)


def test_suffix_guesses_no_further_than_it_agrees() -> None:
    index = SuffixIndex()
    index.extend([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert index.guess([0, 0, 1, 2], 8) == ((3, 4, 5, 6), 4.0)
    assert index.guess([0, 1, 2, 3], 8)[0] == (4, 5, 6, 7, 8, 9)
    assert index.guess([2], 8) == ((), 0.0)
    assert index.guess([8, 9], 8) == ((), 0.0)


def test_suffix_learns_answers_and_keeps_salts_apart() -> None:
    answer, prompt = [11, 12, 13, 14, 15], [1, 2]
    suffix = Suffix()
    suffix.propose([ask([*prompt, *answer], key="first", prompt=2, salt="a")])
    suffix.end("first")
    suffix.end("first")
    asking = [9, 8, 11, 12]
    assert suffix.propose([ask(asking, key="x", salt="a")])[0].tokens == (13, 14, 15)
    assert suffix.propose([ask(asking, key="y", salt="b")]) == [Draft()]
    assert suffix.propose([ask(asking, key="z")]) == [Draft()]
    # Prompts are their owner's, and no guess crosses from one answer to the next.
    assert suffix.propose([ask([5, 1, 2], key="p", salt="a")]) == [Draft()]
    suffix.propose([ask([77, 78], key="second", salt="a")])
    suffix.end("second")
    assert suffix.propose([ask([9, 14, 15], key="q", salt="a")]) == [Draft()]


def test_suffix_forgets_the_oldest_answers() -> None:
    suffix = Suffix()
    for number in range(4):
        tokens = list(range(number * KEPT // 2, (number + 1) * KEPT // 2))
        suffix.propose([ask(tokens, key=number)])
        suffix.end(number)
    assert suffix.propose([ask([0, 1], key="old")]) == [Draft()]
    last = 4 * KEPT // 2 - 10
    assert suffix.propose([ask([last, last + 1], key="new")])[0].tokens[0] == last + 2


def test_suffix_forgets_the_salts_that_nobody_asks_for() -> None:
    suffix, size = Suffix(), KEPT // 2
    for number in range(2 * KEPT_OF_ALL // size):
        tokens = list(range(number * size, (number + 1) * size))
        suffix.propose([ask(tokens, key=number, salt=f"tenant {number}")])
        suffix.end(number)
    assert suffix.propose([ask([0, 1], key="x", salt="tenant 0")]) == [Draft()]
    last = 2 * KEPT_OF_ALL // size - 1
    asked = ask([last * size, last * size + 1], key="y", salt=f"tenant {last}")
    assert suffix.propose([asked])[0].tokens[0] == last * size + 2


@pytest.mark.parametrize("proposer", [Lookup(), Suffix()], ids=["lookup", "suffix"])
def test_sequences_do_not_mix(proposer: Lookup | Suffix) -> None:
    a, b = [1, 2, 3, 1, 2], [4, 5, 6, 4, 5]
    first, second = proposer.propose([ask(a, key="a"), ask(b, key="b")])
    assert first.tokens[0] == 3 and second.tokens[0] == 6
    proposer.end("a")
    assert proposer.propose([ask([4, 5], key="a", salt="other")]) == [Draft()]
