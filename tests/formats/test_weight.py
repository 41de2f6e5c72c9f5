"""What a low-bit matrix stands for, and rounding to it."""

from __future__ import annotations

import pytest
import torch

from skimp.formats import QuantizedWeight, WeightFormat, quantize, round_to
from skimp.kernels.lowbit import lowbit_linear, round_rows

FORMATS = [
    WeightFormat(kind="int", bits=8),
    WeightFormat(kind="int", bits=8, group_size=32, symmetric=False),
    WeightFormat(kind="int", bits=4),
    WeightFormat(kind="int", bits=4, group_size=32),
    WeightFormat(kind="int", bits=4, group_size=128, symmetric=False),
    WeightFormat(kind="float", bits=8),
]


def by_hand(weight: QuantizedWeight) -> torch.Tensor:
    """The definition, one number at a time."""
    n, k = weight.shape
    size = weight.format.group_size or k
    out = torch.empty(n, k, dtype=torch.float64)
    for i in range(n):
        for j in range(k):
            if weight.format.bits == 4:
                byte = int(weight.values[i, j // 2])
                q = float((byte & 15 if j % 2 == 0 else byte >> 4) - 8)
            else:
                q = float(weight.values[i, j])
            zero = 0 if weight.zero is None else int(weight.zero[i, j // size])
            out[i, j] = (q - zero) * float(weight.scale[i, j // size])
    return out


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("k", [64, 75])
def test_a_matrix_stands_for_its_definition(form: WeightFormat, k: int) -> None:
    torch.manual_seed(0)
    dense = torch.randn(5, k)
    weight = quantize(dense, form)
    torch.testing.assert_close(weight.dequantize().double(), by_hand(weight))
    step = weight.scale.float().amax()
    worst = step * (16 if form.kind == "float" else 0.51 if form.symmetric else 1.01)
    assert (weight.dequantize() - dense).abs().max() <= worst
    index = torch.tensor([3, 0])
    assert torch.equal(weight.rows(index).dequantize(), weight.dequantize()[index])
    again = round_to(weight.dequantize(), form, weight.scale, weight.zero)
    assert torch.equal(again.stored(), weight.stored())


def test_bits_are_counted_with_scales() -> None:
    int4 = WeightFormat(kind="int", bits=4, group_size=128)
    assert int4.bits_per_weight(4096) == 4.125
    assert WeightFormat(kind="int", bits=4, group_size=32).bits_per_weight(4096) == 4.5
    asym = WeightFormat(kind="int", bits=4, group_size=128, symmetric=False)
    assert asym.bits_per_weight(4096) == pytest.approx(4.15625)
    dense = torch.randn(64, 4096).bfloat16()
    assert quantize(dense, int4).nbytes * 8 == 4.125 * dense.numel()


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("bits", {"kind": "int", "bits": 3}),
        ("bits", {"kind": "float", "bits": 4}),
        ("group_size", {"kind": "int", "bits": 4, "group_size": 0}),
        ("symmetric", {"kind": "float", "bits": 8, "symmetric": False}),
        ("activations", {"kind": "int", "bits": 8, "activations": "int4"}),
    ],
)
def test_impossible_formats_are_refused(field: str, given: dict) -> None:
    with pytest.raises(ValueError, match=field):
        WeightFormat(**given)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_rows_are_rounded_each_for_itself(kind: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(4, 96) * torch.tensor([[1.0], [100.0], [1e-3], [0.0]])
    rounded = round_rows(x, kind)
    assert torch.equal(rounded[3], x[3])
    for row, told in zip(x[:3], rounded):
        assert torch.equal(round_rows(row[None], kind)[0], told)
        bound = row.abs().max() * (0.5 / 127 if kind == "int8" else 2**-4)
        assert (row - told).abs().max() <= bound * 1.0001


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_products(form: WeightFormat) -> None:
    torch.manual_seed(2)
    weight, x = quantize(torch.randn(7, 75), form), torch.randn(3, 75)
    wanted = x.double() @ weight.dequantize().double().T
    torch.testing.assert_close(lowbit_linear(x, weight).double(), wanted, rtol=1e-5, atol=1e-4)
    apart = torch.cat([lowbit_linear(row[None], weight) for row in x])
    assert torch.equal(lowbit_linear(x, weight, split_rows=True), apart)
