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
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from skimp.engine import Engine

SEPARATOR = re.compile(r"^<\|endoftext\|>[ \t]*\r?(?:\n|\Z)", re.MULTILINE)
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

    def as_dict(self) -> dict[str, Any]:
        return {
            "bits_per_byte": self.bits_per_byte,
            "ci95": list(self.ci95),
            "tokens": self.tokens,
            "bytes": self.bytes,
            "documents": self.documents,
            "blocks": self.blocks,
            "bits_per_token": self.bits_per_token,
            "context": self.context,
        }


@dataclass(frozen=True, kw_only=True)
class Block:
    """A passage: bits spent on it and the bytes it stands for."""

    bits: float
    bytes: float


def split_documents(text: str) -> list[str]:
    """The documents of a text; the separator lines and empty documents are dropped."""
    documents = (part.removesuffix("\n") for part in SEPARATOR.split(text))
    return [part for part in documents if part.strip()]


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
    spec, tokenizer = engine.spec, engine.tokenizer
    if tokenizer is None:
        raise ValueError("model: it has no tokenizer, so text cannot be scored")
    longest = engine.max_context - 1  # the engine keeps room for one generated token
    context = longest if context is None else context
    if not 2 <= context <= longest:
        raise ValueError(f"context: between 2 and {longest}, not {context}")
    prefix = spec.bos_token_id
    if prefix is None:
        if not spec.eos_token_ids:
            raise ValueError("model: neither bos_token_id nor eos_token_id to condition on")
        prefix = spec.eos_token_ids[0]
    documents = _limit(split_documents(text), max_bytes)
    if not documents:
        raise ValueError("text: there is nothing to score in it")
    encoded = [tokenizer.encode(doc, add_special=False) for doc in documents]
    size = block_tokens(sum(map(len, encoded)))
    blocks: list[Block] = []
    tokens = 0
    for done, (doc, ids) in enumerate(zip(documents, encoded)):
        if progress is not None:
            progress(done, len(documents))
        if not ids:
            continue
        bits = -score_windows(engine.score, prefix, ids, context) / math.log(2)
        tokens += len(ids)
        blocks += _blocks(bits, ids, doc, size, tokenizer.decode)
    if progress is not None:
        progress(len(documents), len(documents))
    total_bits, total_bytes = sum(b.bits for b in blocks), sum(len(d.encode()) for d in documents)
    return QualityResult(
        bits_per_byte=total_bits / total_bytes,
        ci95=bootstrap(blocks, seed=seed),
        tokens=tokens,
        bytes=total_bytes,
        documents=len(documents),
        blocks=len(blocks),
        bits_per_token=total_bits / tokens,
        context=context,
    )


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
    done = 1  # tokens of the sequence that are scored or need no score
    while done < len(sequence):
        start = 0 if done == 1 else done - context // 2
        end = min(len(sequence), start + context)
        scores = np.asarray(score(sequence[start:end]), dtype=np.float64)
        found[done - 1 : end - 1] = scores[done - start - 1 :]
        done = end
    if not np.isfinite(found).all():
        raise ValueError("model: it gives a token of the text no finite log-probability")
    return found


def block_tokens(tokens: int) -> int:
    """Tokens of a bootstrap block: some hundred blocks, but none longer than a passage needs."""
    return max(16, min(MAX_BLOCK_TOKENS, tokens // 100))


def bootstrap(blocks: list[Block], *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of total bits over total bytes when blocks are drawn anew with replacement."""
    import numpy as np

    bits = np.array([b.bits for b in blocks])
    sizes = np.array([b.bytes for b in blocks])
    rng = np.random.default_rng(seed)
    ratios = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = rng.integers(0, len(blocks), len(blocks))
        ratios[i] = bits[drawn].sum() / sizes[drawn].sum()
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


def _blocks(
    bits: np.ndarray, ids: list[int], doc: str, size: int, decode: Callable[[list[int]], str]
) -> list[Block]:
    """A document's passages. Their bytes are those of their decoded tokens, scaled so that they
    add up: a token may hold part of a character."""
    count = max(1, round(len(ids) / size))
    edges = [len(ids) * i // count for i in range(count + 1)]
    spans = list(pairwise(edges))
    lengths = [max(1, len(decode(ids[a:b]).encode())) for a, b in spans]
    scale = len(doc.encode()) / sum(lengths)
    return [
        Block(bits=float(bits[a:b].sum()), bytes=n * scale) for (a, b), n in zip(spans, lengths)
    ]


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
