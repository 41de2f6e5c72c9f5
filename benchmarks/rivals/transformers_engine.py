"""transformers: `generate` in bfloat16 with PyTorch's scaled dot product attention."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria

from rivals.engine import Engine, Generation, Limits


class _Clock(StoppingCriteria):  # type: ignore[misc]
    """Notes the time after every token and never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Transformers(Engine):
    """The plain library, dynamic cache, greedy."""

    model: Any = None

    def load(self, limits: Limits) -> None:
        torch.set_num_threads(self.threads)
        self.model = AutoModelForCausalLM.from_pretrained(
            self.files, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], steps: int) -> Generation:
        clock = _Clock()
        settings = GenerationConfig(
            max_new_tokens=steps + 1, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        ids = torch.tensor(prompts)
        begin = time.perf_counter()
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            stopping_criteria=[clock],
        )
        if out.shape[1] != ids.shape[1] + steps + 1 or len(clock.times) != steps + 1:
            raise RuntimeError(f"asked for {steps + 1} tokens, got {out.shape[1] - ids.shape[1]}")
        times = clock.times
        return Generation(
            first_s=times[0] - begin,
            steps_s=[after - before for before, after in itertools.pairwise(times)],
            first_tokens=[int(token) for token in out[:, ids.shape[1]]],
        )

    def versions(self) -> dict[str, str]:
        return {"transformers": transformers.__version__, "torch": torch.__version__}

    def isa(self) -> dict[str, Any]:
        """PyTorch's vector level; the oneDNN kernels are read from its verbose lines."""
        return {"torch vectors": torch.backends.cpu.get_cpu_capability()}
