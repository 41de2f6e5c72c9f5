"""``text: self``: what the original model writes when nobody asks, as a text to heal on.

Sampled at temperature 1, so that it is what the original itself expects (LLM-QAT, Liu et al. 2024);
no data is needed. Each document has a seed of its own, and is made once: saves carry it along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from skimp.errors import ShrinkError
from skimp.shrink.heal.data import begin_ids
from skimp.text import Tokenizer

TOGETHER: Final = {"cpu": 64, "cuda": 512}  # documents
MOST_TOKENS: Final = 1 << 20  # unless the user says how many
TOKENS: Final = "own_text"
LENGTHS: Final = "own_text_lengths"
TEXT_TENSORS: Final = (TOKENS, LENGTHS)


def write_text(
    directory: Path,
    tokens: int,
    *,
    longest: int,
    dtype: Literal["float32", "bfloat16"],
    device: Literal["cpu", "cuda"],
    seed: int,
    tell: Callable[[int, int], None] = lambda done, wanted: None,
) -> dict[str, Tensor]:
    """Documents of at most ``longest`` tokens by the model of ``directory`` until there are
    ``tokens``: their ids one after another, and their lengths, int32. ``tell`` hears how many of
    how many are written. Raises ShrinkError if the model writes nothing."""
    from skimp.decoding.params import SamplingParams
    from skimp.engine import Engine, EngineOptions

    tokenizer = Tokenizer.load(directory)
    begin = begin_ids(tokenizer)
    random = np.random.default_rng(seed)
    ordinary = sorted(set(range(tokenizer.vocab_size)) - tokenizer.control_ids)
    together = TOGETHER[device]
    options = EngineOptions(
        dtype=dtype,
        device=device,
        threads=torch.get_num_threads(),
        max_batch=together,
        max_context=longest,
    )
    engine = Engine.load(directory, options)
    docs: list[list[int]] = []
    size = 0
    while size < tokens:
        # Where nothing begins a text, a token drawn at random does.
        prompts = [begin or [int(random.choice(ordinary))] for _ in range(together)]
        params = [
            SamplingParams(max_tokens=longest - len(prompt), seed=len(docs) + i)
            for i, prompt in enumerate(prompts)
        ]
        found = [
            [*prompt, *out.outputs[0].token_ids]
            for prompt, out in zip(prompts, engine.generate(prompts, params))
        ]
        if all(len(doc) == len(prompt) for doc, prompt in zip(found, prompts)):
            raise ShrinkError("text: self: the original writes nothing")
        docs += found
        size += sum(map(len, found))
        tell(min(size, tokens), tokens)
    flat = np.fromiter((token for doc in docs for token in doc), dtype=np.int32)
    lengths = np.array([len(doc) for doc in docs], dtype=np.int32)
    return {TOKENS: torch.from_numpy(flat), LENGTHS: torch.from_numpy(lengths)}


def from_tensors(tensors: Mapping[str, Tensor]) -> list[np.ndarray]:
    """The documents of :func:`write_text`."""
    edges = np.cumsum(tensors[LENGTHS].numpy())[:-1]
    return [np.array(doc) for doc in np.split(tensors[TOKENS].numpy(), edges)]
