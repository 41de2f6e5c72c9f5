"""Products with low-bit matrices of every instruction set, format and shape of the step."""

from __future__ import annotations

import pytest
import torch
from native_support import (
    DTYPES,
    ISAS,
    error,
    make_linear,
    make_norm,
    make_rows,
    needs_native,
    reference,
)
from torch import Tensor

from skimp.formats.weight import WeightFormat, quantize
from skimp.kernels import native
from skimp.kernels.lowbit import round_rows
from skimp.kernels.native import NativeOps
from skimp.kernels.ops import StepInputs
from skimp.kernels.plain import rms_norm
from skimp.model.layers import Linear

pytestmark = needs_native
ROWS = [1, 2, 4, 5, 6, 7, 12, 13, 31, 32, 33, 70, 260]
WIDENED = 8  # rows from which some CPU widens low-bit weights
# Odd sizes, a short last group, more inputs than one block of sums, more panels than one tile.
SHAPES = [(64, 48), (100, 77), (33, 16), (31, 5), (1, 17), (288, 130), (700, 33)]
FORMATS = [
    WeightFormat(kind="int", bits=8),
    WeightFormat(kind="int", bits=8, group_size=64, symmetric=False),
    WeightFormat(kind="int", bits=8, activations="int8"),
    WeightFormat(kind="int", bits=4),
    WeightFormat(kind="int", bits=4, group_size=32),
    WeightFormat(kind="int", bits=4, group_size=32, symmetric=False),
    WeightFormat(kind="int", bits=4, group_size=128),
    WeightFormat(kind="int", bits=4, group_size=64, activations="int8"),
    WeightFormat(kind="float", bits=8),
    WeightFormat(kind="float", bits=8, activations="fp8"),
]
each_format = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
each_isa = pytest.mark.parametrize("isa", ISAS)


def low_linear(
    k: int, n: int, form: WeightFormat, dtype: torch.dtype, *, seed: int = 0, bias: bool = False
) -> Linear:
    linear = make_linear(k, n, dtype, seed=seed, bias=bias)
    linear.quantized, linear.weight = quantize(linear.weight.detach(), form), None
    return linear


def weights_of(linear: Linear) -> Tensor:
    assert linear.quantized is not None
    return linear.quantized.dequantize()


def rounded(x: Tensor, form: WeightFormat) -> Tensor:
    return x if form.activations is None else round_rows(x, form.activations)


def tolerance(form: WeightFormat, dtype: torch.dtype) -> float:
    """fp8 weights meet bfloat16 rows where the CPU has such products, and others are rounded to
    16 bits of fixed point: an outlier in a row costs its other inputs some of them."""
    if form.kind == "float" and form.activations is None and dtype == torch.bfloat16:
        return 1e-2
    return 2e-4


@each_isa
@each_format
@pytest.mark.parametrize("dtype", DTYPES)
def test_product(isa: str, form: WeightFormat, dtype: torch.dtype) -> None:
    """Every number of rows; a row's result is the same to the bit whatever rows are beside it. By
    default it is one of two, since many rows may be multiplied by weights widened to bfloat16."""
    for k, n in SHAPES:
        linear = low_linear(k, n, form, dtype, bias=n % 2 == 0)
        x = make_rows(max(ROWS), k)
        ops = NativeOps()
        with native.instruction_set(isa), torch.inference_mode():
            want = reference(rounded(x, form), [weights_of(linear)], [linear.bias])
            matrix = ops.pack([linear])
            assert linear.quantized is None
            with ops.capture(max_rows=max(ROWS), max_seqs=1, max_logits=1) as program:
                out = ops.matmul(x, matrix)
            program.run(max(ROWS))
            many = out.clone()
            program.run(max(ROWS), deterministic=True)
            whole = out.clone()
            for rows in ROWS:
                out.fill_(torch.nan)
                program.run(rows, deterministic=True)
                assert error(out[:rows], want[:rows]) < tolerance(form, dtype), (k, n, rows)
                assert torch.equal(out[:rows], whole[:rows]), (k, n, rows)
                assert out[rows:].isnan().all()
                program.run(rows)
                as_alone = torch.equal(out[:rows], whole[:rows])
                assert as_alone or torch.equal(out[:rows], many[:rows]), (k, n, rows)
                if as_alone:
                    continue
                assert dtype == torch.bfloat16 and form.activations is None
                assert rows >= WIDENED and error(out[:rows], want[:rows]) < 1e-2, (k, n, rows)


@each_isa
@each_format
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(isa: str, form: WeightFormat, threads: int) -> None:
    x = make_rows(260, 300)
    ops = NativeOps()
    with native.instruction_set(isa), torch.inference_mode():
        matrix = ops.pack([low_linear(300, 150, form, torch.bfloat16)])
        with ops.capture(max_rows=260, max_seqs=1, max_logits=1) as program:
            out = ops.matmul(x, matrix)
        for rows in (1, 9, 40, 260):
            program.run(rows, threads=1)
            alone = out[:rows].clone()
            program.run(rows, threads=threads)
            assert torch.equal(out[:rows], alone)


@each_isa
@each_format
def test_strange_rows_harm_only_themselves(isa: str, form: WeightFormat) -> None:
    """Zeros stay zeros, a large outlier costs precision in its own row alone, tiny and huge rows
    keep theirs, and what is no number does not spread."""
    k, n = 100, 40
    linear = low_linear(k, n, form, torch.float32)
    dense = weights_of(linear)
    x = make_rows(8, k)
    want = reference(rounded(x, form), [dense], [None])
    x[1] = 0.0
    x[2, 7] = 1e4
    x[3] *= 1e-20
    x[4] *= 1e20
    x[5, 50] = torch.nan
    x[6, 3] = torch.inf
    ops = NativeOps()
    with native.instruction_set(isa), torch.inference_mode():
        matrix = ops.pack([linear])
        with ops.capture(max_rows=8, max_seqs=1, max_logits=1) as program:
            out = ops.matmul(x, matrix)
        program.run(8)
    limit = tolerance(form, torch.float32)
    assert error(out[[0, 7]], want[[0, 7]]) < limit
    assert (out[1] == 0.0).all()
    outlier = reference(rounded(x[2:3], form), [dense], [None])
    assert error(out[2:3], outlier) < limit
    if form.activations is None:  # rounded rows have a least scale
        assert error(out[3:4] * 1e20, want[3:4]) < limit
    assert error(out[4:5] * 1e-20, want[4:5]) < limit
    assert not out[5].isfinite().any()
    assert not out[6].isfinite().any()


@each_isa
@each_format
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_ffn(isa: str, form: WeightFormat, activation: str) -> None:
    """norm, gate and up, activation, then down from the activations onto the residual."""
    k, n = 96, 70
    gate, up = (low_linear(k, n, form, torch.float32, seed=s, bias=True) for s in (2, 3))
    down = low_linear(n, k, form, torch.float32, seed=4)
    norm, source = make_norm(k), 3.0 * make_rows(40, k)
    first, second = [weights_of(gate), weights_of(up)], [weights_of(down)]
    x = source.clone()
    ops = NativeOps()
    with native.instruction_set(isa), torch.inference_mode():
        gate_up, down_matrix = ops.pack([gate, up], "gated"), ops.pack([down])
        with ops.capture(max_rows=40, max_seqs=1, max_logits=1) as program:
            hidden = ops.matmul(x, gate_up, norm=norm, activation=activation)  # type: ignore[arg-type]
            out = ops.matmul(hidden, down_matrix, residual=x)
        for rows in (1, 5, 33, 40):
            x.copy_(source)
            program.run(rows)
            want = reference(
                rounded(rms_norm(source[:rows], norm), form),
                first,
                [gate.bias, up.bias],
                activation=activation,  # type: ignore[arg-type]
            )
            # A normed number may be rounded to the other side of a tie.
            limit = 2e-2 if form.activations else tolerance(form, torch.float32)
            assert error(hidden[:rows], want) < limit
            inputs = rounded(hidden[:rows].float(), form)
            want = reference(inputs, second, [None], residual=source[:rows])
            assert error(out[:rows], want) < tolerance(form, hidden.dtype)
            assert torch.equal(out[rows:], source[rows:])


@each_isa
def test_stacks_of_mixed_formats(isa: str) -> None:
    """q, k and v of one layer may differ in bits, groups or in having any."""
    forms = [FORMATS[0], FORMATS[4], None, FORMATS[6]]
    linears = [
        make_linear(64, n, torch.bfloat16, seed=n)
        if form is None
        else low_linear(64, n, form, torch.bfloat16, seed=n)
        for n, form in zip((40, 9, 23, 16), forms)
    ]
    dense = [
        linear.weight.detach() if linear.quantized is None else weights_of(linear)
        for linear in linears
    ]
    x = make_rows(20, 64)
    ops = NativeOps()
    with native.instruction_set(isa), torch.inference_mode():
        matrix = ops.pack(linears)
        with ops.capture(max_rows=20, max_seqs=1, max_logits=1) as program:
            out = ops.matmul(x, matrix)
        for rows in (1, 20):
            program.run(rows)
            want = reference(x[:rows], dense, [None] * len(dense))
            assert error(out[:rows], want) < 1e-2


@each_isa
@each_format
@pytest.mark.parametrize(("vocab", "dim"), [(50, 64), (33, 45), (1, 3)])
def test_table(isa: str, form: WeightFormat, vocab: int, dim: int) -> None:
    """An embedding reads rows of the very matrix that makes the logits."""
    table = low_linear(dim, vocab, form, torch.float32)
    dense = weights_of(table)
    ids = torch.randint(0, vocab, (30,), dtype=torch.int32)
    rows = torch.arange(30, dtype=torch.int32)
    step = StepInputs(ids, ids, ids, ids, ids, rows)
    norm, x = make_norm(dim), make_rows(30, dim)
    ops = NativeOps()
    with native.instruction_set(isa), torch.inference_mode():
        matrix = ops.pack([table], "table")
        with ops.capture(max_rows=30, max_seqs=1, max_logits=30) as program:
            embedded = ops.embed(step, matrix, 1.7)
            logits = ops.logits(x, matrix, norm, None, step)
        program.run(30, 1, 30)
        want = reference(rounded(rms_norm(x, norm), form), [dense], [None])
    assert error(embedded, dense[ids.long()].double() * 1.7) < 1e-6
    limit = 2e-2 if form.activations else tolerance(form, torch.float32)
    assert error(logits, want) < limit
