"""A low-bit KV cache written into the checkpoint, so that whoever serves it uses one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, field_validator

from skimp.errors import ShrinkError
from skimp.shrink.step import Axis, Need, UnitResult

if TYPE_CHECKING:
    from skimp.model.spec import ModelSpec
    from skimp.shrink.step import Run, Unit


class Cache(BaseModel):
    """Asks for a cache of ``format``; the weights stay as they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str] = "cache"
    axis: ClassVar[Axis] = "cache"
    lossy: ClassVar[bool] = True

    format: Literal["fp8", "int8"]

    @field_validator("format", mode="before")
    @classmethod
    def _has_a_checkpoint_format(cls, value: object) -> object:
        if value == "int4":
            raise ValueError(
                "no checkpoint format says an int4 cache; use the engine option cache_dtype"
            )
        return value

    def need(self, spec: ModelSpec) -> Need:
        if spec.cache_format is not None:
            raise ShrinkError(
                f"format: the checkpoint asks for a cache of {spec.cache_format} already"
            )
        return Need()

    def planned_spec(self, spec: ModelSpec) -> ModelSpec:
        return dataclasses.replace(spec, cache_format=self.format)

    def output_spec(self, spec: ModelSpec, state: Mapping[str, Any]) -> ModelSpec:
        return self.planned_spec(spec)

    def visit(self, unit: Unit, run: Run) -> UnitResult:
        return UnitResult(tensors=unit.tensors)
