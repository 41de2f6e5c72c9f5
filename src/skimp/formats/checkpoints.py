"""The spellings of low-bit matrices in checkpoints, by ``quant_method``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast

import torch
from torch import Tensor

from skimp.errors import ConfigError, shown
from skimp.formats.weight import QuantizedWeight, WeightFormat

SCALE_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
SPELLINGS: Final = {
    "compressed-tensors": "compressed_tensors",
    "gptq": "gptq",
    "awq": "awq",
}


@dataclass(frozen=True)
class Part:
    """What a tensor of a matrix may be."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    required: bool = True


class Spelling(Protocol):
    """What the module of a spelling offers."""

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
    if not isinstance(method, str) or method not in SPELLINGS:
        known = ", ".join(SPELLINGS)
        raise ConfigError(
            f"quantization_config: quant_method={shown(method)} is not supported (known: {known})"
        )
    return cast(Spelling, importlib.import_module(f"skimp.formats.{SPELLINGS[method]}"))
