"""The native mixtures of experts against the plain backend, for every instruction set."""

from __future__ import annotations

import pytest
import torch
from expert_models import HIDDEN, SPECS, make, rows
from native_support import ISAS, needs_native
from torch import Tensor

from skimp.formats import WeightFormat, quantize
from skimp.kernels import native
from skimp.kernels.native import NativeOps
from skimp.kernels.plain import PlainOps
from skimp.model.ffn import Experts
from skimp.model.layers import RMSNorm
from skimp.model.spec import ExpertsSpec

pytestmark = needs_native
MOST = 70


def plain(layer: Experts, norm: RMSNorm, x: Tensor) -> Tensor:
    ops = PlainOps()
    with torch.no_grad():
        layer.bind(ops)
        return layer.hidden(x, norm, ops)


class Captured:
    """A mixture as a program, run for any number of rows."""

    def __init__(self, layer: Experts, norm: RMSNorm) -> None:
        ops = NativeOps()
        self._x = torch.zeros(MOST, HIDDEN)
        with torch.no_grad():
            layer.bind(ops)
            with ops.capture(max_rows=MOST, max_seqs=1, max_logits=1) as self._program:
                self._out = layer.hidden(self._x, norm, ops)

    def __call__(self, x: Tensor, *, threads: int = 1, deterministic: bool = False) -> Tensor:
        self._x[: len(x)] = x
        self._out.fill_(torch.nan)
        self._program.run(len(x), threads=threads, deterministic=deterministic)
        return self._out[: len(x)].clone()


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPECS)
def test_equals_plain(name: str, dtype: torch.dtype, isa: str) -> None:
    wanted = {count: plain(*make(SPECS[name], dtype), rows(count)) for count in (1, 5, MOST)}
    with native.instruction_set(isa):
        mixture = Captured(*make(SPECS[name], dtype))
        for count in (MOST, 1, 5):  # what a larger step left behind must not show
            for threads in (1, 3):
                found = mixture(rows(count), threads=threads)
                assert found.dtype == torch.float32
                bound = 2e-6 if dtype == torch.float32 else 2e-2
                assert error(found, wanted[count]) < bound, (count, threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPECS)
def test_rows_do_not_depend_on_others(name: str, dtype: torch.dtype) -> None:
    mixture, x = Captured(*make(SPECS[name], dtype)), rows(40)
    fixed = {"deterministic": dtype != torch.float32}
    whole = mixture(x, **fixed)
    assert torch.equal(mixture(x, threads=3, **fixed), whole)
    parts = [mixture(part, **fixed) for part in x.split((1, 12, 27))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("name", SPECS)
def test_rows_that_are_not_numbers_stay_alone(name: str) -> None:
    mixture, x = Captured(*make(SPECS[name])), rows(9)
    wanted = mixture(x)
    x[4] = float("nan")
    found, rest = mixture(x), torch.arange(9) != 4
    assert torch.equal(found[rest], wanted[rest]) and found[4].isnan().all()


@pytest.mark.parametrize("form", ["int8", "int8-a8", "int4-g8", "fp8-afp8"])
def test_low_bit_experts(form: str) -> None:
    spec = SPECS["qwen"]

    def rounded(spec: ExpertsSpec) -> tuple[Experts, RMSNorm]:
        layer, norm = make(spec)
        for module_name, module in list(layer.named_modules()):
            if module_name.endswith("_proj"):
                module.quantized = quantize(module.weight.detach(), WeightFormat.named(form))
                module.weight = None
        return layer, norm

    for count in (1, 33):
        wanted = plain(*rounded(spec), rows(count))
        assert error(Captured(*rounded(spec))(rows(count)), wanted) < 2e-2
