"""Text for healing: documents, a piece of them held out, and endless rounds of the rest.

Documents are cut into pieces of at most ``length`` tokens. A step takes as many tokens as it wants
from the pieces in a seeded order; several pieces stand side by side in one forward, and each
attends to itself alone, so no row is padding and every row counts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from skimp.errors import ShrinkError
from skimp.kernels.ops import StepBounds, StepInputs
from skimp.shrink.text import chat_documents, default_text, read_text
from skimp.text import Tokenizer
from skimp.text.documents import split_documents

JSON_LINES: Final = ".jsonl"


# ---- documents --------------------------------------------------------------------------------


def documents(tokenizer: Tokenizer, text: Path | None, chat: Path | None) -> list[np.ndarray]:
    """Token ids int32 of every document, each after the begin token if the tokenizer has one.

    ``text`` is plain text, with lines ``<|endoftext|>`` between documents, or JSON lines with
    "text"; ``chat`` has a JSON object with ``messages`` a line. By default the text that comes with
    skimp. Raises ShrinkError naming file and line.
    """
    if chat is not None:
        talks = chat_documents(chat, tokenizer, "chat")
        return [np.asarray(ids, dtype=np.int32) for ids in talks if ids]
    path = default_text() if text is None else text
    whole = read_text(path, "text")
    parts = _json_texts(path, whole) if path.suffix == JSON_LINES else split_documents(whole)
    begin = begin_ids(tokenizer)
    found = tokenizer.encode_many([part for part in parts if part])
    return [np.asarray(begin + ids, dtype=np.int32) for ids in found if ids]


def begin_ids(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before a text."""
    framed, plain = tokenizer.encode("a"), tokenizer.encode("a", add_special=False)
    return framed[: framed.index(plain[0])] if framed[:1] != plain[:1] else []


def _json_texts(path: Path, whole: str) -> list[str]:
    texts: list[str] = []
    for number, line in enumerate(whole.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ShrinkError(f"text: {path}: line {number}: not JSON: {error}") from None
        own = value.get("text") if isinstance(value, dict) else None
        if not isinstance(own, str):
            raise ShrinkError(f"text: {path}: line {number}: text: missing, or no text")
        texts.append(own)
    return texts


def check_ids(docs: Sequence[np.ndarray], vocab_size: int) -> None:
    """ShrinkError if a token is beyond the model's vocabulary."""
    top = max((int(doc.max()) for doc in docs), default=0)
    if top >= vocab_size:
        raise ShrinkError(f"text: token {top} is beyond the model's {vocab_size}")


def split_off(
    docs: Sequence[np.ndarray], tokens: int, seed: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(held out, the rest): whole documents in a seeded order until ``tokens`` are there; the one
    that goes beyond is cut in two. Raises ShrinkError if less than as much again is left."""
    total = sum(map(len, docs))
    if total < 2 * tokens:
        raise ShrinkError(
            f"held_out: {tokens:,} tokens are to be held out of a text of {total:,}; give more "
            "text, or hold out less"
        )
    held: list[np.ndarray] = []
    rest: list[np.ndarray] = []
    missing = tokens
    for index in np.random.default_rng(seed).permutation(len(docs)):
        doc = docs[index]
        if missing:
            held.append(doc[:missing])
            doc, missing = doc[missing:], missing - len(held[-1])
        if len(doc):
            rest.append(doc)
    return held, rest


# ---- pieces -----------------------------------------------------------------------------------


def cut(docs: Sequence[np.ndarray], length: int) -> list[np.ndarray]:
    """Pieces of at most ``length`` tokens, near equal in each document so that none is a stump."""
    pieces: list[np.ndarray] = []
    for doc in docs:
        count = -(-len(doc) // length)
        pieces += np.array_split(doc, count)
    return pieces


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """How far a stream has been read: rounds over all pieces, pieces of this round, tokens of the
    next piece."""

    round: int = 0
    piece: int = 0
    token: int = 0


class Stream:
    """Pieces in a seeded order, another one each round, without an end."""

    def __init__(self, pieces: Sequence[np.ndarray], seed: int) -> None:
        assert pieces
        self._pieces, self._seed = pieces, seed
        self._round, self._order = -1, np.empty(0, dtype=np.int64)

    def take(self, tokens: int, cursor: Cursor) -> tuple[list[np.ndarray], Cursor]:
        """The next ``tokens`` tokens as sequences, and the cursor behind them."""
        found: list[np.ndarray] = []
        at, piece, token = cursor.round, cursor.piece, cursor.token
        while tokens:
            own = self._pieces[self._shuffled(at)[piece]][token : token + tokens]
            found.append(own)
            tokens, token = tokens - len(own), token + len(own)
            if token == len(self._pieces[self._order[piece]]):
                piece, token = piece + 1, 0
            if piece == len(self._pieces):
                at, piece = at + 1, 0
        return found, Cursor(round=at, piece=piece, token=token)

    def _shuffled(self, number: int) -> np.ndarray:
        if number != self._round:
            random = np.random.default_rng((self._seed, number))
            self._round, self._order = number, random.permutation(len(self._pieces))
        return self._order


def packed(sequences: Sequence[np.ndarray], rows: int) -> list[list[np.ndarray]]:
    """Sequences in groups of at most ``rows`` tokens, in order; a longer one is alone."""
    groups: list[list[np.ndarray]] = []
    size = rows
    for own in sequences:
        if not groups or size + len(own) > rows:
            groups.append([])
            size = 0
        groups[-1].append(own)
        size += len(own)
    return groups


def step_inputs(sequences: Sequence[np.ndarray], device: torch.device) -> StepInputs:
    """One forward over sequences side by side: positions begin anew with each, and each sees
    itself alone."""
    starts = [0, *accumulate(map(len, sequences))]
    row_seq = np.repeat(np.arange(len(sequences)), [len(own) for own in sequences])
    positions = np.concatenate([np.arange(len(own)) for own in sequences])

    def tensor(values: Any) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int32)).to(device)

    longest = max(map(len, sequences))
    return StepInputs(
        token_ids=tensor(np.concatenate(sequences)),
        positions=tensor(positions),
        row_seq=tensor(row_seq),
        kv_end=tensor(positions + 1),
        seq_starts=tensor(starts),
        logit_rows=tensor(np.arange(starts[-1])),
        bounds=StepBounds(rows=longest, context=longest, whole=tuple(starts)),
    )
