"""Documents, pieces, and the order they are read in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_checkpoint import write_model

from skimp.errors import ShrinkError
from skimp.shrink.heal.data import (
    Cursor,
    Stream,
    cut,
    documents,
    packed,
    split_off,
    step_inputs,
)
from skimp.text import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_model(tmp_path_factory.mktemp("data") / "model"))


def _numbered(*lengths: int) -> list[np.ndarray]:
    """Documents whose tokens say where they stand: no two are the same."""
    edges = np.cumsum(lengths)[:-1]
    return np.split(np.arange(sum(lengths), dtype=np.int32), edges)


def test_documents(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one\ntwo\n<|endoftext|>\n\n<|endoftext|>\nthree\n")
    begin = 256
    one, two = (
        [begin, *tokenizer.encode_plain("one\ntwo")],
        [begin, *tokenizer.encode_plain("three")],
    )
    assert [doc.tolist() for doc in documents(tokenizer, tmp_path / "t.txt", None)] == [one, two]
    lines = [json.dumps({"text": text, "id": 3}) for text in ("one\ntwo", "", "three")]
    (tmp_path / "t.jsonl").write_text("\n\n".join(lines))
    assert [doc.tolist() for doc in documents(tokenizer, tmp_path / "t.jsonl", None)] == [one, two]
    assert len(documents(tokenizer, None, None)) > 10  # the text that comes with skimp


def test_chats(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    (tmp_path / "c.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 2)
    one, two = documents(tokenizer, None, tmp_path / "c.jsonl")
    assert one.tolist() == two.tolist() and "assistant" in tokenizer.decode(one.tolist())
    (tmp_path / "c.jsonl").write_text('{"message": []}')
    with pytest.raises(ShrinkError, match=r"chat: .*line 1: messages: missing"):
        documents(tokenizer, None, tmp_path / "c.jsonl")


def test_what_is_held_out_is_in_no_other_place() -> None:
    docs = _numbered(30, 50, 20, 7, 1, 92)
    for seed in range(5):
        held, rest = split_off(docs, 64, seed)
        assert sum(map(len, held)) == 64
        tokens = np.concatenate([*held, *rest])
        assert sorted(tokens.tolist()) == list(range(200))
    with pytest.raises(ShrinkError, match=r"held_out: 101 tokens .* a text of 200"):
        split_off(docs, 101, 0)
    held, rest = split_off(_numbered(200), 64, 0)  # a single document
    assert [len(doc) for doc in (*held, *rest)] == [64, 136]


def test_pieces_are_near_equal() -> None:
    pieces = cut(_numbered(10, 1, 25), 10)
    assert [len(piece) for piece in pieces] == [10, 1, 9, 8, 8]
    assert np.concatenate(pieces).tolist() == list(range(36))


@pytest.mark.parametrize("take", [1, 7, 36, 100])
def test_a_round_has_every_token_once(take: int) -> None:
    stream = Stream(cut(_numbered(10, 1, 25), 10), seed=3)
    cursor, tokens = Cursor(), []
    while len(tokens) < 3 * 36:
        sequences, cursor = stream.take(take, cursor)
        assert sum(map(len, sequences)) == take
        for own in sequences:  # each a run of neighbours, of one piece
            assert len(own) <= 10 and (np.diff(own) == 1).all()
        tokens += np.concatenate(sequences).tolist()
    rounds = [tokens[i : i + 36] for i in (0, 36, 72)]
    assert all(sorted(own) == list(range(36)) for own in rounds)
    assert rounds[0] != rounds[1] and rounds[1] != rounds[2]


def test_a_stream_goes_on_from_a_cursor() -> None:
    pieces = cut(_numbered(10, 1, 25), 10)
    whole, cursor = Stream(pieces, seed=3), Cursor()
    for _ in range(9):
        before = cursor
        expected, cursor = whole.take(13, cursor)
        found, after = Stream(pieces, seed=3).take(13, before)
        assert after == cursor
        assert [own.tolist() for own in found] == [own.tolist() for own in expected]


def test_groups_for_a_forward() -> None:
    groups = packed(_numbered(3, 4, 5, 9, 1), 8)
    assert [[len(own) for own in group] for group in groups] == [[3, 4], [5], [9], [1]]


def test_step_inputs() -> None:
    found = step_inputs(_numbered(3, 1, 2), torch.device("cpu"))
    assert found.token_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert found.kv_end.tolist() == [1, 2, 3, 1, 1, 2]
    assert found.row_seq.tolist() == [0, 0, 0, 1, 2, 2]
    assert found.seq_starts.tolist() == [0, 3, 4, 6]
    assert found.logit_rows.tolist() == [0, 1, 2, 3, 4, 5]
