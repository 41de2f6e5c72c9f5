"""What the meter and the commands need to know of a model or an engine to price its steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skimp.cache import CacheLayout
from skimp.cost import ModelWork, memory_plan, model_work
from skimp.cost.machine import free_memory as cpu_free

if TYPE_CHECKING:
    from skimp.engine import Engine, EngineOptions
    from skimp.model.spec import ModelSpec


def spec_work(spec: ModelSpec, dtype: str | None = None, **cache: Any) -> ModelWork:
    """The work of a model that is only described; ``dtype`` defaults to its checkpoint's.

    ``cache`` are the cache options of :func:`~skimp.model.caches.cache_specs`.
    """
    import torch

    from skimp.model.caches import cache_specs

    dtype = spec.dtype if dtype is None else dtype
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"dtype: {dtype!r} is not a dtype")
    return model_work(spec, cache_specs(spec, dtype, **cache), dtype=dtype)


def engine_layout(spec: ModelSpec, options: EngineOptions) -> CacheLayout:
    """The pages that an engine of ``spec`` will have."""
    from skimp.model.caches import cache_specs

    specs = cache_specs(spec, _engine_dtype(spec, options), **_cache_options(options))
    return CacheLayout.from_specs(specs, page_tokens=options.page_size(spec))


def engine_bytes(spec: ModelSpec, options: EngineOptions, free: float) -> float:
    """Bytes of memory that an engine of ``spec`` will take of those that are ``free``."""
    from skimp.engine.sizing import MAX_CACHE_SHARE

    work = spec_work(spec, _engine_dtype(spec, options), **_cache_options(options))
    plan = memory_plan(
        work,
        batch=options.max_batch,
        context=options.max_context or spec.max_positions,
        page_tokens=options.page_size(spec),
        step_tokens=options.step_tokens,
    )
    cache = options.cache_bytes or min(plan.cache_bytes, free * MAX_CACHE_SHARE[options.device])
    return plan.weight_bytes + plan.workspace_bytes + cache


def _engine_dtype(spec: ModelSpec, options: EngineOptions) -> str:
    """The dtype that an engine loads weights in."""
    if options.dtype != "auto":
        return options.dtype
    return "float32" if spec.dtype == "float16" else spec.dtype


def _cache_options(options: EngineOptions) -> dict[str, Any]:
    names = ("cache_dtype", "cache_recent", "cache_hadamard")
    return {name: getattr(options, name) for name in names}


def free_memory(device: str) -> int:
    """Bytes that engines on ``device`` can still have."""
    if device == "cpu":
        return cpu_free()
    import torch

    return torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else cpu_free()


def engine_threads(engine: Engine) -> int:
    """CPU threads the engine's backend computes with."""
    if engine.backend_name == "native":
        if engine.options.threads is not None:
            return engine.options.threads
        from skimp.kernels import native

        return native.get_threads()
    import torch

    return torch.get_num_threads()
