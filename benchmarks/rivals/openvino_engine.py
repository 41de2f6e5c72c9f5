"""OpenVINO GenAI: the continuous-batching pipeline with paged attention, fed with token ids."""

from __future__ import annotations

import importlib.metadata
import time
from collections import Counter
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

from rivals.engine import Engine, Generation, Limits

MATRIX_NODES = ("FullyConnected", "MatMul", "LLMMLP", "QKVProjection", "ScaledDotProductAttention")
BLOCK_TOKENS = 32  # tokens in one cache block of the CPU plugin


class OpenVino(Engine):
    """A stateful IR, turned into paged attention by the pipeline.

    Options: ``precision`` (inference precision), ``cache_precision`` (``bf16``, or ``u8`` as the
    plugin would choose by itself) and ``batched_tokens`` (prompt tokens scheduled in one step).

    Prompts and generation are scheduled in separate phases (``dynamic_split_fuse`` off): otherwise
    the first sequences of a batch run ahead while the last prompts are read, and no step has
    every sequence in it.
    """

    pipeline: Any = None
    requests = 0

    def _properties(self) -> dict[str, Any]:
        properties: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": self.threads,
            "INFERENCE_PRECISION_HINT": self.options.get("precision", "bf16"),
        }
        if cache := self.options.get("cache_precision"):
            properties["KV_CACHE_PRECISION"] = cache
        return properties

    def load(self, limits: Limits) -> None:
        scheduler = genai.SchedulerConfig()
        blocks_each = -(-limits.tokens_each // BLOCK_TOKENS) + 1
        scheduler.num_kv_blocks = limits.tokens_total // BLOCK_TOKENS + limits.sequences * 2
        scheduler.num_kv_blocks = max(scheduler.num_kv_blocks, blocks_each)
        scheduler.max_num_seqs = limits.sequences
        scheduler.enable_prefix_caching = False
        scheduler.dynamic_split_fuse = False
        scheduler.max_num_batched_tokens = max(
            int(self.options.get("batched_tokens", 2048)), limits.tokens_each
        )
        self.pipeline = genai.ContinuousBatchingPipeline(
            str(self.files), scheduler, "CPU", self._properties()
        )

    def generate(self, prompts: list[list[int]], steps: int) -> Generation:
        settings = genai.GenerationConfig()
        settings.max_new_tokens = steps + 1
        settings.ignore_eos = True
        settings.do_sample = False
        tensors = [ov.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        begin = time.perf_counter()
        handles = []
        for tensor in tensors:
            handles.append(self.pipeline.add_request(self.requests, tensor, settings))
            self.requests += 1
        pending = list(handles)
        while pending:
            self.pipeline.step()
            pending = [handle for handle in pending if not handle.can_read()]
        before = time.perf_counter()
        first_s = before - begin
        steps_s = []
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            now = time.perf_counter()
            steps_s.append(now - before)
            before = now
        outputs = [handle.read_all()[0].generated_ids for handle in handles]
        lengths = sorted({len(ids) for ids in outputs})
        if lengths != [steps + 1] or len(steps_s) != steps:
            raise RuntimeError(
                f"{steps + 1} tokens in {steps} steps asked, {lengths} in {len(steps_s)} done"
            )
        return Generation(
            first_s=first_s, steps_s=steps_s, first_tokens=[int(ids[0]) for ids in outputs]
        )

    def versions(self) -> dict[str, str]:
        names = ("openvino", "openvino-genai")
        return {name: importlib.metadata.version(name) for name in names}

    def isa(self) -> dict[str, Any]:
        """Kernels that ran, from the profile of one prompt through the same IR without paging."""
        core = ov.Core()
        properties = self._properties() | {"PERF_COUNT": True}
        request = core.compile_model(
            self.files / "openvino_model.xml", "CPU", properties
        ).create_infer_request()
        ids = np.arange(100, 164, dtype=np.int64)[None]
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(64, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        request.infer(inputs)
        kernels: Counter[str] = Counter()
        for node in request.profiling_info:
            if node.node_type in MATRIX_NODES and str(node.status).endswith("EXECUTED"):
                kernels[f"{node.node_type}: {node.exec_type}"] += 1
        capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return {"kernels": dict(kernels), "capabilities": list(capabilities)}
