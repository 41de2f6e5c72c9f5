"""The Triton linear layers against float64 products with the matrices they stand for: on a GPU
where there is one (bfloat16 too), and elsewhere in Triton's interpreter, in float32 (it is not to
be trusted with bfloat16 products, and runs no inline assembly)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from hopper import ptx_of

from skimp.formats import WeightFormat, quantize
from skimp.kernels import lowbit, plain
from skimp.kernels.triton import linear as linear_module
from skimp.kernels.triton import rows as rows_module
from skimp.kernels.triton import tuning
from skimp.kernels.triton.linear import Matrix, embed, linear, pack_matrix
from skimp.kernels.triton.tuning import Config, Problem

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if GPU else [torch.float32]
FORMATS = [
    "dense",
    "int8",
    "int8-a8",
    "int8-g32-asym",
    "int8-asym",
    "int4",
    "int4-g32",
    "int4-g64",
    "int4-g128",
    "int4-g128-asym",
    "int4-g40",  # no kernel follows groups of 40: expanded
    "fp8",
    "fp8-afp8",
]
EPS = 1e-5


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def _bound(dtype: torch.dtype) -> float:
    return 1e-6 if dtype == torch.float32 else 8e-3


def _part(name: str, n: int, k: int, dtype: torch.dtype = torch.float32):
    weight = torch.randn(n, k) * 0.1
    if name == "dense":
        return weight.to(DEVICE, dtype)
    return quantize(weight, WeightFormat.named(name)).to(DEVICE)


def _exact(part) -> Tensor:
    return part.double() if isinstance(part, Tensor) else part.dequantize().double()


def _normed(x: Tensor, factor: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * factor


def _inputs(rows: int, k: int) -> tuple[Tensor, Tensor]:
    return (torch.randn(rows, k) * 3).to(DEVICE), (torch.rand(k) + 0.5).to(DEVICE)


def _force(matrix: Matrix, config: Config) -> None:
    """Every number of rows takes this configuration."""
    for segment in matrix.segments:
        segment.configs = dict.fromkeys((1, 2, 4, 8, 16, 32, 64, 128, 256), config)


def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold NaN, so that what a kernel does not write shows."""
    plain_empty = torch.empty

    def empty(*args, **kwargs):
        made = plain_empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(linear_module.torch, "empty", empty)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("name", FORMATS)
def test_norm_gate_and_bias(
    name: str, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, k = 21, 200
    parts = [_part(name, n, k, dtype) for _ in range(2)]
    bias = torch.randn(2 * n, device=DEVICE)
    x, factor = _inputs(rows, k)
    matrix = pack_matrix(parts, bias, gated=True, dtype=dtype)
    _poison(monkeypatch)
    found = linear(
        x, matrix, norm_factor=factor, eps=EPS, activation="silu", out_dtype=torch.float32
    )
    normed = _normed(x.double(), factor)
    rounding = None if name == "dense" else WeightFormat.named(name).activations
    if rounding is not None:
        normed = lowbit.round_rows(_normed(x, factor).to(dtype), rounding)
    y = normed.double() @ torch.cat([_exact(part) for part in parts]).T + bias
    # By a last bit of the norm a rounded input may fall to the other side.
    slack = 0.0 if rounding is None else 5e-3
    assert _relative(found, F.silu(y[:, :n]) * y[:, n:]) < _bound(dtype) + slack


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "config",
    [
        Config(kind="gemv", block_n=4, block_k=64),
        Config(kind="gemv", block_n=8, block_k=32),
        Config(kind="dot", block_n=32, block_m=8, block_k=64),
        Config(kind="dot", block_n=64, block_m=16, block_k=64, split=3),
        Config(kind="library"),
    ],
    ids=lambda c: f"{c.kind}-{c.block_n}-{c.split}",
)
@pytest.mark.parametrize(
    "name", ["dense", "int8", "fp8", "int4-g128", "int4-g32", "int4-g128-asym"]
)
def test_every_kernel(
    name: str, config: Config, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if config.kind == "gemv" and name != "dense":
        pytest.skip("no such kernel")
    for n, k, rows in ((33, 130, 4), (64, 256, 2)):
        part = _part(name, n, k, dtype)
        matrix = pack_matrix([part], None, gated=False, dtype=dtype)
        _force(matrix, config)
        _poison(monkeypatch)
        for _ in range(2):  # the second call finds the counters as the first left them
            x, factor = _inputs(rows, k)
            residual = torch.randn(rows, n, device=DEVICE)
            wanted = residual.double() + x.to(dtype).double() @ _exact(part).T
            found = linear(x.to(dtype), matrix, residual=residual)
            assert found is residual
            assert _relative(found, wanted) < _bound(dtype)
            found = linear(x, matrix, norm_factor=factor, eps=EPS, out_dtype=dtype)
            assert found.dtype == dtype
            assert _relative(found, _normed(x.double(), factor) @ _exact(part).T) < _bound(dtype)
        assert not matrix.segments[0].counts.any()
        monkeypatch.undo()


@pytest.mark.skipif(not GPU, reason="Gluon needs a GPU")
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("name", ["int8", "int8-a8", "fp8", "int4", "int4-g32", "int4-g128"])
def test_few_rows(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    split = tuning.FEW_ROWS // tuning.bucket(rows)
    wide = Config(kind="few", block_n=16 * 8 // split, split=split, warps=8, stages=2)
    whole = Config(kind="few", block_n=128, split=1, warps=4, stages=1)
    deep = Config(kind="few", block_n=64, split=split, warps=max(4, split), stages=4)
    # The last is longer than one turn of the kernel's loop.
    for n, k, configs in (
        (33, 130, [wide, whole, deep]),
        (256, 1024, [wide, whole]),
        (21, 5 * 1024 + 8, [whole]),
    ):
        parts = [_part(name, n, k, torch.bfloat16) for _ in range(2)]
        bias = torch.randn(n, device=DEVICE)
        plain_matrix = pack_matrix(parts[:1], bias, gated=False, dtype=torch.bfloat16)
        gated = pack_matrix(parts, None, gated=True, dtype=torch.bfloat16)
        assert gated.segments[0].problem.few
        x, factor = _inputs(rows, k)
        rounding = WeightFormat.named(name).activations

        def rounded(x: Tensor, rounding=rounding) -> Tensor:
            return (lowbit.round_rows(x.bfloat16(), rounding) if rounding else x).double()

        normed = rounded(_normed(x, factor))
        gate, up = (normed @ _exact(part).T for part in parts)
        slack = 5e-3 if rounding else 0.0
        _poison(monkeypatch)
        for config in configs:
            _force(plain_matrix, config)
            _force(gated, config)
            residual = torch.randn(rows, n, device=DEVICE)
            wanted = residual + rounded(x.bfloat16()) @ _exact(parts[0]).T + bias
            found = linear(x.bfloat16(), plain_matrix, residual=residual)
            assert _relative(found, wanted) < 8e-3
            found = linear(x, gated, norm_factor=factor, eps=EPS, activation="silu")
            assert _relative(found, F.silu(gate) * up) < 8e-3 + slack
        monkeypatch.undo()


def test_few_rows_compile_without_a_gpu(tmp_path: Path) -> None:
    """The interpreter does not run Gluon, but its compiler needs no GPU."""
    pytest.importorskip("triton.experimental.gluon")
    ptx = ptx_of("compile_few_rows.py", cache=tmp_path)
    assert "mma.sync.aligned.m16n8k16" in ptx
    assert "ld.global.v4" in ptx  # weights, 16 bytes a thread
    assert "ld.local" not in ptx


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("rows", [2, 70])
def test_activations(activation: str, rows: int) -> None:
    parts = [_part("dense", 12, 64) for _ in range(2)]
    matrix = pack_matrix(parts, None, gated=True, dtype=torch.float32)
    x = torch.randn(rows, 64, device=DEVICE) * 20  # far into both tails
    y = x.double() @ torch.cat(parts).double().T
    wanted = plain.ACTIVATIONS[activation](y[:, :12]) * y[:, 12:]
    assert _relative(linear(x, matrix, activation=activation), wanted) < 1e-6  # type: ignore[arg-type]


@pytest.mark.parametrize("gated", [False, True])
def test_parts_in_several_formats(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["int4-g128", "int8-a8"] if gated else ["int4-g32", "int4-g32", "dense", "fp8-afp8"]
    n, k = 20, 128
    parts = [_part(name, n, k) for name in names]
    bias = torch.randn(n * len(names), device=DEVICE)
    matrix = pack_matrix(parts, bias, gated=gated, dtype=torch.float32)
    assert len(matrix.segments) == (2 if gated else 3)
    x, factor = _inputs(3, k)
    _poison(monkeypatch)
    normed = _normed(x, factor)
    products = []
    for name, part in zip(names, parts):
        rounding = None if name == "dense" else WeightFormat.named(name).activations
        given = normed if rounding is None else lowbit.round_rows(normed, rounding)
        products.append(given.double() @ _exact(part).T)
    y = torch.cat(products, 1) + bias
    if gated:
        y = F.silu(y[:, :n]) * y[:, n:]
    residual = torch.randn(3, y.shape[1], device=DEVICE)
    y += residual
    found = linear(
        x,
        matrix,
        norm_factor=factor,
        eps=EPS,
        activation="silu" if gated else None,
        residual=residual,
    )
    assert _relative(found, y) < 5e-3  # rounded inputs: see above


@pytest.mark.parametrize("name", ["dense", "int4-g128", "int8-a8"])
def test_deterministic_rows_are_the_same_in_any_company(name: str) -> None:
    k = 192
    parts = [_part(name, 20, k, DTYPES[-1]) for _ in range(2)]
    matrix = pack_matrix(parts, None, gated=True, dtype=DTYPES[-1])
    x, factor = _inputs(300, k)

    def run(rows: Tensor) -> Tensor:
        return linear(
            rows, matrix, norm_factor=factor, eps=EPS, activation="silu", deterministic=True
        )

    together = run(x)
    for some in (slice(0, 1), slice(299, 300), slice(60, 69)):
        assert torch.equal(run(x[some]), together[some])


def test_no_rows() -> None:
    matrix = pack_matrix([_part("int4-g32", 8, 64)], None, gated=False, dtype=torch.float32)
    assert linear(torch.empty(0, 64, device=DEVICE), matrix).shape == (0, 8)
    assert embed(torch.empty(0, dtype=torch.int32, device=DEVICE), matrix).shape == (0, 64)


@pytest.mark.parametrize("name", FORMATS)
def test_embed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = _part(name, 19, 200)
    matrix = pack_matrix([table], None, gated=False, dtype=torch.float32)
    ids = torch.tensor([18, 0, 7, 7], dtype=torch.int32, device=DEVICE)
    _poison(monkeypatch)
    wanted = _exact(table)[ids.long()] * 3.0
    assert _relative(embed(ids, matrix, 3.0), wanted) < 1e-6


@pytest.mark.parametrize("k", [40, 200])
def test_norms_and_rounded_rows(k: int) -> None:
    x, factor = _inputs(5, k)
    y, _ = _inputs(5, k)
    normed = rows_module.rms_norm(y, factor, EPS, torch.float32)
    assert _relative(normed, _normed(y.double(), factor)) < 1e-6
    added = rows_module.add_norm(x, y, factor, EPS)
    assert _relative(added, x + _normed(y.double(), factor)) < 1e-6
    y[0] = 0
    y[1] *= torch.logspace(-12, 12, k, device=DEVICE, base=2)  # fp8's subnormals among them
    for to in ("int8", "fp8"):
        rounded, scale = rows_module.round_rows(y, to, torch.float32)  # type: ignore[arg-type]
        # On a GPU torch divides by a constant with its reciprocal, which is not what is promised.
        wanted = lowbit.round_rows(y.cpu(), to).to(DEVICE)
        assert torch.equal(rounded * scale[:, None], wanted)


def test_row_max() -> None:
    x = torch.randn(4, 9000, device=DEVICE)
    x[1, 77] = x[1, 8000] = 9.0
    x[2, 5000] = float("nan")
    x[3] = float("-inf")
    top, best = rows_module.row_max(x)
    assert torch.equal(top[[0, 1, 3]], x.amax(1)[[0, 1, 3]]) and top[2].isnan()
    assert best[[0, 1]].tolist() == [int(x[0].argmax()), 77]
    assert ((best >= 0) & (best < 9000)).all()


def test_a_configuration_of_ones_own_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    problem = Problem(format="int8", outputs=64, inputs=32, gated=False, few=True)
    config = Config(kind="dot", block_n=32, split=2)
    tuning.save({problem.key("hopper", 5): config})
    tuning.save({problem.key("hopper", 9): replace(config, split=4)})
    tuning._table.cache_clear()
    monkeypatch.setattr(tuning, "_device", lambda index: ("hopper", 132))
    device = torch.device("cuda")
    assert tuning.choose(problem, 8, device) == config
    assert tuning.choose(problem, 16, device).split == 4
    assert tuning.choose(problem, 1, device) == tuning.rule(problem, 1, 132)
    tuning._table.cache_clear()


def test_a_kernel_that_cannot_run_is_not_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table's key says neither the dtype of the rows nor which kernels there were."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "_device", lambda index: ("hopper", 132))
    problem = Problem(format="int4-g128", outputs=64, inputs=256, gated=False, few=False)
    device = torch.device("cuda")
    for kind in ("few", "gemv"):
        tuning.save({problem.key("hopper", 1): Config(kind=kind)})  # type: ignore[arg-type]
        tuning._table.cache_clear()
        assert tuning.choose(problem, 1, device) == tuning.rule(problem, 1, 132)
        assert tuning.choose(problem, 1, device).kind == "dot"
    tuning.save({problem.key("hopper", 1): Config(kind="few")})
    tuning._table.cache_clear()
    assert tuning.choose(replace(problem, few=True), 1, device) == Config(kind="few")
    tuning._table.cache_clear()


def test_rules_are_among_what_can_run() -> None:
    for name in ("bfloat16", "int8", "int4-g128"):
        for n, k in ((128256, 4096), (28672, 4096), (1024, 3072), (40, 96)):
            problem = Problem(
                format=name, outputs=n, inputs=k, gated=False, few=name == "int4-g128"
            )
            for rows in (1, 2, 3, 8, 17, 100, 128, 129, 5000):
                config = tuning.rule(problem, rows, 132)
                assert config.block_n >= 2 and config.split >= 1
                assert config.kind != "gemv" or (problem.dense and rows <= 4)
                assert config.kind != "few" or (problem.few and rows <= 8)
                for seed in tuning.seeds(problem, rows, 132):
                    near = list(tuning.neighbours(problem, rows, seed))
                    assert seed not in near and (near or n == 40 or seed.kind == "library")


if GPU:

    @pytest.mark.parametrize("name", ["dense", "int4-g128", "int8-asym", "fp8"])
    def test_products_replay_in_a_graph_with_dependent_launch(name: str) -> None:
        pdl = torch.cuda.get_device_capability() >= (9, 0)
        n = k = 256
        parts = [_part(name, n, k, torch.bfloat16) for _ in range(2)]
        gate_up = pack_matrix(parts, None, gated=True, dtype=torch.bfloat16)
        down_part = _part(name, k, n, torch.bfloat16)
        down = pack_matrix([down_part], None, gated=False, dtype=torch.bfloat16)
        _force(down, Config(kind="dot", block_n=64, block_m=8, block_k=64, split=2))
        x, factor = _inputs(1, k)

        def ffn(x: Tensor) -> Tensor:
            h = linear(x, gate_up, norm_factor=factor, eps=EPS, activation="silu", pdl=pdl)
            return linear(h, down, residual=x, pdl=pdl)

        ffn(x.clone())
        held = x.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ffn(held)
        held.copy_(x)
        for _ in range(3):
            graph.replay()
        wanted = x.double()
        for _ in range(3):
            y = _normed(wanted, factor) @ torch.cat([_exact(p) for p in parts]).T
            wanted = wanted + (F.silu(y[:, :n]) * y[:, n:]) @ _exact(down_part).T
        assert _relative(held, wanted) < 8e-3
