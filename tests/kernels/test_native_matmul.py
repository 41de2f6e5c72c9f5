"""Matrix products of every instruction set, shape of the step and epilogue."""

from __future__ import annotations

import pytest
import torch
from native_support import (
    DTYPES,
    ISAS,
    ROWS,
    error,
    make_linear,
    make_norm,
    make_rows,
    needs_native,
    reference,
    tolerance,
)

from skimp.kernels import native
from skimp.kernels.native import NativeOps
from skimp.kernels.ops import StepInputs
from skimp.kernels.plain import PlainOps
from skimp.model.spec import Activation

pytestmark = needs_native
SHAPES = [(64, 48), (100, 77), (33, 16), (31, 5), (1, 17), (288, 130), (96, 16)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_product(isa: str, dtype: torch.dtype, k: int, n: int) -> None:
    linear = make_linear(k, n, dtype, bias=n % 2 == 0)
    weights, biases = [linear.weight.detach()], [linear.bias]
    x = make_rows(max(ROWS), k)
    ops = NativeOps()
    with native.instruction_set(isa), torch.inference_mode():
        matrix = ops.pack([linear])
        assert linear.weight is None
        with ops.capture(max_rows=max(ROWS), max_seqs=1, max_logits=1) as program:
            out = ops.matmul(x, matrix)
        for rows in ROWS:
            out.fill_(torch.nan)
            program.run(rows)
            assert error(out[:rows], reference(x[:rows], weights, biases)) < tolerance(dtype)
            assert out[rows:].isnan().all()


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("k", "n", "bias"), [(64, 48, False), (70, 21, True), (96, 96, True)])
def test_ffn(
    isa: str, dtype: torch.dtype, activation: Activation, k: int, n: int, bias: bool
) -> None:
    """norm, gate and up, activation, then down from the activations onto the residual."""
    gate, up = (make_linear(k, n, dtype, bias=bias, seed=s) for s in (2, 3))
    down = make_linear(n, k, dtype, bias=bias, seed=4)
    norm = make_norm(k)
    first = [gate.weight.detach(), up.weight.detach()]
    second = [down.weight.detach()]
    source = 3.0 * make_rows(max(ROWS), k)
    x = source.clone()
    ops = NativeOps()
    with native.instruction_set(isa), torch.inference_mode():
        gate_up, down_matrix = ops.pack([gate, up], "gated"), ops.pack([down])
        with ops.capture(max_rows=max(ROWS), max_seqs=1, max_logits=1) as program:
            hidden = ops.matmul(x, gate_up, norm=norm, activation=activation)
            out = ops.matmul(hidden, down_matrix, residual=x)
        assert hidden.dtype == dtype and out.dtype == torch.float32
        for rows in ROWS:
            hidden.fill_(torch.nan)
            x.copy_(source)
            program.run(rows)
            want = reference(
                source[:rows], first, [gate.bias, up.bias], norm=norm, activation=activation
            )
            assert error(hidden[:rows], want) < tolerance(dtype)
            want = reference(hidden[:rows], second, [down.bias], residual=source[:rows])
            assert error(out[:rows], want) < tolerance(dtype)
            assert torch.equal(out[rows:], source[rows:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_stacked_parts_and_plain_backend(isa: str, dtype: torch.dtype) -> None:
    """Three matrices whose sizes are not multiples of a panel, as q, k and v may be."""
    linears = [make_linear(64, n, dtype, bias=True, seed=n) for n in (40, 9, 23)]
    copies = [make_linear(64, n, dtype, bias=True, seed=n) for n in (40, 9, 23)]
    for copy in copies:
        copy.weight = torch.nn.Parameter(copy.weight.float())
        copy.bias = torch.nn.Parameter(copy.bias.float())
    norm = make_norm(64, plus_one=True)
    x = make_rows(20, 64)
    ops, plain = NativeOps(), PlainOps()
    with native.instruction_set(isa), torch.inference_mode():
        want = plain.matmul(x, plain.pack(copies), norm=norm)
        matrix = ops.pack(linears)
        with ops.capture(max_rows=20, max_seqs=1, max_logits=1) as program:
            out = ops.matmul(x, matrix, norm=norm)
        for rows in (1, 20):
            out.fill_(torch.nan)
            program.run(rows)
            assert error(out[:rows], want[:rows].double()) < tolerance(dtype)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_logits_of_chosen_rows(isa: str, dtype: torch.dtype, softcap: float | None) -> None:
    head = make_linear(64, 300, dtype)
    copy = make_linear(64, 300, dtype)
    copy.weight = torch.nn.Parameter(copy.weight.float())
    norm = make_norm(64)
    x = 4.0 * make_rows(50, 64)
    rows = torch.zeros(40, dtype=torch.int32)
    empty = torch.zeros(50, dtype=torch.int32)
    step = StepInputs(empty, empty, empty, empty, empty, rows)
    ops, plain = NativeOps(), PlainOps()
    with native.instruction_set(isa), torch.inference_mode():
        matrix = ops.pack([head], "table")
        with ops.capture(max_rows=50, max_seqs=2, max_logits=40) as program:
            out = ops.logits(x, matrix, norm, softcap, step)
        for chosen in ([7], [49, 0], list(range(5, 42))):
            rows[: len(chosen)] = torch.tensor(chosen)
            out.fill_(torch.nan)
            program.run(50, 2, len(chosen))
            cut = StepInputs(empty, empty, empty, empty, empty, rows[: len(chosen)])
            want = plain.logits(x, plain.pack([copy]), norm, softcap, cut)
            assert error(out[: len(chosen)], want.double()) < tolerance(dtype)
            assert out[len(chosen) :].isnan().all()


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("isa", ISAS)
def test_activations_over_the_whole_range(isa: str, activation: Activation) -> None:
    """Through a 1 by 1 product, so that each row is one value: relative error, tails included."""
    values = torch.cat((torch.linspace(-90, 90, 4001), torch.linspace(-1e-3, 1e-3, 101)))
    gate, up = make_linear(1, 1, torch.float32, bias=True), make_linear(1, 1, torch.float32)
    gate.weight.data.fill_(1.0)
    gate.bias.data.fill_(0.0)
    up.weight.data.fill_(0.0)
    up.bias = torch.nn.Parameter(torch.ones(1))
    ops = NativeOps()
    with native.instruction_set(isa), torch.inference_mode():
        matrix = ops.pack([gate, up], "gated")
        with ops.capture(max_rows=len(values), max_seqs=1, max_logits=1) as program:
            out = ops.matmul(values[:, None].contiguous(), matrix, activation=activation)
        program.run(len(values))
    want = reference(
        values[:, None],
        [torch.ones(1, 1), torch.zeros(1, 1)],
        [None, torch.ones(1)],
        activation=activation,
    )
    torch.testing.assert_close(out.double(), want, rtol=2e-6, atol=1e-6)


def test_non_finite_inputs_spread_only_in_their_row() -> None:
    linear = make_linear(64, 32, torch.bfloat16)
    x = make_rows(40, 64)
    ops = NativeOps()
    with torch.inference_mode():
        matrix = ops.pack([linear])
        with ops.capture(max_rows=40, max_seqs=1, max_logits=1) as program:
            out = ops.matmul(x, matrix)
        x[3, 5], x[20, 1] = torch.nan, torch.inf
        program.run(40)
    assert out[3].isnan().all() and not out[20].isfinite().any()
    rest = [row for row in range(40) if row not in (3, 20)]
    assert out[rest].isfinite().all()


def test_refusals() -> None:
    ops = NativeOps()
    gate, up = make_linear(32, 16, torch.float32), make_linear(32, 16, torch.float32, seed=1)
    with torch.inference_mode():
        matrix = ops.pack([gate, up], "gated")
        with ops.capture(max_rows=4, max_seqs=1, max_logits=1) as program:
            with pytest.raises(ValueError, match="activation"):
                ops.matmul(make_rows(4, 32), matrix)
            ops.matmul(make_rows(4, 32), matrix, activation="silu")
        with pytest.raises(ValueError, match="exceeds"):
            program.run(5)
    with pytest.raises(ValueError, match="float16"):
        NativeOps(torch.float16)
