"""Families: one thin file each, named after the Hugging Face ``model_type`` it adapts.

A family turns a ``config.json`` into a :class:`~skimp.model.spec.ModelSpec`, turns a spec back
into a config that transformers loads, and maps our tensor names to the stored ones. To add one,
write its module (see ``llama.py``) and name it in :data:`MODEL_TYPES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, cast

from skimp.errors import ConfigError, shown
from skimp.formats import mxfp4
from skimp.formats.checkpoints import spelling
from skimp.model.spec import ExpertsSpec, ModelSpec

MODEL_TYPES = (
    "cwm",
    "deepseek_v2",
    "deepseek_v3",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gpt_oss",
    "llama",
    "minicpm3",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "youtu",
)


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

    def stored_name(self, name: str, spec: ModelSpec) -> str | None:
        """A name found in a file → the one ``tensor_names`` uses; None for what is not the
        spec's."""
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
    """The spec of a ``config.json``, low-bit formats included."""
    quantization = config.get("quantization_config")
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    spec = family_of(config).to_spec(plain)
    if not quantization:
        return spec
    if mxfp4.is_named(quantization):
        mxfp4.check_config(quantization)
        if not all(isinstance(x.ffn, ExpertsSpec) and x.ffn.fused for x in spec.layers):
            raise ConfigError(
                "quantization_config: quant_method='mxfp4' is read where all experts of a layer "
                f"lie in two tensors, and those of {spec.family} do not"
            )
        return spec  # they become bfloat16 as they are read
    formats, cache = spelling(quantization).read_config(quantization, _modules(spec))
    return replace(spec, formats=formats, cache_format=cache)


def to_config(spec: ModelSpec) -> dict[str, Any]:
    """A ``config.json`` for the spec, in the spelling both transformers 4 and 5 read; low-bit
    formats are written as compressed-tensors."""
    config = family(spec.family).to_config(replace(spec, formats={}, cache_format=None))
    if spec.formats or spec.cache_format is not None:
        from skimp.formats import compressed_tensors

        modules = _modules(spec)
        written = compressed_tensors.write_config(spec.formats, spec.cache_format, modules)
        back = compressed_tensors.read_config(written, modules)
        if back != (dict(spec.formats), spec.cache_format):
            raise ConfigError("quantization_config: compressed-tensors cannot express the formats")
        config["quantization_config"] = written
    return config


def tensor_names(spec: ModelSpec) -> Mapping[str, str]:
    """Our parameter name → the checkpoint's, one to one."""
    return family(spec.family).tensor_names(spec)


def _modules(spec: ModelSpec) -> dict[str, str]:
    """Our matrix name → the checkpoint's module name."""
    return {
        ours.removesuffix(".weight"): theirs.removesuffix(".weight")
        for ours, theirs in tensor_names(spec).items()
        if is_matrix(ours)
    }


def is_matrix(name: str) -> bool:
    """Whether a parameter of ours is a matrix that can have a low-bit format."""
    return name.endswith((".weight",)) and "norm" not in name
