"""Programmatic dependent launch, where a kernel starts while the one before it in the stream ends,
and the processors there are to launch on."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Nothing that an earlier kernel wrote may be read, and nothing written, before this; what the
    host sent, and weights, may be."""
    if PDL:
        gdc_wait()


@triton.jit
def let_next_start(PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()


@functools.cache
def use_pdl(device: torch.device) -> bool:
    """It exists from compute capability 9 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; a few elsewhere, where the interpreter runs the kernels."""
    if device.type != "cuda":
        return 2
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
