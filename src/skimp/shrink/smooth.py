"""SmoothQuant (Xiao et al. 2023): part of the activations' range moves into the weights, exactly,
so that both survive 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from skimp.errors import ShrinkError
from skimp.formats.weight import WeightFormat
from skimp.shrink.fold import (
    READERS,
    dense,
    divide_norm,
    largest_layer,
    narrow,
    require_attention,
    require_dense,
    require_gated,
    storable,
    wide,
)
from skimp.shrink.step import Axis, Need, UnitResult

if TYPE_CHECKING:
    from torch import Tensor

    from skimp.model.spec import ModelSpec
    from skimp.shrink.step import Run, Unit

GRID: Final = tuple(i / 10 for i in range(11))  # alphas that "auto" tries; 0 leaves it to weights
KEPT_ROWS: Final = 512  # activations of a group on which "auto" measures
GROUP_OF: Final = {"mixer_norm": "mixer.qkv", "ffn_norm": "ffn.gate_up"}
W8A8: Final = WeightFormat(kind="int", bits=8, activations="int8")


class Smooth(BaseModel):
    """Inputs are divided by ``s = max|X|^alpha / max|W|^(1 - alpha)`` a channel, in the norm
    before the matrices, and the matrices' columns multiplied by it. ``alpha`` "auto" takes, group
    by group, what gives the least W8A8 error. ``down`` does the same between up and down."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str] = "smooth"
    axis: ClassVar[Axis] = "weights"
    lossy: ClassVar[bool] = False

    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = 0.5
    down: bool = False

    def need(self, spec: ModelSpec) -> Need:
        require_dense(spec, self.kind)
        require_attention(spec, self.kind)
        widest = max(ffn.intermediate_size for ffn in require_gated(spec, self.kind))
        # The layer in float64, and in float32 for the forward that looks and the one that leaves.
        largest = largest_layer(spec)
        rows = 0 if self.alpha != "auto" else 4 * KEPT_ROWS * (2 * spec.hidden_size + widest)
        return Need(calibration=True, extra_bytes=(8 + 4) * largest + rows)

    def planned_spec(self, spec: ModelSpec) -> ModelSpec:
        return spec

    def output_spec(self, spec: ModelSpec, state: Mapping[str, Any]) -> ModelSpec:
        return spec

    def visit(self, unit: Unit, run: Run) -> UnitResult:
        from skimp.shrink.capture import LayerRunner, embedded

        if run.tokens is None:
            raise ShrinkError("calibration: smooth measures activations and needs a text")
        if unit.layer is None:
            table = unit.name == "embed"
            hidden = embedded(unit.spec, unit.tensors, run.tokens) if table else None
            return UnitResult(tensors=unit.tensors, hidden=hidden)
        assert run.hidden is not None
        seen = _Seen(rows=KEPT_ROWS if self.alpha == "auto" else 0)
        LayerRunner(unit.spec, unit.layer, unit.tensors).forward(run.hidden, seen)
        tensors = wide(unit)
        for norm, readers in READERS.items():
            s = self._factors(seen, GROUP_OF[norm], [tensors[f"{r}.weight"] for r in readers])
            stored = dense(unit.tensors)[f"{unit.name}.{norm}.weight"]
            divide_norm(tensors, norm, readers, storable(stored, s, unit.spec), unit.spec)
        if self.down:
            # gate's activation is no line, but the product is linear in up.
            s = self._factors(seen, "ffn.down_proj", [tensors["ffn.down_proj.weight"]])
            tensors["ffn.down_proj.weight"] = tensors["ffn.down_proj.weight"] * s
            tensors["ffn.up_proj.weight"] = tensors["ffn.up_proj.weight"] / s[:, None]
            if "ffn.up_proj.bias" in tensors:
                tensors["ffn.up_proj.bias"] = tensors["ffn.up_proj.bias"] / s
        out = narrow(unit, tensors)
        hidden = LayerRunner(unit.spec, unit.layer, out).forward(run.hidden)
        return UnitResult(tensors=out, hidden=hidden)

    def _factors(self, seen: _Seen, group: str, weights: list[Tensor]) -> Tensor:
        """s of a group's inputs, float64 [in_features]."""
        import torch

        x_max, weight = seen.peaks[group].double(), torch.cat(weights)
        if self.alpha != "auto":
            return smoothing(x_max, weight, self.alpha)
        x = torch.cat(seen.kept[group]).double()
        options = [torch.ones_like(x_max), *(smoothing(x_max, weight, a) for a in GRID)]
        return min(options, key=lambda s: w8a8_error(x, weight, s))


class _Seen:
    """Peaks of every channel, and a few rows, of each group's inputs."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.peaks: dict[str, Tensor] = {}
        self.kept: dict[str, list[Tensor]] = {}

    def __call__(self, group: str, x: Tensor) -> None:
        peak = x.abs().amax(0)
        old = self.peaks.get(group)
        self.peaks[group] = peak if old is None else peak.maximum(old)
        kept = self.kept.setdefault(group, [])
        room = self.rows - sum(map(len, kept))
        if room > 0:
            kept.append(x[:room].clone())


def smoothing(x_max: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """s [K] of inputs whose largest magnitudes are ``x_max`` [K], into ``weight`` [N, K]. A
    channel that never speaks, or that nobody reads, keeps its scale."""
    import torch

    w_max = weight.abs().amax(0)
    s = x_max**alpha / w_max ** (1 - alpha)
    usable = (x_max > 0) & (w_max > 0) & s.isfinite() & (s > 0)
    return torch.where(usable, s, torch.ones_like(s))


def w8a8_error(x: Tensor, weight: Tensor, s: Tensor) -> float:
    """Mean squared error of ``x @ weight.T`` when ``x / s`` and ``weight * s`` have 8 bits."""
    import torch

    from skimp.formats.weight import quantize

    rounded = quantize((weight * s).float(), W8A8).dequantize()
    inputs = quantize((x / s).float(), W8A8, scale_dtype=torch.float32).dequantize()
    return float((inputs @ rounded.T - (x @ weight.T).float()).square().mean())
