"""What the meter and the commands need to know of a model or an engine to price its steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from skimp.cost import ModelWork, model_work

if TYPE_CHECKING:
    from skimp.engine import Engine
    from skimp.model.spec import ModelSpec


def spec_work(spec: ModelSpec, dtype: str | None = None) -> ModelWork:
    """The work of a model that is only described; ``dtype`` defaults to its checkpoint's."""
    import torch

    from skimp.model.mixers.attention import cache_spec

    dtype = spec.dtype if dtype is None else dtype
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"dtype: {dtype!r} is not a dtype")
    caches = [cache_spec(layer.mixer, kind) for layer in spec.layers]
    return model_work(spec, caches, dtype=dtype)


def engine_threads(engine: Engine) -> int:
    """CPU threads the engine's backend computes with."""
    if engine.backend_name == "native":
        if engine.options.threads is not None:
            return engine.options.threads
        from skimp.kernels import native

        return native.get_threads()
    import torch

    return torch.get_num_threads()
