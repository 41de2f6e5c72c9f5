"""A model ready to compute steps: its cache, its backend and the buffers between them."""

from __future__ import annotations

import torch

from skimp.cache import Arena, CacheLayout, CacheManager
from skimp.cost import model_work
from skimp.engine.backends import Forward, StepBuffers, choose_backend
from skimp.engine.options import Backend as BackendName
from skimp.engine.options import EngineOptions
from skimp.engine.runner import Runner
from skimp.engine.sizing import default_cache_bytes, longest_context
from skimp.errors import OptionError
from skimp.model.caches import cache_specs
from skimp.model.spec import ModelSpec


class ServedModel:
    """Takes over ``decoder``, which is what ``spec`` says, has its weights and is not bound yet.

    A step has at most ``max_logits`` rows whose logits are wanted. Raises ``OptionError``.
    """

    def __init__(
        self,
        decoder: Forward,
        spec: ModelSpec,
        options: EngineOptions,
        *,
        max_logits: int,
        feature_size: int = 0,
        guessed_rows: int = 1,
    ) -> None:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise OptionError("device: cuda is not available to this PyTorch on this machine")
        self.decoder, self.spec, self.dtype = decoder, spec, decoder.dtype
        dtype = str(decoder.dtype).removeprefix("torch.")
        specs = cache_specs(
            spec,
            dtype,
            cache_dtype=options.cache_dtype,
            cache_recent=options.cache_recent,
            cache_hadamard=options.cache_hadamard,
        )
        self.work = model_work(spec, specs, dtype=dtype)
        self.max_context = longest_context(spec, options)
        layout = CacheLayout.from_specs(specs, page_tokens=options.page_size(spec))
        budget = options.cache_bytes or default_cache_bytes(
            self.work,
            layout,
            options,
            self.max_context,
            is_there=next(decoder.parameters()).is_cuda,
        )
        try:
            arena = Arena(layout, budget, options.device)
        except ValueError as error:
            raise OptionError(f"cache_bytes: {error}") from error
        self.cache = CacheManager(layout, arena, enable_prefix=options.prefix_cache)
        buffers = StepBuffers(
            layout,
            arena,
            max_rows=max(options.step_tokens, options.max_batch),
            max_seqs=options.max_batch,
            max_logits=max_logits,
            max_context=self.max_context,
            feature_size=feature_size,
            guessed_rows=guessed_rows,
        )
        backend = choose_backend(decoder, spec, layout, buffers, options, self.max_context)
        self.backend_name: BackendName = backend.name
        self.runner = Runner(backend, buffers)
