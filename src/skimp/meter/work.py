"""What the meter and the commands need to know of a model or an engine to price its steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skimp.cost import ModelWork, model_work

if TYPE_CHECKING:
    from skimp.engine import Engine
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


def engine_threads(engine: Engine) -> int:
    """CPU threads the engine's backend computes with."""
    if engine.backend_name == "native":
        if engine.options.threads is not None:
            return engine.options.threads
        from skimp.kernels import native

        return native.get_threads()
    import torch

    return torch.get_num_threads()
