"""The ``mla`` step: keys and values of heads become one latent a token, in a stock class.

The result is a dense ``deepseek_v3`` that transformers, vLLM and SGLang load. See ``latents.py``
for the algebra, and docs/mla.md for what it costs and gains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from skimp.errors import ShrinkError
from skimp.model.spec import AttentionSpec, LatentAttentionSpec, RopeSpec
from skimp.shrink.fold import dense, largest_layer, narrow, require_attention, require_dense, wide
from skimp.shrink.step import Axis, Need, UnitResult

if TYPE_CHECKING:
    from torch import Tensor

    from skimp.model.spec import ModelSpec
    from skimp.shrink.latents import Heads, Split
    from skimp.shrink.step import Run, Tensors, Unit

LATENT_EPS: Final = 1e-6
LEFT: Final = 1e-6  # the most that is left of a latent's mean square beside epsilon
TRIED: Final = 4  # samples that candidates for ``fold`` are compared on
FOLDS: Final = (1, 2, 4, 8, 16)
# What a dense deepseek_v3 has no place for, and what is said of it.
NO_PLACE: Final = {
    "qkv_bias": "biases of queries, keys and values",
    "out_bias": "a bias of the output projection",
    "qk_norm": "norms of queries and keys, which forbid absorption",
    "softcap": "a cap on scores",
    "sinks": "sinks",
    "window": "windows",
}


class Mla(BaseModel):
    """``latent`` numbers a token, and ``rope`` more that are rotated, in place of keys and values
    (both of all KV heads). ``fold`` neighbouring frequencies are taken for one; ``auto`` tries
    some on the calibration text, for each layer. ``method``: ``pca`` finds the latent that loses
    least on the calibration text with keys and values balanced, ``svd`` the one that loses least
    of the matrices. ``refit``: the output projection is fitted to what the layer gave before, by
    least squares on the calibration text. ``keep_norm_eps``: leave the other norms' epsilon as it
    is where it is not 1e-6; then only engines that give the latent's norm its own read the result
    rightly."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str] = "mla"
    axis: ClassVar[Axis] = "cache"
    lossy: ClassVar[bool] = True

    latent: int = Field(default=512, ge=1)
    rope: int = Field(default=64, ge=2)
    fold: int | Literal["auto"] = "auto"
    method: Literal["pca", "svd"] = "pca"
    refit: bool = True
    keep_norm_eps: bool = False

    def need(self, spec: ModelSpec) -> Need:
        require_dense(spec, self.kind)
        mixers = require_attention(spec, self.kind)
        for index, (layer, mixer) in enumerate(zip(spec.layers, mixers)):
            self._check(index, mixer)
            if layer.post_norms or layer.ffn.bias:
                what = "norms behind sublayers" if layer.post_norms else "biases of the ffn"
                raise ShrinkError(f"mla: layer {index} has {what}: deepseek_v3 has no place for it")
        if spec.norm_plus_one or spec.embed_scale != 1.0 or spec.logit_softcap is not None:
            raise ShrinkError(f"mla: deepseek_v3 has no place for what {spec.family} does to norms")
        if spec.dtype == "float16":
            raise ShrinkError(
                "mla: weights so small that they make the latent's norm idle are zero in float16; "
                "convert the checkpoint to bfloat16 first"
            )
        widest = max(spec.hidden_size, 2 * max(m.kv_dim for m in mixers))
        # A layer in float64, moments, and the eigenvectors of keys and values together.
        return Need(
            calibration=True, extra_bytes=8 * (3 * largest_layer(spec) + 6 * widest * widest)
        )

    def _check(self, index: int, mixer: AttentionSpec) -> None:
        for name, what in NO_PLACE.items():
            if getattr(mixer, name):
                raise ShrinkError(f"mla: layer {index} has {what}: deepseek_v3 has no place for it")
        rope = mixer.rope
        if rope is None or rope.rotary_dim != mixer.head_dim or rope.interleaved:
            raise ShrinkError(f"mla: layer {index}: whole heads must be rotated, in two halves")
        kind = None if rope.scaling is None else rope.scaling["rope_type"]
        if kind in ("yarn", "dynamic"):
            raise ShrinkError(f"mla: layer {index}: rope_type {kind} does not carry over")
        if mixer.head_dim % self.rope or self.rope % 2:
            raise ShrinkError(
                f"rope: {self.rope} must be even and divide the heads' size, {mixer.head_dim}"
            )
        if self.fold != "auto" and self.fold not in self._folds(mixer):
            known = ", ".join(map(str, self._folds(mixer)))
            raise ShrinkError(f"fold: {self.fold} is not one of {known}, auto")

    def _folds(self, mixer: AttentionSpec) -> list[int]:
        """Frequencies that may be taken for one: at least as many as one is kept of."""
        every, half = mixer.head_dim // self.rope, mixer.head_dim // 2
        return [f for f in FOLDS if f % every == 0 and half % f == 0] or [every]

    def planned_spec(self, spec: ModelSpec) -> ModelSpec:
        layers = tuple(
            dataclasses.replace(layer, mixer=self._target(mixer))
            for layer, mixer in zip(spec.layers, require_attention(spec, self.kind))
        )
        return dataclasses.replace(
            spec,
            family="deepseek_v3",
            layers=layers,
            tie_embeddings=False,  # vLLM's class has an output matrix of its own
            norm_eps=spec.norm_eps if self.keep_norm_eps else LATENT_EPS,
        )

    def output_spec(self, spec: ModelSpec, state: Mapping[str, Any]) -> ModelSpec:
        return self.planned_spec(spec)

    def _target(self, mixer: AttentionSpec) -> LatentAttentionSpec:
        assert mixer.rope is not None
        rope = RopeSpec(
            theta=mixer.rope.theta,
            rotary_dim=self.rope,
            scaling=mixer.rope.scaling,
            interleaved=True,  # what other engines take for granted
        )
        return LatentAttentionSpec(
            num_heads=mixer.num_heads,
            latent_dim=self.latent,
            rope_dim=self.rope,
            nope_dim=mixer.head_dim,
            value_dim=mixer.head_dim,
            rope=rope,
            scale=(mixer.head_dim + self.rope) ** -0.5,
            latent_eps=LATENT_EPS,
        )

    # ---- a unit ---------------------------------------------------------------------------

    def visit(self, unit: Unit, run: Run) -> UnitResult:
        from skimp.shrink.capture import LayerRunner, embedded
        from skimp.shrink.refit import refitted

        if run.tokens is None:
            raise ShrinkError("calibration: mla measures activations and needs a text")
        if unit.layer is None:
            table = unit.name == "embed"
            hidden = embedded(unit.spec, unit.tensors, run.tokens) if table else None
            if table:
                self._note_eps(unit.spec, run)
            return UnitResult(tensors=self._untied(unit, run), hidden=hidden)
        assert run.hidden is not None
        made = self.planned_spec(unit.spec)
        tensors, line = self._converted(unit, run, made)
        if self.refit:
            tensors = refitted(unit, tensors, made, run.hidden)
        hidden = LayerRunner(made, unit.layer, tensors).forward(run.hidden)
        run.note(line)
        return UnitResult(tensors=tensors, hidden=hidden)

    def _untied(self, unit: Unit, run: Run) -> Tensors:
        if unit.table is None:
            return unit.tensors
        table = dense({"table": unit.table})["table"]
        run.note(f"mla: the tied table becomes two, {table.nbytes:,} bytes more on disk")
        return {**unit.tensors, "lm_head.weight": table}

    def _note_eps(self, spec: ModelSpec, run: Run) -> None:
        if spec.norm_eps == LATENT_EPS:
            return
        if self.keep_norm_eps:
            run.note(
                f"mla: norms keep their epsilon of {spec.norm_eps:g}; vLLM and SGLang would give "
                f"it to the latent's norm too, which needs {LATENT_EPS:g}: only transformers and "
                "skimp serve this checkpoint"
            )
        else:
            run.note(
                f"mla: all norms get an epsilon of {LATENT_EPS:g} in place of {spec.norm_eps:g}, "
                "because vLLM and SGLang have one for all"
            )

    def _converted(self, unit: Unit, run: Run, made: ModelSpec) -> tuple[Tensors, str]:
        """The layer in the spec ``made``, and a line on how."""
        from skimp.shrink.capture import LayerRunner
        from skimp.shrink.latents import Heads, split_keys
        from skimp.shrink.quantize.statistics import Inputs

        assert unit.layer is not None and run.hidden is not None
        mixer = require_attention(unit.spec, self.kind)[unit.layer]
        before = wide(unit)
        heads = Heads(
            spec=mixer,
            queries=before["mixer.q_proj.weight"],
            keys=before["mixer.k_proj.weight"],
            values=before["mixer.v_proj.weight"],
            out=before["mixer.o_proj.weight"],
        )
        runner = LayerRunner(unit.spec, unit.layer, unit.tensors)
        inputs = Inputs(unit.spec.hidden_size)
        runner.watch(run.hidden, "mixer.qkv", lambda _, x: inputs.add(x))
        moments = inputs.moments
        folds = self._folds(mixer) if self.fold == "auto" else [self.fold]
        # Where fewer samples are compared, all candidates are compared on the same ones.
        tried = run.hidden[:TRIED]
        wanted = runner.forward(tried) if len(folds) > 1 else None
        best: tuple[float, dict[str, Tensor], str] | None = None
        for fold in folds:
            split = split_keys(heads, moments, rotated=self.rope, fold=fold)
            tensors = self._tensors(unit, made, heads, split, moments, before)
            damage = 0.0
            if wanted is not None:
                found = LayerRunner(made, unit.layer, tensors).forward(tried)
                damage = float((found - wanted).double().square().sum())
            line = f"mla: {unit.name}: {fold} frequencies for one, {split.kept:.0%} of keys rotated"
            if best is None or damage < best[0]:
                best = damage, tensors, line
        assert best is not None
        return best[1], best[2]

    def _tensors(
        self,
        unit: Unit,
        made: ModelSpec,
        heads: Heads,
        split: Split,
        moments: Tensor,
        before: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        from skimp.shrink.latents import largest_mean_square, latent_layer, project, unnormed

        assert unit.layer is not None
        target = made.layers[unit.layer].mixer
        assert isinstance(target, LatentAttentionSpec)
        latents = project(
            split, heads, moments, latent=self.latent, calibrated=self.method == "pca"
        )
        matrices = latent_layer(heads, target, split, latents)
        largest = largest_mean_square(latents.down * before["mixer_norm.weight"])
        gain = unnormed(matrices, target, largest=largest, below=LEFT)
        kept = {name: t for name, t in before.items() if not name.startswith("mixer.")}
        new = {f"mixer.{name}.weight": matrix for name, matrix in matrices.items()}
        return narrow(unit, kept | new | {"mixer.kv_a_norm.weight": gain})
