"""Bits per byte of a text: accuracy that does not depend on the tokenizer.

The text's documents (parted by lines ``<|endoftext|>``) are scored one by one. The first token is
conditioned on the model's begin-of-text token, or else its first end token. A document longer than
the context is scored in windows that overlap by half, so that every token but those of the first
window has at least half a context behind it.

The interval is a percentile bootstrap over blocks of text: tokens of one passage are easy or hard
together, so single tokens would give an interval that is too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from skimp.text.documents import split_documents

if TYPE_CHECKING:
    import numpy as np

    from skimp.engine import Engine

RESAMPLES = 4000
MAX_BLOCK_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class QualityResult:
    """Bits per UTF-8 byte with its 95 % interval."""

    bits_per_byte: float
    ci95: tuple[float, float]
    tokens: int
    bytes: int
    documents: int
    blocks: int
    bits_per_token: float
    context: int

    @property
    def perplexity(self) -> float:
        """Per token: it compares models of one tokenizer only."""
        return 2.0**self.bits_per_token

    def as_dict(self) -> dict[str, Any]:
        return {
            "bits_per_byte": self.bits_per_byte,
            "ci95": list(self.ci95),
            "tokens": self.tokens,
            "bytes": self.bytes,
            "documents": self.documents,
            "blocks": self.blocks,
            "bits_per_token": self.bits_per_token,
            "perplexity": self.perplexity,
            "context": self.context,
        }


@dataclass(frozen=True, kw_only=True)
class Block:
    """A passage: what was summed over it (bits, say) and its size (in bytes, say)."""

    amount: float
    size: float


@dataclass(frozen=True, kw_only=True)
class Document:
    """A document's tokens, and its passages as (first token, past the last, bytes)."""

    ids: list[int]
    passages: list[tuple[int, int, float]]

    def blocks(self, values: np.ndarray, *, per: str) -> list[Block]:
        """Values [len(ids)] summed by passage, sized in ``per``: "bytes" or "tokens"."""
        return [
            Block(amount=float(values[a:b].sum()), size=n if per == "bytes" else b - a)
            for a, b, n in self.passages
        ]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A text as one model will read it: ``prefix`` is the token that documents begin with."""

    documents: list[Document]
    prefix: int
    context: int
    bytes: int

    @property
    def tokens(self) -> int:
        return sum(len(doc.ids) for doc in self.documents)

    def result(self, bits: list[np.ndarray], *, seed: int) -> QualityResult:
        """From the bits of every token, an array [len(ids)] a document."""
        blocks = [
            block
            for doc, values in zip(self.documents, bits, strict=True)
            for block in doc.blocks(values, per="bytes")
        ]
        total = sum(block.amount for block in blocks)
        return QualityResult(
            bits_per_byte=total / self.bytes,
            ci95=bootstrap(blocks, seed=seed),
            tokens=self.tokens,
            bytes=self.bytes,
            documents=len(self.documents),
            blocks=len(blocks),
            bits_per_token=total / self.tokens,
            context=self.context,
        )


def evaluate(
    engine: Engine,
    text: str,
    *,
    context: int | None = None,
    max_bytes: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> QualityResult:
    """Bits per byte of ``text`` under the engine's model.

    ``context`` is the longest window (the engine's own by default); ``max_bytes`` stops after the
    document that reaches it. ``progress`` is told documents done and documents in all. Raises
    ValueError if there is nothing to score or no token to condition on.
    """
    reading = read_text(engine, text, context=context, max_bytes=max_bytes)
    bits = []
    for done, doc in enumerate(reading.documents):
        if progress is not None:
            progress(done, len(reading.documents))
        nats = score_windows(engine.score, reading.prefix, doc.ids, reading.context)
        bits.append(-nats / math.log(2))
    if progress is not None:
        progress(len(bits), len(bits))
    return reading.result(bits, seed=seed)


def read_text(
    engine: Engine, text: str, *, context: int | None = None, max_bytes: int | None = None
) -> Reading:
    """What of ``text`` is scored, and how. Raises ValueError like ``evaluate``."""
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise ValueError("model: it has no tokenizer, so text cannot be scored")
    longest = engine.max_context - 1  # the engine keeps room for one generated token
    context = longest if context is None else context
    if not 2 <= context <= longest:
        raise ValueError(f"context: between 2 and {longest}, not {context}")
    texts = _limit(split_documents(text), max_bytes)
    encoded = [tokenizer.encode(doc, add_special=False) for doc in texts]
    tokens = sum(map(len, encoded))
    if not tokens:
        raise ValueError("text: there is nothing to score in it")
    size = block_tokens(tokens)
    documents = [
        Document(ids=ids, passages=_passages(ids, doc, size, tokenizer.decode))
        for doc, ids in zip(texts, encoded)
        if ids
    ]
    return Reading(
        documents=documents,
        prefix=first_token(engine),
        context=context,
        bytes=sum(len(doc.encode()) for doc, ids in zip(texts, encoded) if ids),
    )


def first_token(engine: Engine) -> int:
    """The token that a text is conditioned on: the begin token, or else the first end token."""
    spec = engine.spec
    if spec.bos_token_id is not None:
        return spec.bos_token_id
    if not spec.eos_token_ids:
        raise ValueError("model: neither bos_token_id nor eos_token_id to condition on")
    return spec.eos_token_ids[0]


def score_windows(
    score: Callable[[list[int]], np.ndarray], prefix: int, ids: list[int], context: int
) -> np.ndarray:
    """Natural log-probabilities of ``ids``, float64 [len(ids)], in windows of ``context`` tokens.

    The first window is [prefix, ids...]; each later one repeats half a context and scores only
    what is new in it.
    """
    import numpy as np

    sequence = [prefix, *ids]
    found = np.empty(len(ids))
    for start, done, end in windows(len(sequence), context):
        scores = np.asarray(score(sequence[start:end]), dtype=np.float64)
        found[done - 1 : end - 1] = scores[done - start - 1 :]
    if not np.isfinite(found).all():
        raise ValueError("model: it gives a token of the text no finite log-probability")
    return found


def windows(length: int, context: int) -> Iterator[tuple[int, int, int]]:
    """Windows (start, first position that is new, end) over a sequence whose position 0 needs no
    score."""
    done = 1
    while done < length:
        start = 0 if done == 1 else done - context // 2
        end = min(length, start + context)
        yield start, done, end
        done = end


def block_tokens(tokens: int) -> int:
    """Tokens of a bootstrap block: some hundred blocks, but none longer than a passage needs."""
    return max(16, min(MAX_BLOCK_TOKENS, tokens // 100))


def bootstrap(blocks: list[Block], *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of total amount over total size when blocks are drawn anew with replacement.

    The draws depend on the seed and the number of blocks alone.
    """
    import numpy as np

    amounts = np.array([b.amount for b in blocks])
    sizes = np.array([b.size for b in blocks])
    rng = np.random.default_rng(seed)
    ratios = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = rng.integers(0, len(blocks), len(blocks))
        ratios[i] = amounts[drawn].sum() / sizes[drawn].sum()
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


def _passages(
    ids: list[int], doc: str, size: int, decode: Callable[[list[int]], str]
) -> list[tuple[int, int, float]]:
    """A document's passages. Their bytes are those of their decoded tokens, scaled so that they
    add up: a token may hold part of a character."""
    count = max(1, round(len(ids) / size))
    edges = [len(ids) * i // count for i in range(count + 1)]
    lengths = [max(1, len(decode(ids[a:b]).encode())) for a, b in pairwise(edges)]
    scale = len(doc.encode()) / sum(lengths)
    return [(a, b, n * scale) for (a, b), n in zip(pairwise(edges), lengths)]


def _limit(documents: list[str], max_bytes: int | None) -> list[str]:
    if max_bytes is None:
        return documents
    if max_bytes < 1:
        raise ValueError(f"max_bytes: at least 1, not {max_bytes}")
    kept, total = [], 0
    for doc in documents:
        if total >= max_bytes:
            break
        kept.append(doc)
        total += len(doc.encode())
    return kept
