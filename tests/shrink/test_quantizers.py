"""The methods alone: what they promise about a matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from skimp.formats.weight import QuantizedWeight, WeightFormat, quantize, spread
from skimp.shrink.quantize.awq import product_loss, search_factors
from skimp.shrink.quantize.gptq import gptq
from skimp.shrink.quantize.hqq import hqq, shrink
from skimp.shrink.quantize.rtn import moment_blocks, rtn, search_scales
from skimp.shrink.quantize.statistics import Inputs

INT4 = WeightFormat(kind="int", bits=4, group_size=32)
INT4_ASYM = WeightFormat(kind="int", bits=4, group_size=32, symmetric=False)
INT8 = WeightFormat(kind="int", bits=8)
FP8 = WeightFormat(kind="float", bits=8)
FORMATS = pytest.mark.parametrize("form", [INT4, INT4_ASYM, INT8, FP8], ids=lambda f: f.name)


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(
        rows, columns, generator=generator
    )


def correlated_inputs(width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    loud = torch.exp(torch.randn(width, generator=generator))
    return torch.randn(4 * width, width, generator=generator) @ mix * loud


def moments_of(x: Tensor) -> Tensor:
    inputs = Inputs(x.shape[1])
    for part in x.split(50):
        inputs.add(part)
    return inputs.moments


def loss(matrix: QuantizedWeight, weight: Tensor, moments: Tensor) -> float:
    return product_loss(matrix.dequantize() - weight, moments)


def squared(matrix: QuantizedWeight, weight: Tensor) -> float:
    return float((matrix.dequantize() - weight).square().sum())


def test_inputs_are_moments() -> None:
    x = correlated_inputs(32)
    inputs = Inputs(32)
    for part in x.split(7):
        inputs.add(part)
    exact = x.double().T @ x.double() / len(x)
    assert torch.allclose(inputs.moments, exact, rtol=1e-5, atol=1e-6)
    assert torch.allclose(inputs.magnitude, x.double().abs().mean(0))


@FORMATS
def test_searched_scales_beat_the_range(form: WeightFormat) -> None:
    weight = heavy_tailed(40, 96)
    assert squared(rtn(weight, form), weight) < squared(quantize(weight, form), weight)


@FORMATS
def test_short_last_group_and_zeros(form: WeightFormat) -> None:
    weight = heavy_tailed(6, 80)
    weight[1] = 0
    weight[2, 64:] = 0
    for matrix in (rtn(weight, form), hqq(weight, form)):
        assert matrix.shape == (6, 80)
        assert torch.equal(matrix.dequantize()[1], torch.zeros(80))
        assert torch.equal(matrix.dequantize()[2, 64:], torch.zeros(16))
        assert float((matrix.dequantize() - weight).abs().max()) < 0.5


def test_scales_are_judged_as_stored() -> None:
    matrix = rtn(heavy_tailed(8, 64), INT4, scale_dtype=torch.bfloat16)
    assert matrix.scale.dtype == torch.bfloat16


def test_importance_moves_the_error_to_quiet_inputs() -> None:
    weight, x = heavy_tailed(32, 64), correlated_inputs(64)
    moments = moments_of(x)
    plain = rtn(weight, INT4)
    blocks = moment_blocks(moments, INT4)
    asked = rtn(weight, INT4, importance=blocks)
    inside = torch.block_diag(*blocks)  # what a group alone can see
    assert loss(asked, weight, inside) < loss(plain, weight, inside)


def test_moment_blocks_are_the_diagonal_blocks() -> None:
    moments = moments_of(correlated_inputs(80))
    blocks = moment_blocks(moments, INT4)
    assert blocks.shape == (3, 32, 32)
    assert torch.equal(blocks[1], moments[32:64, 32:64])
    assert torch.equal(blocks[2, :16, :16], moments[64:, 64:])
    assert float(blocks[2, 16:].abs().sum() + blocks[2, :, 16:].abs().sum()) == 0
    assert torch.equal(moment_blocks(moments, INT8), moments.diagonal())


@pytest.mark.parametrize("form", [INT4, INT4_ASYM], ids=lambda f: f.name)
def test_hqq_betters_the_searched_scales(form: WeightFormat) -> None:
    weight = heavy_tailed(64, 128)
    weight[::7, ::11] *= 6

    def errors(matrix: QuantizedWeight) -> Tensor:
        return (matrix.dequantize() - weight).square().unflatten(1, (-1, 32)).sum(-1)

    before, after = errors(rtn(weight, form)), errors(hqq(weight, form))
    assert bool((after <= before * (1 + 1e-6)).all())
    assert float(after.sum()) < float(before.sum())


def test_shrinkage_is_the_proximal_step() -> None:
    x = torch.linspace(-2, 2, 41)
    y = shrink(x, 10.0, 0.7)
    assert float(y[20]) == 0 and bool((y.abs() <= x.abs()).all()) and bool((y * x >= 0).all())
    assert torch.allclose(y[-1], torch.tensor(2 - 2**-0.3 / 10))


def reference_gptq(
    weight: np.ndarray, hessian: np.ndarray, scale: np.ndarray, zero: np.ndarray, order: np.ndarray
) -> np.ndarray:
    """Column by column with the explicit inverse of what is left of H: OBQ in a fixed order."""
    w, q = weight.astype(np.float64).copy(), np.zeros_like(weight, dtype=np.float64)
    left = list(order)
    while left:
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        column = left[0]
        raw = np.clip(np.round(w[:, column] / scale[:, column] + zero[:, column]), -8, 7)
        q[:, column] = (raw - zero[:, column]) * scale[:, column]
        error = (w[:, column] - q[:, column]) / inverse[0, 0]
        w[:, left] -= np.outer(error, inverse[0])
        left = left[1:]
    return q


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("form", [INT4, INT4_ASYM], ids=lambda f: f.name)
def test_gptq_is_the_reference(form: WeightFormat, act_order: bool) -> None:
    weight, moments = heavy_tailed(12, 64), moments_of(correlated_inputs(64))
    found = gptq(weight, form, moments, act_order=act_order, block=24)
    hessian = moments.numpy().copy()
    hessian[np.diag_indices(64)] += 0.01 * np.diag(hessian).mean()
    order = np.argsort(-moments.diagonal().numpy(), kind="stable") if act_order else np.arange(64)
    scale = spread(found.scale, 32, 64).double().numpy()
    zero = np.zeros_like(scale)
    if found.zero is not None:
        zero = spread(found.zero.double(), 32, 64).numpy()
    wanted = reference_gptq(weight.numpy(), hessian, scale, zero, order)
    # Single precision may take another way at a tie.
    assert np.mean(np.abs(found.dequantize().numpy() - wanted) > 1e-5) < 0.01


@FORMATS
def test_gptq_beats_nearest_on_correlated_inputs(form: WeightFormat) -> None:
    weight, moments = heavy_tailed(24, 96), moments_of(correlated_inputs(96))
    nearest = rtn(weight, form, importance=moment_blocks(moments, form))
    assert loss(gptq(weight, form, moments), weight, moments) < 0.8 * loss(nearest, weight, moments)


def test_gptq_scales_are_those_of_the_unsorted_matrix() -> None:
    weight, moments = heavy_tailed(8, 64), moments_of(correlated_inputs(64))
    scale, _ = search_scales(weight, INT4, importance=moment_blocks(moments.float(), INT4))
    assert torch.equal(gptq(weight, INT4, moments).scale, scale)


def test_dead_inputs_get_no_weight() -> None:
    x = correlated_inputs(64)
    x[:, [3, 40]] = 0
    matrix = gptq(heavy_tailed(8, 64), INT4, moments_of(x))
    assert float(matrix.dequantize()[:, [3, 40]].abs().sum()) == 0
    assert bool(matrix.dequantize().isfinite().all())


def test_gptq_reports_each_fallback() -> None:
    weight, notes = heavy_tailed(8, 64), []
    x = correlated_inputs(64)
    gptq(weight, INT4, moments_of(x), note=notes.append)
    assert notes == []
    indefinite = moments_of(x)
    indefinite -= 0.05 * indefinite.diagonal().mean() * torch.eye(64)
    gptq(weight, INT4, indefinite, note=notes.append)
    assert len(notes) == 1 and "damping" in notes[0]
    hopeless = moments_of(x) - 5 * moments_of(x).diagonal().mean() * torch.eye(64)
    matrix = gptq(weight, INT4, hopeless, note=notes.append)
    assert "nearest" in notes[-1] and bool(matrix.dequantize().isfinite().all())


@pytest.mark.parametrize("form", [INT4, INT4_ASYM], ids=lambda f: f.name)
def test_awq_factors_help_loud_inputs(form: WeightFormat) -> None:
    weight, x = heavy_tailed(24, 64), correlated_inputs(64)
    x[:, 5] *= 50
    moments = moments_of(x)
    s = search_factors(weight, form, moments, x.abs().mean(0))
    scaled = quantize(weight * s, form).dequantize() / s - weight
    plain = quantize(weight, form).dequantize() - weight
    assert product_loss(scaled, moments) < 0.75 * product_loss(plain, moments)
    assert bool((s > 0).all()) and bool(s.isfinite().all())


def test_awq_leaves_silent_inputs_alone() -> None:
    x = correlated_inputs(64)
    x[:, 7] = 0
    s = search_factors(heavy_tailed(8, 64), INT4, moments_of(x), x.abs().mean(0))
    assert float(s[7]) == 1.0
