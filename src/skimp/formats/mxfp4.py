"""Experts in MXFP4, as gpt-oss is published (``quant_method`` mxfp4): read, never written.

The format is that of the OCP Microscaling specification (1.0, 2023): 32 inputs in a row share one
scale, a power of two (E8M0, exponent plus 127), and each has four bits, sign, two of exponent and
one of mantissa (E2M1). A dense tensor [experts, inputs, outputs] is stored as ``<name>_blocks``
uint8 [experts, outputs, inputs / 32, 16], the even input in the low half of a byte, and
``<name>_scales`` uint8 [experts, outputs, inputs / 32]. Every such number is one of bfloat16's, so
they become that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from skimp.errors import CheckpointError
from skimp.formats.checkpoints import Part, names, refuse_others

METHOD: Final = "mxfp4"
GROUP: Final = 32
MAGNITUDES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BIAS: Final = 127
NAN: Final = 255
BLOCKS, SCALES = "blocks", "scales"


def is_named(config: Any) -> bool:
    """Whether a ``quantization_config`` is of this kind."""
    return isinstance(config, dict) and config.get("quant_method") == METHOD


def check_config(config: Mapping[str, Any]) -> None:
    """Every field is known, or a ConfigError names it. Which experts are dense all the same, the
    tensors themselves say."""
    refuse_others(config, {"quant_method", "modules_to_not_convert"})
    names("modules_to_not_convert", config.get("modules_to_not_convert"))


def parts(shape: tuple[int, ...]) -> dict[str, Part]:
    """The tensors of a dense one [E, K, N], by the end of their names behind an underscore."""
    e, k, n = shape
    groups = -(-k // GROUP)
    return {
        BLOCKS: Part(((e, n, groups, GROUP // 2),), (torch.uint8,), required=False),
        SCALES: Part(((e, n, groups),), (torch.uint8,), required=False),
    }


def decode(shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> Tensor:
    """bfloat16 [E, K, N] of :func:`parts`, exactly; in memory inputs come last, as in the file and
    as products want them. Raises CheckpointError naming a wrong part."""
    e, k, n = shape
    if k % GROUP:
        raise CheckpointError(f"blocks: {k} inputs are no multiple of {GROUP}")
    blocks, scales = tensors[BLOCKS], tensors[SCALES]
    if bool((scales == NAN).any()):
        raise CheckpointError("scales: one is not a number")
    pairs = _pairs()
    out = torch.empty(e, n, k, dtype=torch.bfloat16)
    for target, block, scale in zip(out, blocks, scales):  # an expert at a time: bytes grow to ints
        numbers = pairs.index_select(0, block.to(torch.int32).flatten()).view(torch.bfloat16)
        powers = torch.ldexp(torch.ones(scale.shape), scale.to(torch.int32) - BIAS)
        powers = powers.to(torch.bfloat16)
        numbers = numbers.view(*scale.shape, GROUP)
        torch.mul(numbers, powers[..., None], out=target.unflatten(-1, (-1, GROUP)))
    return out.transpose(1, 2)


def _pairs() -> Tensor:
    """The two bfloat16 numbers of each byte, as the int32 that holds them."""
    numbers = torch.tensor((*MAGNITUDES, *(-m for m in MAGNITUDES)), dtype=torch.bfloat16)
    byte = torch.arange(256)
    return torch.stack((numbers[byte & 15], numbers[byte >> 4]), dim=-1).view(torch.int32)[:, 0]
