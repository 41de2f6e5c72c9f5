"""The spellings of low-bit matrices in checkpoints, by ``quant_method``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast

import torch
from torch import Tensor

from skimp.errors import ConfigError, shown
from skimp.formats.weight import QuantizedWeight, WeightFormat

SCALE_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
METHODS: Final = ("compressed-tensors", "gptq", "awq", "mxfp4")


@dataclass(frozen=True)
class Part:
    """What a tensor of a matrix may be. ``instead`` names a part that may take its place."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    required: bool = True
    instead: str | None = None


class Spelling(Protocol):
    """How one ``quant_method`` writes its config and its tensors."""

    def read_config(
        self, config: Mapping[str, Any], modules: Mapping[str, str]
    ) -> tuple[dict[str, WeightFormat], str | None]:
        """Formats of the matrices and of the cache; ``modules`` maps our matrix names to the
        checkpoint's. Every field is honoured, or a ConfigError names it."""
        ...

    def parts(self, form: WeightFormat, shape: tuple[int, int]) -> dict[str, Part]:
        """The tensors of a matrix [N, K] by the end of their names."""
        ...

    def decode(
        self, form: WeightFormat, shape: tuple[int, int], tensors: Mapping[str, Tensor]
    ) -> QuantizedWeight | Tensor:
        """The matrix that the parts stand for; dense, float32, where no format of ours can hold
        it. Raises CheckpointError naming a part that is wrong."""
        ...


def spelling(config: Any) -> Spelling:
    """The spelling that a ``quantization_config`` names."""
    method = config.get("quant_method") if isinstance(config, dict) else config
    if method == "compressed-tensors":
        from skimp.formats import compressed_tensors

        return cast(Spelling, compressed_tensors)
    if method == "gptq":
        from skimp.formats import gptq

        return gptq.spelling(config)
    if method == "awq":
        from skimp.formats import awq

        return cast(Spelling, awq)
    raise refuse(f"quant_method={shown(method)} is not supported (known: {', '.join(METHODS)})")


# ---- what the readers of configs share --------------------------------------------------------


def refuse(message: str) -> ConfigError:
    return ConfigError(f"quantization_config: {message}")


def refuse_others(config: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse a field that is set and that nobody has read."""
    for field, value in config.items():
        if field not in known and not is_unset(value):
            raise refuse(f"{field}={shown(value)} is not supported")


def is_unset(value: Any) -> bool:
    """Whether a field's value asks for nothing."""
    return value is None or value is False or value in ({}, [], "")


def names(where: str, value: Any) -> list[str]:
    """A list of names; none if the field is unset."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise refuse(f"{where} must be a list of names, got {shown(value)}")
    return value


def group_size(where: str, value: Any) -> int | None:
    """Inputs that share a scale; -1 stands for all of them."""
    if type(value) is not int or (value < 1 and value != -1):
        raise refuse(f"{where}={shown(value)} is neither -1 nor a positive integer")
    return None if value == -1 else value


def converted(
    modules: Mapping[str, str], *, skipped: Collection[str], lm_head: bool = False
) -> list[str]:
    """Our names of the matrices that GPTQ and AWQ tools convert: those of the layers, and the
    output matrix if asked; but none whose name contains one of ``skipped``."""
    return [
        ours
        for ours, theirs in modules.items()
        if (ours.startswith("layers.") or (lm_head and ours == "lm_head"))
        and not any(part in theirs for part in skipped)
    ]
