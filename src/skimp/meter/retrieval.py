"""Retrieval: whether a model still finds what was said once, far back.

A prompt hides pairs of a key and a value in filler text and ends with one of the keys. Of the
candidate values the pair's own should follow, and the model is right if that one's probability
gains most from the whole prompt over its last few tokens alone: which of the words is likelier
anyway, as a word, says nothing of memory (Holtzman et al. 2021). Each pair stands there twice in a
row ("Clara lantern; Clara lantern."), so that even a small model takes it for something to be
repeated: what is asked is to look back and copy, and no wording has to be understood. One hidden
pair is a *needle*; with several keys the values of the others are among the candidates, so that
recency alone does not answer.

Everything follows from the seed and the tokenizer; lengths are in tokens.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from skimp.meter.score import mean, share

if TYPE_CHECKING:
    from skimp.engine import Engine
    from skimp.meter.tasks import TaskResult

_NAMES: Final = """
Martha Oliver Beatrice Simon Clara Hugo Esther Walter
Nora Felix Agnes Rupert Ivy Conrad Della Magnus
"""
_THINGS: Final = """
lantern river button castle pepper window saddle mirror
ribbon kettle garden needle barrel feather candle anchor
"""
KEYS: Final = tuple(_NAMES.split())
VALUES: Final = tuple(_THINGS.split())
PAIR: Final = " {key} {value}; {key} {value}."
CANDIDATES: Final = 8
MANY: Final = 4  # keys of a prompt with several
LEAST_CONTEXT: Final = 96  # so that pairs and question leave room for filler
DEPTHS: Final = 4  # parts of the context in which needles are hidden equally often
TAIL: Final = 24  # tokens before the question in which nothing is hidden: what is near
COMMON, RARE = 0.6, 0.95  # of the text's tokens, from the most frequent: what pairs are drawn from


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """What is asked: ``items`` prompts of each number of ``keys`` at each of the ``contexts``."""

    contexts: tuple[int, ...]
    items: int = 64
    keys: tuple[int, ...] = (1, MANY)

    def __post_init__(self) -> None:
        if not self.contexts:
            raise ValueError("retrieval: name at least one context")
        for context in self.contexts:
            if context < LEAST_CONTEXT:
                raise ValueError(f"retrieval: contexts of at least {LEAST_CONTEXT}, not {context}")
        if self.items < 1:
            raise ValueError(f"retrieval_items: at least 1, not {self.items}")
        for count in self.keys:
            if not 1 <= count <= CANDIDATES:
                raise ValueError(f"keys: between 1 and {CANDIDATES}, not {count}")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A prompt, its end (``near``), and the token sequences that may follow, of which ``label`` is
    right. ``depth``: where the pair lies that is asked for, 0 the beginning, 1 the end."""

    prompt: tuple[int, ...]
    near: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    label: int
    depth: float


def hidden(
    filler: Sequence[int],
    needles: Sequence[Sequence[int]],
    depths: Sequence[float],
    question: Sequence[int],
    length: int,
    start: int,
    tail: int = 0,
) -> list[int]:
    """``length`` tokens: filler from ``start`` on (the text's end is followed by its beginning)
    with each needle at its depth (0 to 1 of the filler but its last ``tail`` tokens), then the
    question. Raises ValueError if there is no room for them."""
    room = length - len(question) - sum(map(len, needles))
    if room <= tail or not filler:
        raise ValueError(f"retrieval: {length} tokens hold no filler beside the pairs")
    text = [filler[(start + i) % len(filler)] for i in range(room)]
    room -= tail
    found: list[int] = []
    done = 0
    for at, needle in sorted(
        (min(room, int(depth * room)), list(n)) for depth, n in zip(depths, needles)
    ):
        found += text[done:at] + needle
        done = at
    return found + text[done:] + list(question)


def text_probes(
    encode: Callable[[str], list[int]],
    filler: Sequence[int],
    *,
    context: int,
    keys: int,
    items: int,
    begin: int | None,
    seed: int,
) -> list[Probe]:
    """Prompts of ``context`` tokens, with ``begin`` in front, in words. The asked pair's depths are
    spread evenly over the context."""
    rng = random.Random(f"{seed} {context} {keys}")
    frame = [] if begin is None else [begin]
    found = []
    for item in range(items):
        names, values = rng.sample(KEYS, keys), rng.sample(VALUES, CANDIDATES)
        label = rng.randrange(keys)
        depths = [rng.random() for _ in names]
        depths[label] = (item % DEPTHS + rng.random()) / DEPTHS
        needles = [encode(PAIR.format(key=k, value=v)) for k, v in zip(names, values)]
        question = encode(f" {names[label]}")
        start = rng.randrange(len(filler)) if filler else 0
        body = hidden(filler, needles, depths, question, context - len(frame), start, TAIL)
        found.append(
            Probe(
                prompt=(*frame, *body),
                near=(*frame, *body[-TAIL - len(question) :]),
                candidates=tuple(tuple(encode(f" {value}")) for value in values),
                label=label,
                depth=depths[label],
            )
        )
    return found


def token_probes(
    rows: Sequence[Sequence[int]], *, count: int, most_depth: float, seed: int
) -> list[Probe]:
    """The same where there is no tokenizer: prompts as long as the ``rows`` of a text, which are
    the filler, with pairs of its own tokens (two for a key, one for a value). The first token of a
    row stays in front. Needles lie no deeper than ``most_depth``."""
    counts = Counter(token for row in rows for token in row)
    total, seen, pool = counts.total(), 0, []
    for token, number in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        seen += number
        if COMMON <= seen / total <= RARE:
            pool.append(token)
    if len(pool) < CANDIDATES + 2:
        raise ValueError("calibration: the text has too few different tokens to hide pairs in it")
    rng = random.Random(seed)
    found = []
    for index in range(count):
        first, *filler = rows[index % len(rows)]
        one, two, *values = rng.sample(pool, CANDIDATES + 2)
        label, depth = rng.randrange(CANDIDATES), rng.random() * most_depth
        needle = [one, two, values[label]] * 3
        body = hidden(filler, [needle], [depth], [one, two], len(filler), 0)
        found.append(
            Probe(
                prompt=(first, *body),
                near=(first, one, two),
                candidates=tuple((value,) for value in values),
                label=label,
                depth=depth,
            )
        )
    return found


def run_retrieval(
    engine: Engine,
    asked: Retrieval,
    *,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[TaskResult]:
    """A result for each context and number of keys. ``accuracy``: of the candidates, the right
    value's log-probability gains most over that behind the prompt's end alone; ``likeliest``: it is
    the greatest as it stands (a tie is a miss); ``gain``: the right value's mean gain, in nats.
    ``groups`` parts the accuracy by depth. Raises ValueError if a context does not fit the engine.
    """
    from skimp.meter.tasks import TaskResult

    found = []
    for context in asked.contexts:
        for keys in asked.keys:
            name = f"{'needle' if keys == 1 else f'{keys} keys'} at {context}"
            if progress is not None:
                progress(name)
            probes = _probes(engine, context, keys, asked.items, seed)
            sums = _scores(engine, probes, [probe.prompt for probe in probes])
            near = _scores(engine, probes, [probe.near for probe in probes])
            gains = [[a - b for a, b in zip(*pair)] for pair in zip(sums, near)]
            right = [_is_greatest(one, p.label) for one, p in zip(gains, probes)]
            likeliest = [_is_greatest(one, p.label) for one, p in zip(sums, probes)]
            own = [one[p.label] for one, p in zip(gains, probes)]
            parts: dict[str, list[bool]] = {}
            for probe, outcome in zip(probes, right):
                part = min(DEPTHS - 1, int(probe.depth * DEPTHS))
                label = f"{part / DEPTHS:.2f} to {(part + 1) / DEPTHS:.2f}"
                parts.setdefault(label, []).append(outcome)
            chance = 1 / CANDIDATES
            found.append(
                TaskResult(
                    name=name,
                    kind="retrieval",
                    n=len(probes),
                    scores={
                        "accuracy": share(right, chance),
                        "likeliest": share(likeliest, chance),
                        "gain": mean(own, seed=seed),
                    },
                    outcomes={
                        "accuracy": tuple(map(float, right)),
                        "likeliest": tuple(map(float, likeliest)),
                        "gain": tuple(own),
                    },
                    groups={"depth": {k: share(v, chance) for k, v in sorted(parts.items())}},
                    notes={"context": context, "keys": keys},
                )
            )
    return found


def _probes(engine: Engine, context: int, keys: int, items: int, seed: int) -> list[Probe]:
    from skimp.meter.quality import first_token
    from skimp.text.documents import SEPARATOR

    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise ValueError("model: it has no tokenizer, so it cannot be asked anything")

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special=False)

    probes = text_probes(
        encode,
        encode(SEPARATOR.sub("", _filler())),
        context=context,
        keys=keys,
        items=items,
        begin=first_token(engine),
        seed=seed,
    )
    longest = context + max(len(c) for probe in probes for c in probe.candidates)
    if longest >= engine.max_context:
        raise ValueError(
            f"retrieval: {context} tokens and an answer do not fit the context of "
            f"{engine.max_context}"
        )
    return probes


def _filler() -> str:
    from importlib import resources

    packaged = resources.files("skimp") / "assets" / "text" / "evaluation.txt"
    return packaged.read_text(encoding="utf-8")


def _is_greatest(values: Sequence[float], index: int) -> bool:
    """A tie is none."""
    return all(value < values[index] for i, value in enumerate(values) if i != index)


def _scores(
    engine: Engine, probes: Sequence[Probe], prompts: Sequence[tuple[int, ...]]
) -> list[list[float]]:
    """Summed log-probabilities of each probe's candidates behind a prompt."""
    from skimp.meter.continuations import Continuation, score_continuations

    flat = [
        Continuation(tokens=(*prompt, *value), start=len(prompt), cut=False)
        for probe, prompt in zip(probes, prompts)
        for value in probe.candidates
    ]
    found = iter(score_continuations(engine, flat))
    return [[float(next(found).logprobs.sum()) for _ in p.candidates] for p in probes]
