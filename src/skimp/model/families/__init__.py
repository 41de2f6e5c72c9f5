"""Families: one thin file each, named after the Hugging Face ``model_type`` it adapts.

A family turns a ``config.json`` into a :class:`~skimp.model.spec.ModelSpec`, turns a spec back
into a config that transformers loads, and maps our tensor names to the stored ones. To add one,
write its module (see ``llama.py``) and name it in :data:`MODEL_TYPES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, cast

from skimp.errors import ConfigError
from skimp.model.families.reader import shown
from skimp.model.spec import ModelSpec

MODEL_TYPES = ("cwm", "gemma2", "gemma3", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")


class Family(Protocol):
    """What a family module offers."""

    def to_spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """Read a config; every field is honoured, known not to matter, or a ConfigError."""
        ...

    def to_config(self, spec: ModelSpec) -> dict[str, Any]:
        """The config ``to_spec`` reads back as ``spec``; ConfigError if the class cannot say it."""
        ...

    def tensor_names(self, spec: ModelSpec) -> Mapping[str, str]:
        """Our parameter name → the checkpoint's, one to one."""
        ...

    def stored_name(self, name: str) -> str | None:
        """A name found in a file → the one ``tensor_names`` uses; None for what is not ours."""
        ...


def family(model_type: str) -> Family:
    """The family module of a ``model_type``, imported on first use."""
    if model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise ConfigError(f"model_type={shown(model_type)} is not supported (known: {known})")
    module = importlib.import_module(f"{__name__}.{model_type}")
    return cast(Family, module)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family a config names."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError(f"model_type must be a string, got {shown(model_type)}")
    return family(model_type)


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a ``config.json``."""
    return family_of(config).to_spec(config)


def to_config(spec: ModelSpec) -> dict[str, Any]:
    """A ``config.json`` for the spec, in the spelling both transformers 4 and 5 read."""
    return family(spec.family).to_config(spec)


def tensor_names(spec: ModelSpec) -> Mapping[str, str]:
    """Our parameter name → the checkpoint's, one to one."""
    return family(spec.family).tensor_names(spec)
