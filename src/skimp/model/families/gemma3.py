"""The text part of multimodal Gemma 3: its config is ``text_config``, its tensors are prefixed.

The spec that comes out is a ``gemma3_text`` one; images are not read, and what is written back
is a text model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skimp.errors import ConfigError, shown
from skimp.model.families import gemma3_text
from skimp.model.families.gemma3_text import tensor_names, to_config
from skimp.model.spec import ModelSpec

__all__ = ["stored_name", "tensor_names", "to_config", "to_spec"]

# Fields of the wrapper that hold for the text model unless it says otherwise itself.
SHARED = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")
OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "embed_vision.")


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise ConfigError(f"gemma3 config: text_config must be an object, got {shown(text)}")
    if text.get("model_type", "gemma3_text") != "gemma3_text":
        raise ConfigError(
            f"gemma3 config: text_config.model_type={shown(text['model_type'])}, not 'gemma3_text'"
        )
    merged = {name: config[name] for name in SHARED if name in config}
    for name in ("quantization_config", "tie_word_embeddings"):
        if config.get(name) is not None:
            merged[name] = config[name]
    merged |= text
    if {"dtype", "torch_dtype"} & set(text):
        for name in {"dtype", "torch_dtype"} - set(text):
            merged.pop(name, None)
    merged.pop("architectures", None)  # the wrapper's class, not the text model's
    return gemma3_text.read_text(merged, gemma3_text.DEFAULTS)


def stored_name(name: str, spec: ModelSpec) -> str | None:
    """Either of the two prefixes that transformers has used over time → the text model's names."""
    for prefix in ("language_model.model.", "model.language_model."):
        if name.startswith(prefix):
            return gemma3_text.stored_name("model." + name.removeprefix(prefix), spec)
    bare = name.removeprefix("model.")
    if bare.startswith(OTHER_PARTS):
        return None
    return gemma3_text.stored_name(name.removeprefix("language_model."), spec)
