"""The engines by name: which class, which model files, which options."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class EngineEntry:
    """One engine with one weight format.

    Attributes:
        module: module under `rivals`, imported only in the worker process.
        name: class in that module.
        files: format made by `rivals.artifacts`.
        options: passed to the class.
        weights: weight format, for the report.
        probe_environment: set while the engine is probed for its kernels (not while timed).
    """

    module: str
    name: str
    files: str
    weights: str
    options: dict[str, Any] = field(default_factory=dict)
    probe_environment: dict[str, str] = field(default_factory=dict)


REGISTRY: dict[str, EngineEntry] = {
    "skimp": EngineEntry(module="skimp_cli", name="SkimpCommand", files="hf", weights="bf16"),
    **{
        files: EngineEntry(module="skimp_cli", name="SkimpCommand", files=files, weights=weights)
        for files, weights in {
            "skimp-int8": "int8 per channel",
            "skimp-int8-a8": "int8 per channel, inputs int8",
            "skimp-int4": "int4 in groups of 32, output matrix int8",
            "skimp-int4-a8": "int4 in groups of 32, output matrix int8, inputs int8",
            "skimp-int4-whole": "int4 in groups of 32, output matrix too",
            "skimp-int4-whole-a8": "int4 in groups of 32, output matrix too, inputs int8",
        }.items()
    },
    "llama.cpp-bf16": EngineEntry(
        module="llama_cpp_engine", name="LlamaCpp", files="gguf-bf16", weights="bf16"
    ),
    "llama.cpp-q8_0": EngineEntry(
        module="llama_cpp_engine", name="LlamaCpp", files="gguf-q8_0", weights="Q8_0"
    ),
    "llama.cpp-q4_0": EngineEntry(
        module="llama_cpp_engine", name="LlamaCpp", files="gguf-q4_0", weights="Q4_0"
    ),
    "openvino-bf16": EngineEntry(
        module="openvino_engine",
        name="OpenVino",
        files="openvino-bf16",
        weights="bf16, bf16 cache",
        options={"cache_precision": "bf16"},
    ),
    "openvino-bf16-u8cache": EngineEntry(
        module="openvino_engine",
        name="OpenVino",
        files="openvino-bf16",
        weights="bf16, u8 cache",
        options={"cache_precision": "u8"},
    ),
    "openvino-int8": EngineEntry(
        module="openvino_engine",
        name="OpenVino",
        files="openvino-int8",
        weights="int8, u8 cache",
        options={"cache_precision": "u8"},
    ),
    "openvino-int4": EngineEntry(
        module="openvino_engine",
        name="OpenVino",
        files="openvino-int4",
        weights="int4, u8 cache",
        options={"cache_precision": "u8"},
    ),
    "onnxruntime-int4": EngineEntry(
        module="onnx_genai_engine",
        name="OnnxGenAI",
        files="onnx-int4",
        weights="int4 in blocks of 32",
    ),
    "transformers-bf16": EngineEntry(
        module="transformers_engine",
        name="Transformers",
        files="hf",
        weights="bf16",
        probe_environment={"ONEDNN_VERBOSE": "1"},
    ),
}
SKIMP = tuple(name for name, entry in REGISTRY.items() if entry.module == "skimp_cli")
DEFAULT_ENGINES = ("skimp", "llama.cpp-bf16", "openvino-bf16", "transformers-bf16")


def engine_class(name: str) -> Any:
    """Import the class of engine ``name``.

    Raises:
        ImportError: a package it needs is not installed.
    """
    entry = REGISTRY[name]
    return getattr(importlib.import_module(f"rivals.{entry.module}"), entry.name)
