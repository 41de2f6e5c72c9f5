"""The Triton mixtures of experts against the plain backend: on a GPU where there is one (bfloat16
too), and elsewhere in Triton's interpreter, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from expert_models import HIDDEN, QWEN, SPECS, make, rows
from hopper import ptx_of

from skimp.kernels import experts as reference
from skimp.kernels.plain import PlainOps
from skimp.kernels.triton import experts as module
from skimp.kernels.triton.ops import TritonOps
from skimp.model.spec import ExpertsSpec

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if GPU else [torch.float32]


def run(ops: object, spec: ExpertsSpec, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    layer, norm = (module.to(DEVICE) for module in make(spec, dtype))
    with torch.no_grad():
        layer.bind(ops)
        return layer.hidden(x.to(DEVICE), norm, ops)


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold what no kernel may leave: NaN, and numbers no expert has."""
    plain_empty = torch.empty

    def empty(*args, **kwargs):
        made = plain_empty(*args, **kwargs)
        return made.fill_(float("nan") if made.is_floating_point() else 1 << 20)

    monkeypatch.setattr(module.torch, "empty", empty)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 2, 4, 21])
@pytest.mark.parametrize("name", SPECS)
def test_equals_plain(
    name: str, count: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, x = SPECS[name], rows(count)
    wanted = run(PlainOps(), spec, x, dtype)  # the same weights: rounded ones choose other experts
    poison(monkeypatch)
    found = run(TritonOps(dtype=dtype), spec, x, dtype)
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    if count:
        bound = 2e-6 if dtype == torch.float32 else 3e-2
        assert float((found - wanted).norm() / wanted.norm()) < bound


@pytest.mark.parametrize("tile", [module.SMALL, module.LARGE], ids=["small", "large"])
def test_tiles(tile: module.Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of more than one tile, and of none: all rows want two of the six experts."""
    monkeypatch.setattr(module, "SMALL", tile)
    monkeypatch.setattr(module, "LARGE", tile)
    x = rows(1).expand(66, -1) + 1e-3 * rows(66)
    wanted = run(PlainOps(), QWEN, x)
    poison(monkeypatch)
    found = run(TritonOps(dtype=torch.float32), QWEN, x)
    assert float((found - wanted).norm() / wanted.norm()) < 2e-6


@pytest.mark.parametrize("name", SPECS)
def test_routes_as_the_reference(name: str) -> None:
    spec = SPECS[name]
    torch.manual_seed(5)
    logits = torch.randn(24, spec.num_experts) * 3
    logits[1] = 0.0  # equals: the first count
    logits[2] = 1e4 * logits[2]
    logits[3, 1:] = logits[3, 0]
    correction = torch.randn(spec.num_experts) if spec.router.correction else None
    wanted, weights = reference.route(logits, spec, correction)
    moved = None if correction is None else correction.to(DEVICE)
    found, theirs = module.route(logits.to(DEVICE), spec, moved)
    assert found.tolist() == wanted.tolist()
    torch.testing.assert_close(theirs.cpu(), weights, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt-oss", "deepseek-v3"])
def test_rows_that_are_not_numbers_stay_alone(name: str) -> None:
    """They name experts that there are, and spoil no other row."""
    spec, x = SPECS[name], rows(9)
    wanted = run(TritonOps(dtype=torch.float32), spec, x)
    x[4] = float("nan")
    found = run(TritonOps(dtype=torch.float32), spec, x)
    rest = torch.arange(9) != 4
    assert torch.equal(found[rest], wanted[rest]) and found[4].isnan().all()


@pytest.mark.parametrize("experts", [1, 5, 64])
def test_grouping(experts: int) -> None:
    chosen = torch.randint(0, experts, (1500, 2), dtype=torch.int32).to(DEVICE)
    order, starts = module.group(chosen, experts)
    flat = chosen.flatten().cpu()
    assert order.tolist() == flat.sort(stable=True).indices.tolist()
    bounds = torch.arange(experts + 1, dtype=torch.int32)
    assert starts.tolist() == torch.searchsorted(flat.sort().values, bounds).tolist()


@pytest.mark.parametrize("name", ["gpt-oss", "deepseek-v3"])
def test_deterministic_rows_do_not_depend_on_others(name: str) -> None:
    spec, x = SPECS[name], rows(12).to(DEVICE)
    layer, norm = (module.to(DEVICE) for module in make(spec))
    ops = TritonOps(dtype=torch.float32, deterministic=True)
    with torch.no_grad():
        layer.bind(ops)
        whole = layer.hidden(x, norm, ops)
        parts = [layer.hidden(part, norm, ops) for part in x.split((1, 7, 4))]
    assert torch.equal(torch.cat(parts), whole)


def test_products_compile_without_a_gpu(tmp_path: Path) -> None:
    """To tensor cores where rows are grouped, and with wide loads where they are few."""
    ptx = ptx_of("compile_experts.py", cache=tmp_path)
    assert ptx.count(".visible .entry") == 9
    assert "wgmma.mma_async" in ptx and "cp.async" in ptx and "ld.global.v4" in ptx
    assert "ld.local" not in ptx


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("count", [2, 40])
def test_a_graph_follows_its_inputs(count: int) -> None:
    """Captured with some choice of experts, replayed with others."""
    layer, norm = (module.to(DEVICE) for module in make(QWEN))
    ops = TritonOps(dtype=torch.float32)
    x = rows(count).to(DEVICE)
    with torch.no_grad():
        layer.bind(ops)
        layer.hidden(x, norm, ops)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer.hidden(x, norm, ops)
        for seed in range(3):
            x.copy_(torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            wanted = run(PlainOps(), QWEN, x.clone())
            assert float((out - wanted).norm() / wanted.norm()) < 2e-6
