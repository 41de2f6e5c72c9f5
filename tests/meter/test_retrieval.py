"""Prompts that hide pairs are as long, as deep and as repeatable as they say; scores are right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from meter_models import Bytes, noisy_decoder, plain_logits, tiny_engine

from skimp.meter.retrieval import (
    CANDIDATES,
    DEPTHS,
    TAIL,
    Retrieval,
    hidden,
    run_retrieval,
    text_probes,
    token_probes,
)

FILLER = list(range(1000, 1500))


def words(text: str) -> list[int]:
    return Bytes().encode(text)


def test_what_is_hidden_is_where_it_should_be() -> None:
    body = hidden(FILLER, [[1, 2], [3]], [1.0, 0.25], [9, 9], 45, start=490)
    assert len(body) == 45 and body[-2:] == [9, 9]
    assert body[:10] == FILLER[490:] and body[10] == 3 and body[41:43] == [1, 2]
    assert body[11:41] == FILLER[:30]
    tailed = hidden(FILLER, [[1, 2]], [1.0], [9], 33, start=0, tail=20)
    assert tailed[10:12] == [1, 2] and tailed[12:32] == FILLER[10:30]
    with pytest.raises(ValueError, match="retrieval: 5 tokens"):
        hidden(FILLER, [[1, 2], [3]], [0.5, 0.5], [9, 9], 5, start=0)


@pytest.mark.parametrize("keys", [1, 4])
def test_probes_in_words(keys: int) -> None:
    make = {"context": 300, "keys": keys, "items": 24, "begin": 7}
    probes = text_probes(words, FILLER, **make, seed=3)
    assert probes == text_probes(words, FILLER, **make, seed=3)
    assert probes != text_probes(words, FILLER, **make, seed=4)
    for probe in probes:
        assert len(probe.prompt) == 300 and probe.prompt[0] == 7
        assert len(set(probe.candidates)) == CANDIDATES and probe.label < keys
        text = Bytes().decode([t for t in probe.prompt if t <= 256])
        options = [Bytes().decode(list(c)) for c in probe.candidates]
        question = text.rpartition(".")[2]
        assert text.count(f"{question}{options[probe.label]}") == 2
        near = Bytes().decode([t for t in probe.near[1:] if t <= 256])
        assert near == question and len(probe.near) == 1 + TAIL + len(words(question))
        assert [text.count(option) for option in options] == [2] * keys + [0] * (8 - keys)
    parts = np.bincount([int(p.depth * DEPTHS) for p in probes])
    assert parts.tolist() == [6] * DEPTHS


def test_probes_of_tokens() -> None:
    rng = np.random.default_rng(0)
    rows = (rng.zipf(1.3, (6, 80)) % 300).tolist()
    probes = token_probes(rows, count=9, most_depth=0.5, seed=1)
    assert probes == token_probes(rows, count=9, most_depth=0.5, seed=1)
    for i, probe in enumerate(probes):
        assert len(probe.prompt) == 80 and probe.prompt[0] == rows[i % 6][0]
        pair = [*probe.prompt[-2:], probe.candidates[probe.label][0]]
        at = [j for j in range(78) if list(probe.prompt[j : j + 3]) == pair]
        assert len(at) >= 3 and at[0] <= 0.5 * 80 + 1
    with pytest.raises(ValueError, match="too few different tokens"):
        token_probes([[1, 2] * 40], count=1, most_depth=0.5, seed=0)


def test_scores_are_those_of_single_forwards() -> None:
    engine = tiny_engine()
    asked = Retrieval(contexts=(160,), items=6, keys=(1, 2))
    results = run_retrieval(engine, asked, seed=5)
    assert [r.name for r in results] == ["needle at 160", "2 keys at 160"]
    assert results == run_retrieval(engine, asked, seed=5)
    from skimp.meter.retrieval import _filler
    from skimp.text.documents import SEPARATOR

    filler = words(SEPARATOR.sub("", _filler()))
    probes = text_probes(words, filler, context=160, keys=2, items=6, begin=0, seed=5)
    right, likeliest, own = [], [], []
    for probe in probes:
        sums = np.array([logprob(probe.prompt, value) for value in probe.candidates])
        gains = sums - [logprob(probe.near, value) for value in probe.candidates]
        right.append(float(gains.argmax() == probe.label))
        likeliest.append(float(sums.argmax() == probe.label))
        own.append(gains[probe.label])
    assert results[1].outcomes["accuracy"] == tuple(right)
    assert results[1].outcomes["likeliest"] == tuple(likeliest)
    np.testing.assert_allclose(results[1].outcomes["gain"], own, atol=1e-2)
    assert results[1].scores["accuracy"].chance == 1 / CANDIDATES
    assert sum(part.n for part in results[1].groups["depth"].values()) == 6
    assert results[1].as_dict()["context"] == 160


def logprob(prompt: tuple[int, ...], value: tuple[int, ...]) -> float:
    rows = plain_logits(noisy_decoder(), [*prompt, *value]).log_softmax(-1)
    picked = rows[len(prompt) - 1 : -1].gather(1, torch.tensor(value)[:, None])
    return float(picked.sum())


def test_refusals() -> None:
    for bad, name in (
        ({"contexts": ()}, "retrieval"),
        ({"contexts": (20,)}, "retrieval"),
        ({"contexts": (200,), "items": 0}, "retrieval_items"),
        ({"contexts": (200,), "keys": (9,)}, "keys"),
    ):
        with pytest.raises(ValueError, match=name):
            Retrieval(**bad)
    with pytest.raises(ValueError, match="retrieval: 255 tokens and an answer do not fit"):
        run_retrieval(tiny_engine(), Retrieval(contexts=(255,), items=1))
