"""onnxruntime-genai: its own generator loop, all sequences of a batch in one tensor."""

from __future__ import annotations

import importlib.metadata
import json
import time
from typing import Any

import numpy as np
import onnxruntime_genai as og

from rivals.engine import Engine, Generation, Limits


class OnnxGenAI(Engine):
    """An ONNX folder written by onnxruntime-genai's builder, greedy, on the CPU provider."""

    model: Any = None

    def load(self, limits: Limits) -> None:
        config = og.Config(str(self.files))
        session = {"intra_op_num_threads": self.threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self.model = og.Model(config)

    def generate(self, prompts: list[list[int]], steps: int) -> Generation:
        length = len(prompts[0]) + steps + 1
        params = og.GeneratorParams(self.model)
        # As long as asked for: end-of-text does not count before the minimum.
        params.set_search_options(
            do_sample=False, batch_size=len(prompts), max_length=length, min_length=length
        )
        generator = og.Generator(self.model, params)
        times = [time.perf_counter()]
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        for _ in range(steps + 1):
            generator.generate_next_token()
            times.append(time.perf_counter())
        made = [generator.get_sequence(index) for index in range(len(prompts))]
        if {len(ids) for ids in made} != {length}:
            raise RuntimeError(f"{length} tokens asked, {[len(ids) for ids in made]} made")
        return Generation(
            first_s=times[1] - times[0],
            steps_s=list(np.diff(times[1:])),
            first_tokens=[int(ids[len(prompts[0])]) for ids in made],
        )

    def versions(self) -> dict[str, str]:
        names = ("onnxruntime-genai", "onnxruntime")
        return {name: importlib.metadata.version(name) for name in names}
