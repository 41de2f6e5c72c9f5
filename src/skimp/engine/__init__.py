"""Serving: requests, the scheduler, the runner and the engine that ties them together.

Public names: :class:`Engine`, :class:`AsyncEngine`, :class:`EngineOptions`, and what they return.
"""

from skimp.engine.async_engine import AsyncEngine
from skimp.engine.engine import Engine
from skimp.engine.options import EngineOptions
from skimp.engine.request import Completion, Metrics, RequestOutput

__all__ = [
    "AsyncEngine",
    "Completion",
    "Engine",
    "EngineOptions",
    "Metrics",
    "RequestOutput",
]
