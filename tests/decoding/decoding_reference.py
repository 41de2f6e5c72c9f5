"""The documented law, written plainly in Python floats and sharing no code with skimp."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any


def law(
    logits: Sequence[float],
    *,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    eos: Sequence[int] = (),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
    logit_bias: dict[int, float] | None = None,
    bad_words: Sequence[Sequence[int]] = (),
    min_tokens: int = 0,
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    **_: Any,
) -> list[float]:
    x = [float(v) for v in logits]
    counts = Counter(output)
    for t in {*prompt, *output}:
        x[t] = x[t] / repetition_penalty if x[t] > 0 else x[t] * repetition_penalty
    for t, c in counts.items():
        x[t] -= c * frequency_penalty + presence_penalty
    for t, b in (logit_bias or {}).items():
        x[t] += b
    banned = set()
    if len(output) < min_tokens:
        banned |= {*stop_token_ids, *(() if ignore_eos else eos)}
    for word in bad_words:
        head = list(word[:-1])
        if not head or list(output[-len(head) :]) == head:
            banned.add(word[-1])
    for t in banned:
        x[t] = -math.inf
    order = sorted(range(len(x)), key=lambda t: (-x[t], t))
    if temperature == 0:
        return [float(t == order[0]) for t in range(len(x))]
    best = x[order[0]]
    p = [math.exp((v - best) / temperature) for v in x]
    keep = [t for t in order if x[t] > -math.inf]
    if 0 < top_k < len(keep):
        keep = [t for t in keep if x[t] >= x[keep[top_k - 1]]]
    if top_p < 1:
        total, mass, size = math.fsum(p[t] for t in keep), 0.0, 0
        for t in keep:
            mass += p[t]
            size += 1
            if mass >= top_p * total:
                break
        keep = keep[:size]
    keep = [t for t in keep if p[t] >= min_p]
    total, left = math.fsum(p[t] for t in keep), set(keep)
    return [p[t] / total if t in left else 0.0 for t in range(len(x))]
