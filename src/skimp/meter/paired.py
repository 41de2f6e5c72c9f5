"""What a changed model loses against its base, both read over the same text in one pass.

The loss is a difference of two runs over the same passages, so its interval is bootstrapped over
the passages' differences: far narrower than the two models' own intervals, which mostly say how
hard the text is. The Kullback-Leibler divergence KL(base || changed), in nats a token, is taken
over the whole vocabulary at every position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from skimp.meter.quality import (
    Block,
    QualityResult,
    block_tokens,
    bootstrap,
    limit_documents,
    passages,
    score_windows,
    split_documents,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from skimp.engine import Engine
    from skimp.engine.runner import Runner

WINDOW_BYTES = 1 << 29  # of the base's log-probabilities that are held at once


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A model's own figures and what it loses to the base; intervals are 95 %."""

    quality: QualityResult
    difference: float  # bits per byte above the base's
    difference_ci95: tuple[float, float]
    kl: float
    kl_ci95: tuple[float, float]

    @property
    def inside_noise(self) -> bool:
        """Whether the text is too short to tell the loss from none."""
        low, high = self.difference_ci95
        return low <= 0 <= high


def losses(
    base: Engine,
    others: Sequence[Engine],
    text: str,
    *,
    context: int | None = None,
    max_bytes: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Loss]:
    """The base against itself, then each of ``others`` against it.

    ``context`` is the longest window; by default what every engine can hold, with the base's
    log-probabilities of a window in half a GiB. Raises ValueError naming what does not fit or
    cannot be compared.
    """
    import numpy as np

    engines = [base, *others]
    tokenizer, spec = base.tokenizer, base.spec
    if tokenizer is None:
        raise ValueError("model: it has no tokenizer, so text cannot be scored")
    for engine in others:
        if engine.spec.vocab_size != spec.vocab_size:
            raise ValueError(
                f"vocab_size: {engine.spec.vocab_size} cannot be compared with the base's "
                f"{spec.vocab_size}"
            )
    longest = min(engine.max_context for engine in engines) - 1
    if context is None:
        context = max(2, min(longest, WINDOW_BYTES // (4 * spec.vocab_size)))
    if not 2 <= context <= longest:
        raise ValueError(f"context: between 2 and {longest}, not {context}")
    prefix = spec.bos_token_id
    if prefix is None:
        if not spec.eos_token_ids:
            raise ValueError("model: neither bos_token_id nor eos_token_id to condition on")
        prefix = spec.eos_token_ids[0]
    documents = limit_documents(split_documents(text), max_bytes)
    encoded = [tokenizer.encode(doc, add_special=False) for doc in documents]
    if not any(encoded):
        raise ValueError("text: there is nothing to score in it")
    for engine in others:
        other = engine.tokenizer
        if other is None or other.encode(documents[0], add_special=False) != encoded[0]:
            raise ValueError("tokenizer: it does not split the text as the base's does")
    size = block_tokens(sum(map(len, encoded)))
    lines: list[list[Block]] = [[] for _ in range(2 * len(engines))]  # bits, then KL, of each
    counts: list[Block] = []
    for done, (doc, ids) in enumerate(zip(documents, encoded)):
        if progress is not None:
            progress(done, len(documents))
        if not ids:
            continue
        windows: list[np.ndarray] = []

        def first(window: list[int], kept: list[np.ndarray] = windows) -> np.ndarray:
            kept.append(_window(engines, window))
            return kept[-1][0]

        found = [score_windows(first, prefix, ids, context)]
        for line in range(1, len(lines)):
            replay = iter(windows)
            found.append(score_windows(lambda _: next(replay)[line], prefix, ids, context))  # noqa: B023
        for line, values in enumerate(found):
            values = values if line >= len(engines) else -values / math.log(2)
            lines[line] += passages(values, ids, doc, size, tokenizer.decode)
        counts += passages(np.ones(len(ids)), ids, doc, size, tokenizer.decode)
    if progress is not None:
        progress(len(documents), len(documents))
    tokens = sum(map(len, encoded))
    total = sum(len(doc.encode()) for doc in documents)
    results = []
    for index in range(len(engines)):
        own, kl = lines[index], lines[len(engines) + index]
        bits = sum(b.bits for b in own)
        more = [Block(bits=b.bits - a.bits, bytes=a.bytes) for a, b in zip(lines[0], own)]
        per_token = [Block(bits=b.bits, bytes=n.bits) for b, n in zip(kl, counts)]
        results.append(
            Loss(
                quality=QualityResult(
                    bits_per_byte=bits / total,
                    ci95=bootstrap(own, seed=seed),
                    tokens=tokens,
                    bytes=total,
                    documents=len(documents),
                    blocks=len(own),
                    bits_per_token=bits / tokens,
                    context=context,
                ),
                difference=sum(b.bits for b in more) / total,
                difference_ci95=bootstrap(more, seed=seed),
                kl=sum(b.bits for b in kl) / tokens,
                kl_ci95=bootstrap(per_token, seed=seed),
            )
        )
    return results


def _window(engines: Sequence[Engine], ids: list[int]) -> np.ndarray:
    """Float64 [2 E, T - 1]: each engine's log-probabilities of ``ids[1:]``, then its KL there."""
    import numpy as np
    import torch

    rows = len(ids) - 1
    scores, divergences = [], []
    held: list[Tensor] = []  # the base's log-probabilities [rows, V], chunk by chunk
    for index, engine in enumerate(engines):
        start = 0
        kl: list[Tensor] = []

        def see(logits: Tensor, index: int = index, kl: list[Tensor] = kl) -> None:
            nonlocal start
            logprobs = logits[: rows - start].float().log_softmax(-1).cpu()
            if index == 0:
                held.append(logprobs)
            else:
                reference = held[0][start : start + len(logprobs)]
                # In float64 sums: the terms nearly cancel where models agree.
                gaps = (reference - logprobs).double() * reference.exp().double()
                kl.append(gaps.sum(-1))
            start += len(logprobs)

        with _watched(engine, see):
            scores.append(engine.score(ids))
        if index == 0:
            held[:] = [torch.cat(held)]
            divergences.append(np.zeros(rows))
        else:
            divergences.append(torch.cat(kl).numpy())
    return np.stack([*scores, *divergences])


class _Watched:
    """A runner that shows every step's logits to a function."""

    def __init__(self, runner: Runner, see: Callable[[Tensor], None]) -> None:
        self._runner, self._see = runner, see

    def run(self, work: Any) -> Tensor:
        logits = self._runner.run(work)
        self._see(logits)
        return logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


@contextmanager
def _watched(engine: Engine, see: Callable[[Tensor], None]) -> Iterator[None]:
    runner = engine.runner
    engine.runner = _Watched(runner, see)  # type: ignore[assignment]
    try:
        yield
    finally:
        engine.runner = runner
