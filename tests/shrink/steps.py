"""Steps that test the pipeline rather than a shortcut."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict

from skimp.formats import QuantizedWeight
from skimp.model.spec import ModelSpec
from skimp.shrink.recipe import STEPS
from skimp.shrink.step import Axis, Need, Run, Unit, UnitResult


class Look(BaseModel):
    """Two passes: the first adds up the units' numbers, the second scales by a draw and by what
    the first found. Each visit leaves a line in ``log``, if there is one."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str] = "look"
    axis: ClassVar[Axis] = "weights"
    lossy: ClassVar[bool] = True

    log: str | None = None
    fail_at: int | None = None

    def need(self, spec: ModelSpec) -> Need:
        return Need(passes=2)

    def planned_spec(self, spec: ModelSpec) -> ModelSpec:
        return spec

    def output_spec(self, spec: ModelSpec, state: Mapping[str, Any]) -> ModelSpec:
        assert state["units"] == spec.num_layers + 2
        return spec

    def visit(self, unit: Unit, run: Run) -> UnitResult:
        if self.log is not None:
            with Path(self.log).open("a") as file:
                file.write(f"{run.pass_index} {unit.name}\n")
        if run.pass_index == 0:
            run.state["units"] = run.state.get("units", 0) + 1
            run.state["sum"] = run.state.get("sum", 0.0) + sum(
                float(t.double().sum()) for t in unit.tensors.values()
            )
            return UnitResult(tensors=None)
        if unit.index == self.fail_at:
            raise RuntimeError("a step that fails")
        run.note(f"look: {unit.name}")
        factor = 1 + run.state["sum"] / 1e6 + float(torch.rand(())) / 100
        out = {n: t * factor if isinstance(t, torch.Tensor) else t for n, t in unit.tensors.items()}
        return UnitResult(tensors=out)


class Widen(BaseModel):
    """Low-bit matrices become dense again."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str] = "widen"
    axis: ClassVar[Axis] = "weights"
    lossy: ClassVar[bool] = False

    def need(self, spec: ModelSpec) -> Need:
        return Need()

    def planned_spec(self, spec: ModelSpec) -> ModelSpec:
        return spec.__class__(**{**vars(spec), "formats": {}})

    def output_spec(self, spec: ModelSpec, state: Mapping[str, Any]) -> ModelSpec:
        return self.planned_spec(spec)

    def visit(self, unit: Unit, run: Run) -> UnitResult:
        return UnitResult(
            tensors={
                name: t.dequantize() if isinstance(t, QuantizedWeight) else t
                for name, t in unit.tensors.items()
            }
        )


class Damage(BaseModel):
    """Noise on the matrices of one layer, ``noise`` times their spread."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str] = "damage"
    axis: ClassVar[Axis] = "weights"
    lossy: ClassVar[bool] = True

    layer: int = 1
    noise: float = 1.0
    of: str = ""

    def need(self, spec: ModelSpec) -> Need:
        return Need()

    def planned_spec(self, spec: ModelSpec) -> ModelSpec:
        return spec

    def output_spec(self, spec: ModelSpec, state: Mapping[str, Any]) -> ModelSpec:
        return spec

    def visit(self, unit: Unit, run: Run) -> UnitResult:
        out = dict(unit.tensors)
        for name, tensor in unit.tensors.items():
            if unit.layer == self.layer and self.of in name and len(tensor.shape) == 2:
                assert isinstance(tensor, torch.Tensor)
                out[name] = tensor + self.noise * tensor.std() * torch.randn(tensor.shape)
        return UnitResult(tensors=out)


REGISTRY = {
    **STEPS,
    "look": f"{__name__}:Look",
    "widen": f"{__name__}:Widen",
    "damage": f"{__name__}:Damage",
}
