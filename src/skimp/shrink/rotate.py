"""Rotation of the residual stream and of the values, folded into the weights: exact, and free at
run time (R1 and R2 of QuaRot, Ashkboos et al. 2024, and SpinQuant, Liu et al. 2024)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from skimp.errors import ShrinkError
from skimp.shrink.fold import (
    READERS,
    absorb_norm,
    gain,
    narrow,
    require_attention,
    require_dense,
    require_gated,
    wide,
)
from skimp.shrink.hadamard import MatrixKind, Rotation, rotation
from skimp.shrink.step import Axis, Need, Unit, UnitResult

if TYPE_CHECKING:
    from torch import Tensor

    from skimp.model.spec import ModelSpec
    from skimp.shrink.step import Run

HEAD_GAIN: Final = "head_gain"
ROWS: Final = 8192  # of a vocabulary matrix that are in float64 at once


class Rotate(BaseModel):
    """``residual``: the stream x becomes x R, with every norm gain folded into the matrices behind
    it. ``values``: each value head becomes v U. ``matrix`` is the kind of R and U. The arithmetic
    is float64; ``dtype`` says what is stored: the checkpoint's dtype or float32."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str] = "rotate"
    axis: ClassVar[Axis] = "weights"
    lossy: ClassVar[bool] = False

    residual: bool = True
    values: bool = True
    matrix: MatrixKind = "random_hadamard"
    seed: int = Field(default=0, ge=0, lt=2**31)
    dtype: Literal["checkpoint", "float32"] = "checkpoint"

    def need(self, spec: ModelSpec) -> Need:
        require_dense(spec, self.kind)
        require_attention(spec, self.kind)
        ffns = require_gated(spec, self.kind)
        if not (self.residual or self.values):
            raise ShrinkError("residual: both residual and values are false, nothing would rotate")
        if self.residual and any(layer.post_norms for layer in spec.layers):
            raise ShrinkError(
                f"residual: {spec.family} norms what a sublayer adds to the residual stream, a "
                "gain for each dimension that no rotation passes; set residual to false"
            )
        # A tied table becomes two matrices, and the second needs the gain of the last norm.
        passes = 2 if self._unties(spec) else 1
        largest = max(spec.hidden_size, *(ffn.intermediate_size for ffn in ffns))
        table = 4 * spec.vocab_size * spec.hidden_size * (2 if self._unties(spec) else 1)
        layer = 8 * 2 * 3 * spec.hidden_size * largest
        return Need(passes=passes, extra_bytes=max(table, layer) + 8 * spec.hidden_size**2)

    def planned_spec(self, spec: ModelSpec) -> ModelSpec:
        return self.output_spec(spec, {})

    def output_spec(self, spec: ModelSpec, state: Mapping[str, Any]) -> ModelSpec:
        return dataclasses.replace(
            spec,
            tie_embeddings=spec.tie_embeddings and not self.residual,
            dtype="float32" if self.dtype == "float32" else spec.dtype,
        )

    def visit(self, unit: Unit, run: Run) -> UnitResult:
        if self._unties(unit.spec) and run.pass_index == 0:
            if unit.name == "head":
                factor = gain(wide(unit)["norm.weight"], unit.spec)
                run.state[HEAD_GAIN] = factor.tolist()
            return UnitResult(tensors=None)
        dtype = None if self.dtype == "checkpoint" else self.dtype
        residual = self._residual(unit, run)
        if unit.layer is None:
            return UnitResult(tensors=self._ends(unit, run, residual, dtype))
        tensors = wide(unit)
        if residual is not None:
            for norm, readers in READERS.items():
                absorb_norm(tensors, norm, readers, unit.spec)
                for reader in readers:
                    tensors[f"{reader}.weight"] = residual.apply(tensors[f"{reader}.weight"])
            for writer in ("mixer.o_proj", "ffn.down_proj"):
                tensors[f"{writer}.weight"] = residual.apply(tensors[f"{writer}.weight"].T).T
                if f"{writer}.bias" in tensors:
                    tensors[f"{writer}.bias"] = residual.apply(tensors[f"{writer}.bias"])
        if self.values:
            self._rotate_values(unit, run, tensors)
        return UnitResult(tensors=narrow(unit, tensors, dtype))

    def _unties(self, spec: ModelSpec) -> bool:
        return self.residual and spec.tie_embeddings

    def _residual(self, unit: Unit, run: Run) -> Rotation | None:
        if not self.residual:
            return None
        found, exact = rotation(unit.spec.hidden_size, self.matrix, self.seed)
        if not exact and unit.name == "embed":
            run.note(
                f"rotate: no Hadamard matrix of size {unit.spec.hidden_size} is known here; "
                "the residual stream gets a random orthogonal one"
            )
        return found

    def _rotate_values(self, unit: Unit, run: Run, tensors: dict[str, Tensor]) -> None:
        assert unit.layer is not None
        mixer = require_attention(unit.spec, self.kind)[unit.layer]
        turn, exact = rotation(mixer.head_dim, self.matrix, self.seed + 1 + unit.layer)
        if not exact and unit.layer == 0:
            run.note(
                f"rotate: no Hadamard matrix of size {mixer.head_dim} is known here; "
                "value heads get random orthogonal ones"
            )
        heads = (-1, mixer.head_dim)
        by_input = tensors["mixer.v_proj.weight"].T.unflatten(-1, heads)
        tensors["mixer.v_proj.weight"] = turn.apply(by_input).flatten(-2).T
        if "mixer.v_proj.bias" in tensors:
            bias = tensors["mixer.v_proj.bias"].unflatten(-1, heads)
            tensors["mixer.v_proj.bias"] = turn.apply(bias).flatten(-2)
        out = tensors["mixer.o_proj.weight"].unflatten(-1, heads)
        tensors["mixer.o_proj.weight"] = turn.apply(out).flatten(-2)

    def _ends(
        self, unit: Unit, run: Run, residual: Rotation | None, dtype: str | None
    ) -> dict[str, Tensor]:
        """The table or the head."""
        import torch

        from skimp.shrink.fold import dense, stored_gain

        tensors = dense(unit.tensors)
        target = None if dtype is None else getattr(torch, dtype)
        if residual is None:
            return {name: t if target is None else t.to(target) for name, t in tensors.items()}

        def turned(matrix: Tensor, factor: Tensor | None) -> Tensor:
            out = torch.empty_like(matrix, dtype=target or matrix.dtype)
            for rows, into in zip(matrix.split(ROWS), out.split(ROWS)):
                wide_rows = rows.double() if factor is None else rows.double() * factor
                into.copy_(residual.apply(wide_rows))
            return out

        if unit.name == "embed":
            table = tensors["embed_tokens.weight"]
            result = {"embed_tokens.weight": turned(table, None)}
            if unit.spec.tie_embeddings:
                factor = torch.tensor(run.state[HEAD_GAIN], dtype=torch.float64)
                head = result["lm_head.weight"] = turned(table, factor)
                run.note(f"rotate: the tied table becomes two, {head.nbytes:,} bytes more on disk")
            return result
        norm = tensors["norm.weight"]
        factor = gain(norm.double(), unit.spec)
        plain = stored_gain(torch.ones_like(factor), unit.spec).to(target or norm.dtype)
        result = {"norm.weight": plain}
        if not unit.spec.tie_embeddings:
            result["lm_head.weight"] = turned(tensors["lm_head.weight"], factor)
        return result
