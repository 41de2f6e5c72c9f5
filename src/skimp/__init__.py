"""Serve large language models cheaply, and say honestly what the cheapness costs.

    from skimp import Engine, SamplingParams

    engine = Engine.load("tales")
    for output in engine.stream("Once upon a time", SamplingParams(max_tokens=100, seed=7)):
        print(output.delta, end="", flush=True)

Importing this package is cheap; PyTorch is imported when the first of its names is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skimp.decoding.params import SamplingParams
    from skimp.engine import AsyncEngine, Completion, Engine, EngineOptions, RequestOutput
    from skimp.errors import SkimpError

__version__ = "0.1.0"

_HOMES = {
    "AsyncEngine": "skimp.engine",
    "Completion": "skimp.engine",
    "Engine": "skimp.engine",
    "EngineOptions": "skimp.engine",
    "RequestOutput": "skimp.engine",
    "SamplingParams": "skimp.decoding.params",
    "SkimpError": "skimp.errors",
}

__all__ = [
    "AsyncEngine",
    "Completion",
    "Engine",
    "EngineOptions",
    "RequestOutput",
    "SamplingParams",
    "SkimpError",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'skimp' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
