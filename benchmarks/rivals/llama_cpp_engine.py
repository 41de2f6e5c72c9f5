"""llama.cpp through the low-level functions of llama-cpp-python.

Sequences are decoded together with `llama_decode`, each in its own cache stream (llama.cpp's
advice for sequences that share nothing); the next token is the argmax of the logits, taken with
one NumPy call, which is cheaper than llama.cpp's own sampler chain.
"""

from __future__ import annotations

import ctypes
import os
import time
from typing import Any

import llama_cpp
import numpy as np

from rivals.engine import Case, Engine, Generation, Limits

LOGICAL_BATCH = 2048  # tokens in one llama_decode call
FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}


@llama_cpp.llama_log_callback
def _ignore(level: int, text: bytes, data: Any) -> None:
    """Drop llama.cpp's log lines."""


class LlamaCpp(Engine):
    """llama.cpp with a GGUF file of any weight type.

    Options: ``ubatch`` (tokens of one graph) and ``flash_attention``: ``on``, ``off``, ``auto`` or
    ``best``, which is on for prompts and off for generation, the faster of the two in each on the
    AVX-512 machine it was tried on (a user has to choose one for both). With ``copy_prompt`` (the
    default) only the first prompt of a batch is read, its cache is copied whole to the other
    streams and the sequences part with their first token: each step does the same work, and
    setting up 32 sequences takes a second instead of a minute.
    """

    model: Any = None
    context: Any = None

    def load(self, limits: Limits) -> None:
        llama_cpp.llama_log_set(_ignore, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(self.files), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {self.files.name}")

    def prepare(self, case: Case, tokens: int) -> None:
        """Make a context with a separate stream of ``tokens`` tokens for every sequence."""
        if self.context:
            llama_cpp.llama_free(self.context)
        batch, stream = case.batch, -(-tokens // 256) * 256
        flash = self.options.get("flash_attention", "best")
        if flash == "best":
            flash = "off" if case.kind == "generate" else "on"
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = batch * stream
        params.n_batch = LOGICAL_BATCH
        params.n_ubatch = int(self.options.get("ubatch", 512))
        params.n_seq_max = batch
        params.n_threads = self.threads
        params.n_threads_batch = self.threads
        params.flash_attn_type = FLASH_ATTENTION[flash]
        params.kv_unified = False
        params.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp could not make a context of {batch} x {stream} tokens")

    def generate(self, prompts: list[list[int]], steps: int) -> Generation:
        batch, vocabulary = len(prompts), self.config["vocab_size"]
        copy_prompt = bool(self.options.get("copy_prompt", True))
        memory = llama_cpp.llama_get_memory(self.context)
        llama_cpp.llama_memory_clear(memory, False)
        step_batch = llama_cpp.llama_batch_init(batch, 0, 1)
        prompt_batch = llama_cpp.llama_batch_init(LOGICAL_BATCH, 0, 1)
        tokens = np.zeros(batch, dtype=np.int32)
        try:
            begin = time.perf_counter()
            tokens[0] = self._prefill(prompt_batch, 0, prompts[0], vocabulary)
            for index, prompt in enumerate(prompts[1:], 1):
                if copy_prompt:
                    llama_cpp.llama_memory_seq_cp(memory, 0, index, -1, -1)
                    tokens[index] = prompt[-1]
                else:
                    tokens[index] = self._prefill(prompt_batch, index, prompt, vocabulary)
            first_s = time.perf_counter() - begin
            first_tokens = [int(token) for token in tokens]
            slots = np.ctypeslib.as_array(step_batch.token, (batch,))
            positions = np.ctypeslib.as_array(step_batch.pos, (batch,))
            positions[:] = [len(prompt) for prompt in prompts]
            for index in range(batch):
                step_batch.n_seq_id[index] = 1
                step_batch.seq_id[index][0] = index
                step_batch.logits[index] = 1
            step_batch.n_tokens = batch
            steps_s = []
            before = time.perf_counter()
            for _ in range(steps):
                slots[:] = tokens
                self._decode(step_batch)
                logits = llama_cpp.llama_get_logits(self.context)
                tokens = np.ctypeslib.as_array(logits, (batch, vocabulary)).argmax(axis=1)
                positions += 1
                now = time.perf_counter()
                steps_s.append(now - before)
                before = now
        finally:
            llama_cpp.llama_batch_free(step_batch)
            llama_cpp.llama_batch_free(prompt_batch)
        return Generation(first_s=first_s, steps_s=steps_s, first_tokens=first_tokens)

    def _prefill(self, holder: Any, sequence: int, prompt: list[int], vocabulary: int) -> int:
        """Decode one prompt into its stream and return its first new token."""
        for begin in range(0, len(prompt), LOGICAL_BATCH):
            chunk = prompt[begin : begin + LOGICAL_BATCH]
            size = len(chunk)
            np.ctypeslib.as_array(holder.token, (size,))[:] = chunk
            np.ctypeslib.as_array(holder.pos, (size,))[:] = np.arange(begin, begin + size)
            np.ctypeslib.as_array(holder.n_seq_id, (size,))[:] = 1
            np.ctypeslib.as_array(holder.logits, (size,))[:] = 0
            for index in range(size):
                holder.seq_id[index][0] = sequence
            holder.logits[size - 1] = 1
            holder.n_tokens = size
            self._decode(holder)
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())

    def _decode(self, batch: Any) -> None:
        status = llama_cpp.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")

    def versions(self) -> dict[str, str]:
        return {"llama-cpp-python": llama_cpp.__version__}

    def isa(self) -> dict[str, Any]:
        line = llama_cpp.llama_print_system_info().decode()
        flags = [part.split("=")[0].strip() for part in line.split("|") if part.strip()[-1:] == "1"]
        amx = self.files.stem not in ("gguf-bf16",) and any("AMX" in flag for flag in flags)
        note = (
            "AMX int8 tiles for matrices" if amx else "AVX-512 BF16 dot products, no AMX for bf16"
        )
        return {"compiled with": [flag.removeprefix("CPU : ") for flag in flags], "note": note}
