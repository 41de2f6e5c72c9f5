"""Packing, embedding, sandwich norms, buffers, and the contract with the C++ structs."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from native_support import (
    DTYPES,
    ISAS,
    LEVELS,
    make_linear,
    make_norm,
    make_rows,
    needs_native,
)

from skimp.kernels import native
from skimp.kernels.native import NativeOps, structs
from skimp.kernels.native.library import check_build, library
from skimp.kernels.native.workspace import Workspace
from skimp.kernels.ops import StepInputs
from skimp.kernels.plain import PlainOps, rms_norm
from skimp.model.layers import Linear

pytestmark = needs_native


def test_struct_mirrors_have_the_size_of_the_structs() -> None:
    for kind, mirror in structs.OPS.items():
        assert ctypes.sizeof(mirror) == library().sizeof(kind), mirror.__name__
    with pytest.raises(ValueError, match="kind"):
        library().sizeof(99)


def test_a_build_of_other_sources_is_refused() -> None:
    stale = types.SimpleNamespace(__file__="old.so", sizeof=lambda kind: library().sizeof(kind) - 8)
    with pytest.raises(RuntimeError, match=r"old\.so was built from other sources"):
        check_build(stale)


def test_describe_names_the_instruction_set() -> None:
    assert any(native.describe().startswith(level) for level in LEVELS)


@pytest.mark.parametrize("value", ["mmx", "scalar"])
def test_environment_chooses_the_instruction_set(value: str) -> None:
    code = "from skimp.kernels import native; print(native.describe())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"SKIMP_ISA": value, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
    )
    if value == "scalar":
        assert done.stdout.startswith("scalar (SKIMP_ISA")
    else:
        assert "SKIMP_ISA" in done.stderr and "avx512bf16" in done.stderr


@pytest.mark.parametrize("packed_as", DTYPES)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["stack", "gated"])
@pytest.mark.parametrize("threads", [1, 3])
def test_pack_and_unpack(
    source: torch.dtype, packed_as: torch.dtype, layout: str, threads: int
) -> None:
    sizes = (21, 21) if layout == "gated" else (37, 5, 16, 1)
    linears = [make_linear(45, n, source, seed=i) for i, n in enumerate(sizes)]
    originals = [linear.weight.detach().clone() for linear in linears]
    before = native.get_threads()
    try:
        native.set_threads(threads)
        matrix = NativeOps(packed_as).pack(linears, layout)  # type: ignore[arg-type]
        for got, want in zip(matrix.unpack(), originals):
            assert torch.equal(got, want.to(packed_as))
    finally:
        native.set_threads(before)
    assert all(linear.weight is None for linear in linears)


def test_pack_reads_unaligned_and_odd_values() -> None:
    """A weight as it may lie in a mapped file, with subnormals, infinities and NaN."""
    halves = torch.arange(0, 65536, 7, dtype=torch.int32).to(torch.int16)[:9360]
    raw = torch.zeros(2 * halves.numel() + 1, dtype=torch.uint8)
    raw[1:] = halves.view(torch.uint8)
    unaligned = np.frombuffer(raw.numpy().data, dtype=np.float16, offset=1, count=9360)
    want = halves.view(torch.float16).reshape(120, 78)
    for dtype in DTYPES:
        linear = Linear(78, 120)
        linear.weight = torch.nn.Parameter(torch.from_numpy(unaligned).reshape(120, 78))
        got = NativeOps(dtype).pack([linear]).unpack()[0]
        torch.testing.assert_close(got, want.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_pack_keeps_one_copy() -> None:
    linear = make_linear(64, 64, torch.bfloat16)
    matrix = NativeOps().pack([linear])
    assert matrix.nbytes == 64 * 64 * 2
    assert NativeOps().pack([make_linear(8, 8, torch.float16)]).dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("vocab", "dim"), [(50, 64), (33, 45), (1, 3)])
def test_embed(isa: str, dtype: torch.dtype, vocab: int, dim: int) -> None:
    table = make_linear(dim, vocab, dtype)
    ids = torch.randint(0, vocab, (30,), dtype=torch.int32)
    step = StepInputs(ids, ids, ids, ids, ids, ids)
    plain, ops = PlainOps(), NativeOps()
    with native.instruction_set(isa), torch.inference_mode():
        want = plain.embed(step, plain.pack([table], "table"), 1.7)
        matrix = ops.pack([table], "table")
        with ops.capture(max_rows=30, max_seqs=1, max_logits=1) as program:
            out = ops.embed(step, matrix, 1.7)
        for rows in (1, 7, 30):
            out.fill_(torch.nan)
            program.run(rows)
            assert torch.equal(out[:rows], want[:rows])
            assert out[rows:].isnan().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dim", [64, 45, 3, 1000])
def test_add_norm(isa: str, dim: int) -> None:
    norm = make_norm(dim, plus_one=True)
    source, y = make_rows(30, dim), make_rows(30, dim, seed=2)
    x = source.clone()
    ops = NativeOps()
    with native.instruction_set(isa), torch.inference_mode():
        with ops.capture(max_rows=30, max_seqs=1, max_logits=1) as program:
            out = ops.add_norm(x, y, norm)
        program.run(29)
        torch.testing.assert_close(
            out[:29], source[:29] + rms_norm(y[:29], norm), rtol=1e-5, atol=1e-5
        )
        assert torch.equal(out[29], source[29])


def test_workspace_reuses_only_what_nobody_holds() -> None:
    workspace = Workspace()
    first = workspace.empty(4, 10, torch.float32)
    second = workspace.empty(4, 10, torch.float32)
    assert first.data_ptr() != second.data_ptr() and first.data_ptr() % 64 == 0
    address, view = first.data_ptr(), first[1:, 2:]
    del first
    assert workspace.empty(4, 10, torch.float32).data_ptr() != address
    del view
    assert workspace.empty(4, 10, torch.bfloat16).shape == (4, 10)
    assert workspace.empty(4, 10, torch.float32).data_ptr() == address
    assert workspace.owns(second) and not workspace.owns(torch.zeros(3))


def test_unbuilt_op_is_an_error() -> None:
    op = structs.EmbedOp(head=structs.OpHeader(77, 0))
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(op))
    with pytest.raises(RuntimeError, match="77"):
        library().run(ctypes.addressof(pointers), 1, 1, 1, 1)
