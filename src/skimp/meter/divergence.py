"""How far a model's predictions moved from those of the model it was made of.

One pass over a text, window by window (see ``quality``), gives three answers of increasing
sharpness:

- bits per byte of both, each with its own interval;
- their **paired** difference: both read the same passages, so what makes a passage hard cancels,
  and the interval is many times narrower than those of the two;
- the Kullback-Leibler divergence KL(base || other) over the whole vocabulary, in nats per token,
  which counts every change of a prediction and not only that of the token that came.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from skimp.meter.quality import Block, QualityResult, Reading, bootstrap, read_text, windows

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from skimp.engine import Engine

_VALUES = 1 << 17  # logits of each model looked at together: a processor's cache holds them


@dataclass(frozen=True, kw_only=True)
class DivergenceResult:
    """Mean KL(base || other) in nats per token with its 95 % interval.

    ``top1`` is the share of positions at which both hold the same token likeliest.
    """

    kl: float
    ci95: tuple[float, float]
    top1: float
    top1_ci95: tuple[float, float]
    tokens: int
    blocks: int
    context: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "kl": self.kl,
            "ci95": list(self.ci95),
            "unit": "nats per token",
            "top1": self.top1,
            "top1_ci95": list(self.top1_ci95),
            "tokens": self.tokens,
            "blocks": self.blocks,
            "context": self.context,
        }


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Bits per byte of other less those of base, with the interval of the paired bootstrap."""

    bits_per_byte: float
    ci95: tuple[float, float]

    @property
    def inside_noise(self) -> bool:
        """Whether the interval holds zero: the text cannot tell the two apart."""
        return self.ci95[0] <= 0.0 <= self.ci95[1]

    def as_dict(self) -> dict[str, Any]:
        return {
            "bits_per_byte": self.bits_per_byte,
            "ci95": list(self.ci95),
            "inside_noise": self.inside_noise,
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that one pass over a text says of two models."""

    base: QualityResult
    other: QualityResult
    paired: PairedDifference
    divergence: DivergenceResult

    def as_dict(self) -> dict[str, Any]:
        return {
            "base": self.base.as_dict(),
            "other": self.other.as_dict(),
            "paired": self.paired.as_dict(),
            "divergence": self.divergence.as_dict(),
        }


class ReadingOptions(TypedDict, total=False):
    """How :func:`compare_all` reads a text."""

    context: int | None
    max_bytes: int | None
    seed: int
    progress: Callable[[int, int], None] | None


def divergence(
    base: Engine, other: Engine, text: str, **options: Unpack[ReadingOptions]
) -> DivergenceResult:
    """KL(base || other) over ``text``; see :func:`compare_quality`."""
    return compare_quality(base, other, text, **options).divergence


def compare_quality(
    base: Engine, other: Engine, text: str, **options: Unpack[ReadingOptions]
) -> Comparison:
    """Bits per byte of both models, their paired difference and their divergence over ``text``;
    see :func:`compare_all`."""
    return compare_all(base, [other], text, **options)[0]


def compare_all(
    base: Engine,
    others: Sequence[Engine],
    text: str,
    *,
    context: int | None = None,
    max_bytes: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Comparison]:
    """Each other model held against the base, in one pass of all of them over ``text``.

    Options are those of ``quality.evaluate``; ``context`` is by default the longest that all
    engines have. Raises ValueError when they do not read the text as the same tokens of one
    vocabulary, or when one gives a token no probability.
    """
    for other in others:
        if base.spec.vocab_size != other.spec.vocab_size:
            raise ValueError(
                f"vocab_size: {base.spec.vocab_size} of the base and {other.spec.vocab_size} of "
                "the other; only models of one vocabulary diverge by a number"
            )
    if context is None:
        context = min(engine.max_context for engine in (base, *others)) - 1
    reading = read_text(base, text, context=context, max_bytes=max_bytes)
    for other in others:
        _check_same(reading, read_text(other, text, context=context, max_bytes=max_bytes))
    found: list[list[_Compared]] = []
    for done, doc in enumerate(reading.documents):
        if progress is not None:
            progress(done, len(reading.documents))
        found.append(_compare(base, others, [reading.prefix, *doc.ids], context))
    if progress is not None:
        progress(len(found), len(found))
    return [_summary(reading, [doc[i] for doc in found], seed) for i in range(len(others))]


def _check_same(one: Reading, two: Reading) -> None:
    if one.prefix != two.prefix:
        raise ValueError(
            f"bos_token_id: texts begin with token {one.prefix} in the base and {two.prefix} in "
            "the other"
        )
    for index, (a, b) in enumerate(zip(one.documents, two.documents, strict=True)):
        if a.ids != b.ids:
            raise ValueError(f"tokenizer: the two models part document {index} differently")


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """Per token of one document: bits of both, KL in nats, whether the likeliest token agrees."""

    base: np.ndarray
    other: np.ndarray
    kl: np.ndarray
    same: np.ndarray


def _compare(
    base: Engine, others: Sequence[Engine], sequence: list[int], context: int
) -> list[_Compared]:
    import numpy as np

    found = np.empty((len(others), 4, len(sequence) - 1))
    for start, done, end in windows(len(sequence), context):
        row = start
        window = sequence[start:end]
        for p, *q in _aligned([engine.logits(window) for engine in (base, *others)]):
            first, row = row, row + p.shape[0]
            skip = max(0, done - 1 - first)  # rows that an earlier window scored
            if skip < p.shape[0]:
                targets = sequence[first + skip + 1 : row + 1]
                theirs = [rows[skip:] for rows in q]
                found[:, :, first + skip : row] = _rows(p[skip:], theirs, targets)
    if not np.isfinite(found).all():
        raise ValueError("model: one of them gives a token of the text no finite probability")
    found[:, :2] /= -math.log(2)
    return [_Compared(base=own[0], other=own[1], kl=own[2], same=own[3]) for own in found]


def _rows(p: Tensor, others: Sequence[Tensor], targets: list[int]) -> np.ndarray:
    """For each other: log-probabilities of the targets under the base and it, KL and agreement,
    float64 [others, 4, k] from logits [k, V]."""
    import numpy as np
    import torch

    found = np.empty((len(others), 4, len(targets)))
    step = max(1, _VALUES // p.shape[1])
    for a in range(0, len(targets), step):
        b = min(a + step, len(targets))
        ids = torch.tensor(targets[a:b], device=p.device)[:, None]
        left = _Softmax(p[a:b])
        for own, q in zip(found, others):
            right = _Softmax(q[a:b].to(p.device))
            # What the base rules out weighs nothing, whatever the other makes of it.
            gaps = (left.shifted - right.shifted).masked_fill_(left.exps == 0, 0.0)
            moved = gaps.mul_(left.exps).sum(-1).double() / left.exps.sum(-1).double()
            rows = (
                left.shifted.gather(-1, ids)[:, 0] - left.log_total,
                right.shifted.gather(-1, ids)[:, 0] - right.log_total,
                moved - (left.log_total - right.log_total),
                (left.shifted.argmax(-1) == right.shifted.argmax(-1)).double(),
            )
            own[:, a:b] = torch.stack(rows).cpu().numpy()
    return found


class _Softmax:
    """The parts of a softmax of float32 rows, each less its maximum. With what is common to a row
    taken off, float32 leaves a KL of some 1e-7 a row, as often too great as too small, at an
    eighth of the time of float64."""

    def __init__(self, logits: Tensor) -> None:
        self.shifted = logits - logits.amax(-1, keepdim=True)
        self.exps = self.shifted.exp()
        self.log_total = self.exps.sum(-1).double().log()


def _aligned(streams: Sequence[Iterator[Tensor]]) -> Iterator[list[Tensor]]:
    """Equally many rows of each of the streams of rows, which are cut in different places."""
    heads: list[Tensor | None] = [None] * len(streams)
    while True:
        heads = [next(s, None) if head is None else head for s, head in zip(streams, heads)]
        rows = [head for head in heads if head is not None]
        if len(rows) < len(heads):
            assert not rows, "one engine gave more rows than another"
            return
        count = min(head.shape[0] for head in rows)
        yield [head[:count] for head in rows]
        heads = [head[count:] if count < head.shape[0] else None for head in rows]


def _summary(reading: Reading, found: list[_Compared], seed: int) -> Comparison:
    def blocks(values: Iterable[np.ndarray], per: str) -> list[Block]:
        pairs = zip(reading.documents, values, strict=True)
        return [block for doc, array in pairs for block in doc.blocks(array, per=per)]

    def mean(parts: list[Block]) -> float:
        return sum(b.amount for b in parts) / sum(b.size for b in parts)

    kl = blocks((f.kl for f in found), "tokens")
    same = blocks((f.same for f in found), "tokens")
    worse = blocks((f.other - f.base for f in found), "bytes")
    return Comparison(
        base=reading.result([f.base for f in found], seed=seed),
        other=reading.result([f.other for f in found], seed=seed),
        paired=PairedDifference(
            bits_per_byte=mean(worse),
            ci95=bootstrap(worse, seed=seed),
        ),
        divergence=DivergenceResult(
            kl=mean(kl),
            ci95=bootstrap(kl, seed=seed),
            top1=mean(same),
            top1_ci95=bootstrap(same, seed=seed),
            tokens=reading.tokens,
            blocks=len(kl),
            context=reading.context,
        ),
    )
