"""The ``quantize`` step of a recipe: which matrices, in what format, by which method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from skimp.errors import ShrinkError, shown
from skimp.formats.weight import QuantizedWeight, WeightFormat
from skimp.shrink.fold import largest_layer, require_attention, require_gated
from skimp.shrink.step import Axis, Need, UnitResult

if TYPE_CHECKING:
    from torch import Tensor

    from skimp.model.spec import ModelSpec
    from skimp.shrink.quantize.mixed import MixedPrecision
    from skimp.shrink.step import Run, Tensors, Unit

GPTQ_ONLY: Final = ("damping", "block", "act_order")
CALIBRATED: Final = ("gptq", "awq")
UNIFORM_ONLY: Final = ("format", "group_size", "symmetric", "activations")
DENSE: Final = "dense"  # the candidate that leaves a matrix as it is
DEFAULT_CANDIDATES: Final = ("int4-g128-asym", "int4-g64-asym", "int4-g32-asym", "int8")


def _known(name: str) -> str:
    if name != DENSE:
        try:
            WeightFormat.named(name)
        except ValueError:
            raise ValueError(
                f"{shown(name)} is no format; write int4-g128 (any group size), "
                f"int4-g128-asym, int8, int8-a8, fp8, fp8-afp8 or {DENSE}"
            ) from None
    return name


class Quantize(BaseModel):
    """``format`` bf16 leaves a bfloat16 checkpoint as it is and casts another.

    ``group_size`` is that of int4 (default 128, null: a scale an output). ``symmetric`` defaults
    to true, but for HQQ in int4, whose point are the zero points. ``activations`` int8 with int8
    is W8A8, with int4 W4A8; fp8 with fp8 is the FP8_DYNAMIC of other tools.
    ``exclude`` has shell patterns over names such as ``layers.3.ffn.down_proj``.

    ``target_bits`` in place of ``format`` is mixed precision: each matrix gets one of the
    ``candidates``, those that harm least among all choices of so many bits a weight on average,
    scales and zero points counted; ``dense`` leaves a matrix as it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str] = "quantize"
    axis: ClassVar[Axis] = "weights"
    lossy: ClassVar[bool] = True

    format: Literal["bf16", "int8", "int4", "fp8"] | None = None
    target_bits: float | None = Field(default=None, gt=0, le=64)
    candidates: tuple[Annotated[str, AfterValidator(_known)], ...] = DEFAULT_CANDIDATES
    method: Literal["rtn", "hqq", "gptq", "awq"] = "rtn"
    group_size: int | None = Field(default=None, ge=16)
    symmetric: bool | None = None
    activations: Literal["none", "int8", "fp8"] = "none"
    include: tuple[Literal["lm_head", "embed_tokens"], ...] = ()
    exclude: tuple[str, ...] = ()
    damping: float = Field(default=0.01, gt=0, le=1)
    block: int = Field(default=128, ge=1)
    act_order: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = self.model_fields_set
        for name in GPTQ_ONLY:
            if name in given and self.method != "gptq":
                raise ValueError(f"{name}: only method gptq has it, not {self.method}")
        if self.target_bits is not None:
            return self._consistent_mixed()
        if self.format is None:
            raise ValueError("format: missing; this step needs it, or target_bits")
        if "candidates" in given:
            raise ValueError("candidates: they go with target_bits, not with format")
        if self.format == "bf16":
            extra = sorted(given - {"format"})
            if extra:
                raise ValueError(f"{extra[0]}: format bf16 rounds nothing, so it has no {extra[0]}")
        if self.group_size is not None and self.format != "int4":
            raise ValueError(f"group_size: {self.format} has a scale an output and no groups")
        if self.symmetric is False and self.format != "int4":
            raise ValueError(f"symmetric: {self.format} weights have no zero point")
        pairs = {"int8": ("int8", "int4"), "fp8": ("fp8",)}.get(self.activations)
        if pairs is not None and self.format not in pairs:
            raise ValueError(
                f"activations: {self.activations} goes with {' or '.join(pairs)}, not {self.format}"
            )
        return self

    def _consistent_mixed(self) -> Self:
        for name in UNIFORM_ONLY:
            if name in self.model_fields_set:
                raise ValueError(f"{name}: target_bits is given, so candidates say it")
        if not self.candidates:
            raise ValueError("candidates: there is none")
        twice = next((n for n in self.candidates if self.candidates.count(n) > 1), None)
        if twice is not None:
            raise ValueError(f"candidates: {twice} is named twice")
        if "embed_tokens" in self.include:
            raise ValueError("include: embed_tokens has no inputs that target_bits could measure")
        return self

    @property
    def weight_format(self) -> WeightFormat | None:
        """Of every targeted matrix; None for bf16."""
        if self.format == "bf16":
            return None
        activations = None if self.activations == "none" else self.activations
        if self.format in ("int8", "fp8"):
            kind: Literal["int", "float"] = "int" if self.format == "int8" else "float"
            return WeightFormat(kind=kind, bits=8, activations=activations)
        size = self.group_size if "group_size" in self.model_fields_set else 128
        symmetric = self.method != "hqq" if self.symmetric is None else self.symmetric
        return WeightFormat(
            kind="int", bits=4, group_size=size, symmetric=symmetric, activations=activations
        )

    # ---- plan -----------------------------------------------------------------------------

    def need(self, spec: ModelSpec) -> Need:
        if self.method == "awq":  # it folds what it finds into what makes an input
            require_attention(spec, f"{self.kind}: method awq")
        ffns = require_gated(spec, self.kind)
        targets = self.formats(spec) if self.target_bits is None else self._targets(spec)
        if not targets and self.target_bits is None:
            return Need()
        widest = max(spec.hidden_size, *(ffn.intermediate_size for ffn in ffns))
        layer = largest_layer(spec)
        extra = 5 * layer
        if self.method in CALIBRATED:
            # The layer in float32, moments and their factors in float64.
            extra = 3 * 4 * layer + 6 * 8 * widest**2
        if self.target_bits is None:
            return Need(calibration=self.method in CALIBRATED, extra_bytes=extra)
        mixed = self._mixed(spec)
        mixed.check(spec)
        return Need(
            passes=mixed.passes,
            calibration=True,
            extra_bytes=max(extra, mixed.extra_bytes(spec, layer)),
            extra_tokens=mixed.extra_tokens(spec),
            open_bits=dict.fromkeys(targets, self.target_bits),
            choices=", ".join(self.candidates),
        )

    def planned_spec(self, spec: ModelSpec) -> ModelSpec:
        """For mixed precision with the most bits that each matrix could get."""
        if self.format == "bf16":
            return dataclasses.replace(spec, dtype="bfloat16")
        formats = self.formats(spec) if self.target_bits is None else self._mixed(spec).widest(spec)
        return dataclasses.replace(spec, formats={**spec.formats, **formats})

    def output_spec(self, spec: ModelSpec, state: Mapping[str, Any]) -> ModelSpec:
        if self.target_bits is None:
            return self.planned_spec(spec)
        chosen = self._mixed(spec).formats(state)
        return dataclasses.replace(spec, formats={**spec.formats, **chosen})

    def formats(self, spec: ModelSpec) -> dict[str, WeightFormat]:
        """What each targeted matrix becomes, without mixed precision. Raises ShrinkError, naming
        the field, if the model cannot take it."""
        form = self.weight_format
        targets = self._targets(spec)
        if form is None:
            return {}
        for name, width in targets.items():
            if form.group_size is not None and width % form.group_size:
                raise ShrinkError(
                    f"group_size: {name} has {width} inputs, no multiple of {form.group_size}"
                )
        return dict.fromkeys(targets, form)

    def _targets(self, spec: ModelSpec) -> dict[str, int]:
        """Inputs of each matrix that shall become low-bit. Raises ShrinkError."""
        if self.format == "bf16":
            return {}
        shapes = _inputs(spec)
        if "lm_head" in self.include and spec.tie_embeddings:
            raise ShrinkError("include: lm_head is embed_tokens in this model; include that")
        optional = {"lm_head", "embed_tokens"} - set(self.include)
        for pattern in self.exclude:
            if not any(fnmatchcase(name, pattern) for name in shapes):
                raise ShrinkError(f"exclude: no matrix of the model is called {pattern!r}")
        chosen = {
            name: width
            for name, width in shapes.items()
            if name not in optional and not any(fnmatchcase(name, p) for p in self.exclude)
        }
        for index, layer in enumerate(spec.layers):
            for group in layer.input_groups.values():
                names = [f"layers.{index}.{name}" for name in group]
                inside = [name for name in names if name in chosen]
                if inside and len(inside) < len(names):
                    left = next(name for name in names if name not in chosen)
                    raise ShrinkError(
                        f"exclude: {left} shares its input with {inside[0]}, so both or neither"
                    )
        for name in chosen:
            if name in spec.formats:
                raise ShrinkError(f"quantize: {name} is {spec.formats[name].name} already")
        return chosen

    def _mixed(self, spec: ModelSpec) -> MixedPrecision:
        from skimp.shrink.quantize.mixed import MixedPrecision

        assert self.target_bits is not None
        targets = self._targets(spec)
        forms = (None if name == DENSE else WeightFormat.named(name) for name in self.candidates)
        return MixedPrecision(
            target_bits=self.target_bits,
            candidates=tuple(forms),
            lm_head="lm_head" in targets,
            skip=frozenset(_inputs(spec)) - targets.keys(),
            rounder=self._blind,
        )

    # ---- run ------------------------------------------------------------------------------

    def visit(self, unit: Unit, run: Run) -> UnitResult:
        from skimp.shrink.capture import LayerRunner, embedded

        if self.format == "bf16":
            return UnitResult(tensors=_cast(unit.tensors))
        if self.target_bits is None:
            formats = self.formats(unit.spec)
        elif run.pass_index == 0:
            return self._mixed(unit.spec).look(unit, run)
        else:
            formats = self._mixed(unit.spec).formats(run.state)
        calibrated = self.method in CALIBRATED
        if calibrated and run.tokens is None:
            raise ShrinkError(f"calibration: {self.method} measures activations and needs a text")
        if unit.layer is None:
            out = self._outer(unit, run, formats)
            hidden = None
            if calibrated and unit.name == "embed":
                assert run.tokens is not None
                hidden = embedded(unit.spec, out, run.tokens)
            return UnitResult(tensors=out, hidden=hidden)
        if not calibrated:
            done: dict[str, Tensor | QuantizedWeight] = dict(unit.tensors)
            for matrix, form in formats.items():
                if f"{matrix}.weight" in done:
                    done[f"{matrix}.weight"] = self._blind(done[f"{matrix}.weight"], form)
            return UnitResult(tensors=done)
        from skimp.shrink.quantize.calibrated import awq_layer, gptq_layer

        assert run.hidden is not None
        if self.method == "awq":
            layer_out = awq_layer(unit, run.hidden, formats)
        else:
            layer_out = gptq_layer(
                unit,
                run.hidden,
                formats,
                damping=self.damping,
                block=self.block,
                act_order=self.act_order,
                note=run.note,
            )
        hidden = LayerRunner(unit.spec, unit.layer, layer_out).forward(run.hidden)
        return UnitResult(tensors=layer_out, hidden=hidden)

    def _blind(self, weight: Tensor | QuantizedWeight, form: WeightFormat) -> QuantizedWeight:
        from skimp.shrink.quantize.hqq import hqq
        from skimp.shrink.quantize.rtn import rtn, stored_scale_dtype

        assert not isinstance(weight, QuantizedWeight)
        method = hqq if self.method == "hqq" else rtn
        return method(weight, form, scale_dtype=stored_scale_dtype(weight))

    def _outer(self, unit: Unit, run: Run, formats: Mapping[str, WeightFormat]) -> Tensors:
        """The table (which has no inputs to measure) or the output matrix."""
        out = dict(unit.tensors)
        for matrix, form in formats.items():
            name = f"{matrix}.weight"
            if name not in out:
                continue
            if matrix == "lm_head" and self.method in CALIBRATED:
                from skimp.shrink.quantize.calibrated import quantize_head

                assert run.hidden is not None
                out[name] = quantize_head(
                    unit, run.hidden, form, None if self.method == "awq" else self, run.note
                )
            else:
                out[name] = self._blind(out[name], form)
        return out


def _inputs(spec: ModelSpec) -> dict[str, int]:
    """Inputs of every matrix that may become low-bit, in the decoder's order."""
    widths = {"embed_tokens": spec.hidden_size}
    for i, layer in enumerate(spec.layers):
        shapes = layer.matrices(spec.hidden_size)
        for group in layer.input_groups.values():
            widths |= {f"layers.{i}.{name}": shapes[name][0] for name in group}
    if not spec.tie_embeddings:
        widths["lm_head"] = spec.hidden_size
    return widths


def _cast(tensors: Tensors) -> Tensors:
    import torch

    return {
        name: tensor if isinstance(tensor, QuantizedWeight) else tensor.to(torch.bfloat16)
        for name, tensor in tensors.items()
    }
