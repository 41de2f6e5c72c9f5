"""Log-probabilities of continuations, batched: those of one context share its computation.

Text is parted into tokens as a whole (context and continuation in one piece) and then cut where the
context's own tokens end, as lm-eval does; blanks at a context's end belong to the continuation,
because tokens usually begin with their blank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from skimp.meter.quality import first_token

if TYPE_CHECKING:
    from skimp.engine import Engine
    from skimp.engine.reading import Scores

_WAVE = 64  # contexts whose continuations are scored together


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """Tokens of which those from ``start`` on are scored. ``cut``: the context lost its beginning,
    because the engine's context is too short for it."""

    tokens: tuple[int, ...]
    start: int
    cut: bool


def encode_continuation(
    engine: Engine, context: str, continuation: str, *, templated: bool = False
) -> Continuation:
    """A text that goes on. An empty context is the model's begin token, or else its first end token
    (see ``quality.first_token``). ``templated``: a chat template wrote the text, its begin token
    and other control tokens included. Raises ValueError when the continuation alone is too long."""
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise ValueError("model: it has no tokenizer, so text cannot be scored")
    head = context.rstrip()
    continuation = context[len(head) :] + continuation
    frame = [] if templated else tokenizer.encode("")

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special=False, allow_special=templated)

    whole = encode(head + continuation)
    start = len(encode(head)) if head else 0
    if not whole:
        raise ValueError("continuation: there is nothing to score in it")
    start = min(start, len(whole) - 1)  # the context's last token may swallow a short one
    if not frame and not start:
        frame = [first_token(engine)]
    room = engine.max_context - 1 - len(frame)
    dropped = max(0, len(whole) - room)
    if dropped > start or (dropped == start and not frame):
        raise ValueError(
            f"continuation: {len(whole) - start} tokens do not fit a context of "
            f"{engine.max_context}"
        )
    return Continuation(
        tokens=(*frame, *whole[dropped:]), start=len(frame) + start - dropped, cut=dropped > 0
    )


def score_continuations(
    engine: Engine,
    items: Sequence[Continuation],
    progress: Callable[[int, int], None] | None = None,
) -> list[Scores]:
    """Scores of the continuations' tokens, in their order.

    The first of each context is computed before the others, which then find its pages in the
    prefix cache. ``progress`` is told contexts done and contexts in all.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(item.tokens[: item.start], []).append(index)
    found: dict[int, Scores] = {}

    def score(indices: list[int]) -> None:
        prompts = [items[i].tokens for i in indices]
        starts = [items[i].start - 1 for i in indices]
        found.update(zip(indices, engine.score_batch(prompts, starts), strict=True))

    members = list(groups.values())
    for begin in range(0, len(members), _WAVE):
        if progress is not None:
            progress(begin, len(members))
        wave = members[begin : begin + _WAVE]
        score([group[0] for group in wave])
        score([index for group in wave for index in group[1:]])
    if progress is not None:
        progress(len(members), len(members))
    return [found[index] for index in range(len(items))]
