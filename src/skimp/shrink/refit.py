"""The output matrix of attention, fitted anew to what stands before it now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from skimp.shrink.capture import LayerRunner
from skimp.shrink.fold import dense

if TYPE_CHECKING:
    from skimp.model.spec import ModelSpec
    from skimp.shrink.step import Tensors, Unit

RIDGE: Final = 0.03  # of the inputs' mean square, which keeps the output matrix near where it was


def refitted(unit: Unit, out: Tensors, spec: ModelSpec, hidden: Tensor) -> Tensors:
    """``out``, a layer of ``spec`` made of the unit, with the output matrix W' that brings what its
    attention gives nearest to what the unit's own gave: least squares of W x - W' x' over
    ``hidden`` [samples, T, D], with a ridge towards where W' is."""
    assert unit.layer is not None
    name = f"{unit.name}.mixer.o_proj.weight"
    own, new = (dense(tensors)[name].double() for tensors in (unit.tensors, out))
    before = LayerRunner(unit.spec, unit.layer, unit.tensors)
    after = LayerRunner(spec, unit.layer, out)
    moment = torch.zeros(new.shape[1], new.shape[1], dtype=torch.float64)
    missing = torch.zeros_like(new)
    for sample in hidden.split(1):
        x, y = (_attended(runner, sample) for runner in (before, after))
        moment += y.T @ y
        missing += (x @ own.T - y @ new.T).T @ y
    ridge = RIDGE * moment.diagonal().mean()
    if not ridge > 0:
        return out
    moment.diagonal().add_(ridge)
    new += torch.cholesky_solve(missing.T, torch.linalg.cholesky(moment)).T
    return {**out, name: new.to(dense(out)[name].dtype)}


def _attended(runner: LayerRunner, sample: Tensor) -> Tensor:
    """What the output matrix of a layer is given for a sample, float64 [T, out_dim]."""
    seen: dict[str, Tensor] = {}
    runner.watch(sample, "mixer.o_proj", seen.__setitem__)
    return seen["mixer.o_proj"].double()
