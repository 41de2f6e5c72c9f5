"""From what the user typed to a spec or an engine: the one place that knows how."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skimp.engine import Engine
    from skimp.engine.options import EngineOptions
    from skimp.model.spec import ModelSpec


def load_engine(model: str, options: EngineOptions) -> Engine:
    """The engine of a model that has weights."""
    from skimp.engine import Engine

    return Engine.load(model, options)


def random_engine(config: str, options: EngineOptions, *, seed: int = 0) -> Engine:
    """An engine with random weights of a ``config.json``'s shape; it has no tokenizer."""
    from skimp.engine import Engine
    from skimp.model.loading import random_decoder

    spec = config_spec(Path(config))
    dtype: str = options.dtype
    if dtype == "auto":
        dtype = "float32" if spec.dtype == "float16" else _float_name(spec.dtype)
    decoder = random_decoder(spec, seed=seed, dtype=dtype)
    return Engine(decoder, tokenizer=None, options=options)


def chat_encoder(engine: Engine) -> Callable[[list[dict[str, str]]], list[int]]:
    """A function from a conversation to the token ids that an answer is to follow."""
    from skimp.text.chat import encode_chat, template_for

    tokenizer = engine.tokenizer
    assert tokenizer is not None
    template = template_for(tokenizer)
    return lambda messages: encode_chat(tokenizer, template, messages)


def model_spec(model: str) -> ModelSpec:
    """The spec of a model, or of a ``config.json`` that is named itself."""
    path = Path(model).expanduser()
    if path.suffix == ".json" or path.is_file():
        return config_spec(path)
    from skimp.model.loading import load_spec
    from skimp.model.locate import locate_model

    return load_spec(locate_model(model))


def config_spec(path: Path) -> ModelSpec:
    """The spec of a ``config.json`` by any name, alone or with other files beside it."""
    from skimp.errors import ConfigError
    from skimp.model import families
    from skimp.model.checkpoint import read_json

    if path.is_dir():
        path = path / "config.json"
    if not path.exists():
        raise FileNotFoundError(2, "no such file", str(path))
    try:
        return families.to_spec(read_json(path))
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if str(path) in message else f"{path}: {message}") from error


def _float_name(dtype: str) -> str:
    return "float32" if dtype == "float32" else "bfloat16"
