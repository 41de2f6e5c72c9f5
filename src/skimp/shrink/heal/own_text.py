"""``text: self``: what the original model writes when nobody asks, as a text to heal on.

Sampled at temperature 1, so that it is what the original itself expects (LLM-QAT, Liu et al. 2024);
no data is needed. Each document has a seed of its own, and is made once: saves carry it along.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor

from skimp.errors import ShrinkError
from skimp.shrink.heal.data import begin_ids
from skimp.shrink.step import Whole
from skimp.text import Tokenizer

if TYPE_CHECKING:
    from skimp.shrink.heal.step import Heal

TOGETHER: Final = {"cpu": 64, "cuda": 512}  # documents
MOST_TOKENS: Final = 1 << 20  # unless the recipe says how many
TOKENS: Final = "own_text"
LENGTHS: Final = "own_text_lengths"
TEXT_TENSORS: Final = (TOKENS, LENGTHS)


def write_text(step: Heal, whole: Whole) -> dict[str, Tensor]:
    """Documents of at most ``longest`` tokens until there are ``self_tokens``: their ids one after
    another, and their lengths, int32."""
    from skimp.decoding.params import SamplingParams
    from skimp.engine import Engine, EngineOptions

    wanted = step.self_tokens or min(step.tokens, MOST_TOKENS)
    tokenizer = Tokenizer.load(whole.directory)
    begin = begin_ids(tokenizer)
    random = np.random.default_rng(whole.seed)
    ordinary = sorted(set(range(tokenizer.vocab_size)) - tokenizer.control_ids)
    together = TOGETHER[step.device]
    options = EngineOptions(
        dtype=step.computes_in,
        device=step.device,
        threads=torch.get_num_threads(),
        max_batch=together,
        max_context=step.longest,
    )
    engine = Engine.load(whole.directory, options)
    docs: list[list[int]] = []
    size = 0
    while size < wanted:
        # Where nothing begins a text, a token drawn at random does.
        prompts = [begin or [int(random.choice(ordinary))] for _ in range(together)]
        params = [
            SamplingParams(max_tokens=step.longest - len(prompt), seed=len(docs) + i)
            for i, prompt in enumerate(prompts)
        ]
        found = [
            [*prompt, *out.outputs[0].token_ids]
            for prompt, out in zip(prompts, engine.generate(prompts, params))
        ]
        if all(len(doc) == len(prompt) for doc, prompt in zip(found, prompts)):
            raise ShrinkError(f"text: {step.text}: the original writes nothing")
        docs += found
        size += sum(map(len, found))
        whole.progress(0, f"{min(size, wanted):,} of {wanted:,} tokens written by the original")
    flat = np.fromiter((token for doc in docs for token in doc), dtype=np.int32)
    lengths = np.array([len(doc) for doc in docs], dtype=np.int32)
    return {TOKENS: torch.from_numpy(flat), LENGTHS: torch.from_numpy(lengths)}


def from_tensors(tensors: Mapping[str, Tensor]) -> list[np.ndarray]:
    """The documents of :func:`write_text`."""
    edges = np.cumsum(tensors[LENGTHS].numpy())[:-1]
    return [np.array(doc) for doc in np.split(tensors[TOKENS].numpy(), edges)]
