"""Fewer key-value heads (GQA, Ainslie et al. 2023): heads are aligned, grouped and merged.

A cache of fewer heads is smaller, and the step reads less of it. Merging heads as they stand breaks
a model: each spells what it remembers in a basis of its own. See ``heads.py`` for what may be done
to them, and *Align Attention Heads Before Merging Them* (EMNLP Findings 2025) for ``aligned``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from skimp.errors import ShrinkError
from skimp.shrink.fold import gain, narrow, require_attention, require_dense, wide
from skimp.shrink.step import Axis, Need, UnitResult

if TYPE_CHECKING:
    from torch import Tensor

    from skimp.model.spec import ModelSpec
    from skimp.shrink.heads import Heads
    from skimp.shrink.step import Run, Tensors, Unit

MEASURED_ONLY: Final = ("group", "weights", "refit")


class Gqa(BaseModel):
    """``kv_heads`` of every layer afterwards; the present number changes nothing.

    ``method`` joint gives a group the head from which all of its heads can best be had, by any
    matrix for values and a complex factor a RoPE pair for keys; aligned turns heads to each other
    (Procrustes, one phase a pair) and averages them; mean averages neighbours as they stand.
    ``group`` similarity puts heads together that lose least by it. ``weights`` energy counts errors
    as queries and output matrix magnify them. ``refit`` then fits the output matrix, and with
    aligned the size of keys, to what attention gave before, by least squares.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str] = "gqa"
    axis: ClassVar[Axis] = "cache"
    lossy: ClassVar[bool] = True

    kv_heads: int = Field(ge=1, le=1 << 16)
    method: Literal["joint", "aligned", "mean"] = "joint"
    group: Literal["similarity", "adjacent"] = "similarity"
    weights: Literal["energy", "equal"] = "energy"
    refit: bool = True

    @model_validator(mode="after")
    def _measured(self) -> Self:
        for name in MEASURED_ONLY:
            if self.method == "mean" and name in self.model_fields_set:
                raise ValueError(f"{name}: method mean measures nothing, so it has no {name}")
        return self

    def need(self, spec: ModelSpec) -> Need:
        require_dense(spec, self.kind)
        mixers = require_attention(spec, self.kind)
        counts = {(mixer.num_heads, mixer.num_kv_heads) for mixer in mixers}
        if len(counts) > 1:
            raise ShrinkError("kv_heads: layers of this model have different numbers of heads")
        ((_, present),) = counts
        if self.kv_heads > present:
            raise ShrinkError(f"kv_heads: {self.kv_heads} is more than the {present} there are")
        if present % self.kv_heads:
            raise ShrinkError(
                f"kv_heads: {self.kv_heads} groups of equal size cannot be made of {present} heads"
            )
        if self._nothing(spec):
            return Need()
        layer = max(spec.hidden_size * 2 * (m.q_dim + m.kv_dim) for m in mixers)
        moments = max(m.kv_dim**2 + 3 * m.q_dim**2 for m in mixers)
        if self.method == "mean":
            return Need(extra_bytes=2 * 8 * layer)
        # Two layers in float32 and in float64, moments of values and of what leaves attention.
        return Need(calibration=True, extra_bytes=2 * (8 + 4) * layer + 2 * 8 * moments)

    def planned_spec(self, spec: ModelSpec) -> ModelSpec:
        layers = tuple(
            dataclasses.replace(layer, mixer=dataclasses.replace(mixer, num_kv_heads=self.kv_heads))
            for layer, mixer in zip(spec.layers, require_attention(spec, self.kind))
        )
        return dataclasses.replace(spec, layers=layers)

    def output_spec(self, spec: ModelSpec, state: Mapping[str, Any]) -> ModelSpec:
        return self.planned_spec(spec)

    def visit(self, unit: Unit, run: Run) -> UnitResult:
        from skimp.shrink.capture import LayerRunner, embedded
        from skimp.shrink.refit import refitted

        if self._nothing(unit.spec):
            return UnitResult(tensors=unit.tensors)
        if self.method == "mean":
            return UnitResult(tensors=unit.tensors if unit.layer is None else self._pooled(unit))
        if run.tokens is None:
            raise ShrinkError(f"calibration: {self.kind} measures activations and needs a text")
        if unit.layer is None:
            table = unit.name == "embed"
            hidden = embedded(unit.spec, unit.tensors, run.tokens) if table else None
            return UnitResult(tensors=unit.tensors, hidden=hidden)
        assert run.hidden is not None
        out = self._merged(unit, run)
        if self.refit:
            out = refitted(unit, out, self.planned_spec(unit.spec), run.hidden)
        after = LayerRunner(self.planned_spec(unit.spec), unit.layer, out)
        return UnitResult(tensors=out, hidden=after.forward(run.hidden))

    def _nothing(self, spec: ModelSpec) -> bool:
        return self.kv_heads == require_attention(spec, self.kind)[0].num_kv_heads

    def _pooled(self, unit: Unit) -> Tensors:
        from skimp.shrink.heads import Heads, mean_heads

        assert unit.layer is not None
        tensors = wide(unit)
        heads = Heads.of(tensors, require_attention(unit.spec, self.kind)[unit.layer])
        return self._with(unit, tensors, mean_heads(heads, self.kv_heads))

    def _merged(self, unit: Unit, run: Run) -> Tensors:
        from skimp.shrink.capture import LayerRunner
        from skimp.shrink.heads import Heads, Merger, Norm, Pairs, Signals

        assert unit.layer is not None and run.hidden is not None and self.method != "mean"
        tensors, mixer = wide(unit), require_attention(unit.spec, self.kind)[unit.layer]
        heads, pairs, norm = Heads.of(tensors, mixer), Pairs(mixer), None
        if mixer.qk_norm:
            norm = Norm(
                q_gain=gain(tensors["mixer.q_norm.weight"], unit.spec),
                k_gain=gain(tensors["mixer.k_norm.weight"], unit.spec),
                eps=unit.spec.norm_eps,
            )
            if not bool(norm.shared(pairs).all()):
                run.note(
                    "gqa: norms of q and k have a gain a dimension, which no phase passes: keys "
                    "are aligned by half turns alone, values fully"
                )
        signals = Signals(heads, pairs, norm)
        runner = LayerRunner(unit.spec, unit.layer, unit.tensors)
        runner.watch(run.hidden, "mixer.qkv", lambda _, x: signals.add(x))
        merger = Merger(
            heads=heads,
            pairs=pairs,
            signals=signals,
            norm=norm,
            method=self.method,
            weighted=self.weights == "energy",
            refit=self.refit,
        )
        size = mixer.num_kv_heads // self.kv_heads
        groups = [list(range(i, i + size)) for i in range(0, mixer.num_kv_heads, size)]
        if self.group == "similarity":
            groups = merger.groups(self.kv_heads)
        return self._with(unit, tensors, merger.merged(groups))

    @staticmethod
    def _with(unit: Unit, tensors: dict[str, Tensor], heads: Heads) -> Tensors:
        return narrow(unit, {**tensors, **heads.tensors()})
