"""The Triton products against the matrices they stand for: on a GPU where there is one, and
elsewhere in Triton's interpreter (float32 rows: it is not to be trusted with bfloat16 products)."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
triton = pytest.importorskip("triton")

from skimp.formats import WeightFormat, quantize  # noqa: E402 (after the interpreter is chosen)
from skimp.kernels.triton.lowbit import lowbit_matmul  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = [
    WeightFormat(kind="int", bits=8),
    WeightFormat(kind="int", bits=8, group_size=64, symmetric=False),
    WeightFormat(kind="int", bits=4),
    WeightFormat(kind="int", bits=4, group_size=32),
    WeightFormat(kind="int", bits=4, group_size=128, symmetric=False),
    WeightFormat(kind="float", bits=8),
]
SHAPES = [(1, 40, 96), (3, 33, 200), (20, 70, 130)]


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def _case(form: WeightFormat, m: int, n: int, k: int):
    generator = torch.Generator().manual_seed(m * n + k)
    weight = quantize(torch.randn(n, k, generator=generator) * 0.1, form)
    x = torch.randn(m, k, generator=generator)
    moved = type(weight)(
        format=form,
        in_features=k,
        values=weight.values.to(DEVICE),
        scale=weight.scale.to(DEVICE),
        zero=None if weight.zero is None else weight.zero.to(DEVICE),
    )
    return x.to(DEVICE), moved


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_float_rows(form: WeightFormat, m: int, n: int, k: int) -> None:
    x, weight = _case(form, m, n, k)
    wanted = x.double() @ weight.dequantize().double().T
    assert _relative(lowbit_matmul(x, weight), wanted) < 1e-6
    if DEVICE == "cuda":
        half = x.bfloat16()
        wanted = half.double() @ weight.dequantize().double().T
        assert _relative(lowbit_matmul(half, weight), wanted) < 1e-6


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("form", FORMATS[:-1], ids=lambda form: form.name)
def test_int8_rows(form: WeightFormat, m: int, n: int, k: int) -> None:
    x, weight = _case(form, m, n, k)
    row_scale = x.abs().amax(1) / 127
    rounded = (x / row_scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    exact = rounded.double() * row_scale[:, None].double()
    wanted = exact @ weight.dequantize().double().T
    assert _relative(lowbit_matmul(rounded, weight, row_scale), wanted) < 1e-6


def test_rows_do_not_touch_each_other() -> None:
    x, weight = _case(FORMATS[3], 3, 33, 200)
    together = lowbit_matmul(x, weight)
    alone = torch.cat([lowbit_matmul(row[None], weight) for row in x])
    assert torch.equal(together, alone)


def test_an_odd_group_is_refused() -> None:
    x, weight = _case(WeightFormat(kind="int", bits=4, group_size=33), 1, 4, 66)
    with pytest.raises(ValueError, match="group_size"):
        lowbit_matmul(x, weight)
