"""Local attention: most layers see a window of the past, a few all of it.

Which layers keep the whole past is measured: one layer at a time is given the window, and what that
does travels through all later layers to the end of the model, where two harms are taken:

- on long text, the KL divergence of the next token's distribution at positions beyond the window;
- on prompts that hide a pair of tokens farther back than the window and ask for it, how much less
  probable the right answer is. Ordinary text hardly shows what only the far past knows.

Each is taken as a share of what all layers together lose, and the layers of the greatest sums stay
global. The target is a stock class that says the same: see ``docs/local.md``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from skimp.errors import ConfigError, ShrinkError
from skimp.model.spec import AttentionSpec
from skimp.shrink.fold import largest_layer, require_attention
from skimp.shrink.step import Axis, Need, UnitResult

if TYPE_CHECKING:
    from torch import Tensor

    from skimp.model.spec import LayerSpec, ModelSpec
    from skimp.shrink.step import Run, Unit

STATE: Final = "local"  # the answers of the prompts, the layers surveyed, what was measured
GLOBAL: Final = "local_global"  # the layers that stay global
TEXTS: Final = 4  # samples of the text that travel for each layer
PROMPTS: Final = 12  # prompts that do
ROWS: Final = 256  # positions whose distributions are in memory at once
OWN: Final = ("cwm", "gemma3_text")  # classes in which layers may differ, and engines honour it
_QWEN: Final = "vLLM refuses it where layers differ, and SGLang ignores it and runs full attention"
UNHEEDED: Final[Mapping[str, str]] = {
    "qwen2": _QWEN,
    "qwen3": _QWEN,
    "gemma2": "whether vLLM and SGLang read the layer_types of this class was not checked",
}
Index = Annotated[int, Field(ge=0)]


class Local(BaseModel):
    """Layers that are not global see ``window`` tokens, themselves included.

    ``global_layers`` is how many stay global, or which (from 0), or ``every:N`` for layers 0, N,
    2N and so on. How many: ``choose`` says which, measured on the calibration text, or every
    n-th. ``target`` is the class that is written, auto the one that engines honour. ``insist``
    writes one that some engine ignores or refuses.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str] = "local"
    axis: ClassVar[Axis] = "cache"
    lossy: ClassVar[bool] = True

    window: int = Field(ge=1, le=1 << 30)
    global_layers: (
        Index | tuple[Index, ...] | Annotated[str, Field(pattern=r"^every:[1-9]\d{0,4}$")]
    )
    choose: Literal["measured", "every"] = "measured"
    target: Literal["auto", "cwm", "mistral", "gemma2", "gemma3_text", "qwen2", "qwen3"] = "auto"
    insist: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if "choose" in self.model_fields_set and not isinstance(self.global_layers, int):
            raise ValueError("choose: global_layers says which layers, so there is no choice")
        if isinstance(self.global_layers, tuple):
            twice = next((i for i in self.global_layers if self.global_layers.count(i) > 1), None)
            if twice is not None:
                raise ValueError(f"global_layers: {twice} is named twice")
        return self

    # ---- plan -----------------------------------------------------------------------------

    def need(self, spec: ModelSpec) -> Need:
        require_attention(spec, self.kind)
        if self._nothing(spec):
            return Need()
        planned = self.planned_spec(spec)
        self._check_windows(spec)
        if planned.family in UNHEEDED and not self.insist:
            raise ShrinkError(
                f"target: {planned.family} with windows: {UNHEEDED[planned.family]}; set insist to "
                "true to write it for transformers and skimp"
            )
        self._check_target(spec, planned)
        if not self._measures(spec):
            return Need()
        streams = 1 + len(_candidates(spec))
        layer = largest_layer(spec)
        head = 4 * spec.vocab_size * (spec.hidden_size + 6 * ROWS)
        return Need(
            passes=2,
            calibration=True,
            extra_bytes=max(2 * 4 * layer, head),
            # Of samples of twice the window, the shortest that will do.
            extra_tokens=streams * (TEXTS + PROMPTS) * min(spec.max_positions, 2 * self.window),
        )

    def planned_spec(self, spec: ModelSpec) -> ModelSpec:
        """For a measured choice with every n-th layer global: the sizes are the same."""
        if self._nothing(spec):
            return spec
        return self._with_global(spec, self._pattern(spec))

    def output_spec(self, spec: ModelSpec, state: Mapping[str, Any]) -> ModelSpec:
        if self._nothing(spec):
            return spec
        chosen = state[GLOBAL] if self._measures(spec) else self._pattern(spec)
        return self._with_global(spec, chosen)

    def _nothing(self, spec: ModelSpec) -> bool:
        """No position of the model lies beyond the window, or every layer stays global."""
        if self.window >= spec.max_positions:
            return True
        layers = _candidates(spec)
        narrowed = any(layer.mixer.window not in (None, self.window) for layer in spec.layers)
        return len(self._pattern(spec)) == len(layers) and not narrowed

    def _measures(self, spec: ModelSpec) -> bool:
        count, layers = self.global_layers, _candidates(spec)
        return isinstance(count, int) and self.choose == "measured" and 0 < count < len(layers)

    def _pattern(self, spec: ModelSpec) -> list[int]:
        """The layers that stay global, where that is not measured."""
        layers, wanted = _candidates(spec), self.global_layers
        if isinstance(wanted, tuple):
            for index in wanted:
                if index >= spec.num_layers:
                    raise ShrinkError(
                        f"global_layers: {index} is none of the {spec.num_layers} layers"
                    )
                if index not in layers:
                    raise ShrinkError(f"global_layers: layer {index} has a window already")
            return sorted(wanted)
        if isinstance(wanted, str):
            return [i for i in layers if i % int(wanted.partition(":")[2]) == 0]
        if wanted > len(layers):
            raise ShrinkError(f"global_layers: {wanted} is more than the {len(layers)} there are")
        return [layers[i * len(layers) // wanted] for i in range(wanted)]

    def _with_global(self, spec: ModelSpec, stay: Sequence[int]) -> ModelSpec:
        layers = tuple(
            layer if i in stay else _windowed(layer, self.window)
            for i, layer in enumerate(spec.layers)
        )
        changed = dataclasses.replace(spec, layers=layers)
        return dataclasses.replace(changed, family=self._family(changed))

    def _family(self, changed: ModelSpec) -> str:
        if self.target != "auto":
            return self.target
        family = changed.family
        if family in (*OWN, *UNHEEDED):
            return family
        mixed = any(layer.mixer.window is None for layer in changed.layers)
        return "cwm" if mixed else "mistral"

    def _check_windows(self, spec: ModelSpec) -> None:
        """A config has one window, and RoPE may depend on whether a layer has one."""
        stay = set(self._pattern(spec))
        windowed = [layer.mixer for layer in spec.layers if layer.mixer.window is not None]
        for mixer in windowed:
            assert mixer.window is not None
            if mixer.window < self.window:
                raise ShrinkError(
                    f"window: layers have one of {mixer.window} already, and a config has a single "
                    "one; choose at most that"
                )
        for index in _candidates(spec):
            rope = spec.layers[index].mixer.rope
            other = next((m.rope for m in windowed if m.rope != rope), rope)
            if other != rope and len(stay) < len(_candidates(spec)):
                raise ShrinkError(
                    f"global_layers: {spec.family} turns layers with a window by a RoPE of their "
                    f"own, which global layer {index} was not trained with; all "
                    f"{len(_candidates(spec))} global layers have to stay global"
                )

    def _check_target(self, spec: ModelSpec, planned: ModelSpec) -> None:
        from skimp.model import families

        try:
            families.to_config(planned)
        except ConfigError as error:
            raise ShrinkError(
                f"target: {spec.family} does not fit {planned.family}: {error}"
            ) from error

    # ---- run ------------------------------------------------------------------------------

    def visit(self, unit: Unit, run: Run) -> UnitResult:
        if self._measures(unit.spec) and not self._nothing(unit.spec) and run.pass_index == 0:
            return UnitResult(tensors=None, hidden=self._look(unit, run))
        if unit.name == "head":
            self._explain(unit.spec, run)
        return UnitResult(tensors=unit.tensors)

    def _explain(self, spec: ModelSpec, run: Run) -> None:
        if self._nothing(spec):
            run.note(f"local: a window of {self.window} changes nothing here")
            return
        out = self.output_spec(spec, run.state)
        if out.family == "cwm":
            run.note(
                "local: written as cwm: transformers, vLLM and skimp serve it, SGLang has no such "
                "class"
            )
        elif out.family in UNHEEDED:
            run.note(
                f"local: written as {out.family}: transformers and skimp serve it; "
                f"{UNHEEDED[out.family]}"
            )

    def _look(self, unit: Unit, run: Run) -> Tensor | None:
        """Streams of activations [1 + layers surveyed, rows, T, D], as samples: the model as it is,
        then the model with one layer local, for each layer that was met so far."""
        from skimp.shrink.capture import LayerRunner

        if unit.name == "embed":
            return self._begin(unit, run)
        assert run.hidden is not None
        state = run.state[STATE]
        if unit.layer is None:
            self._arrive(unit, run)
            return None
        layer = unit.spec.layers[unit.layer]
        out = LayerRunner(unit.spec, unit.layer, unit.tensors).forward(run.hidden)
        if layer.mixer.window is not None:
            return out
        import torch

        state["layers"].append(unit.layer)
        local = self._with_global(unit.spec, [i for i in _candidates(unit.spec) if i != unit.layer])
        base = run.hidden[: state["rows"]]
        changed = LayerRunner(local, unit.layer, unit.tensors).forward(base)
        return torch.cat((out, changed))

    def _begin(self, unit: Unit, run: Run) -> Tensor:
        import torch

        from skimp.meter.retrieval import token_probes
        from skimp.shrink.capture import embedded

        if run.tokens is None:
            raise ShrinkError("calibration: local measures what layers lose and needs a text")
        length = run.tokens.shape[1]
        if length < 2 * self.window:
            raise ShrinkError(
                f"calibration.tokens: {length} is less than twice the window of {self.window}, so "
                "little of a sample would lie beyond it; give longer samples"
            )
        try:
            probes = token_probes(
                run.tokens.tolist(),
                count=PROMPTS,
                most_depth=0.75 * (1 - self.window / length),
                seed=0,
            )
        except ValueError as error:
            raise ShrinkError(str(error)) from None
        prompts = torch.tensor([probe.prompt for probe in probes])
        rows = torch.cat((run.tokens[:TEXTS], prompts))
        answers = [probe.candidates[probe.label][0] for probe in probes]
        run.state[STATE] = {"answers": answers, "rows": len(rows), "layers": []}
        return embedded(unit.spec, unit.tensors, rows)

    def _arrive(self, unit: Unit, run: Run) -> None:
        """Measure every stream against the first, and choose."""
        from skimp.formats.weight import QuantizedWeight
        from skimp.shrink.capture import HeadRunner

        assert run.hidden is not None
        state = run.state[STATE]
        norm = unit.tensors["norm.weight"]
        assert not isinstance(norm, QuantizedWeight)
        matrix = unit.table if unit.table is not None else unit.tensors["lm_head.weight"]
        head = HeadRunner(unit.spec, norm, matrix)
        base, *streams = run.hidden.split(state["rows"])
        texts = len(base) - len(state["answers"])

        def answered(stream: Tensor) -> float:
            rows = head.log_probs(stream[texts:, -1])
            return sum(float(row[a]) for row, a in zip(rows, state["answers"])) / len(rows)

        kl, lost, right = [0.0] * len(streams), [], answered(base)
        for text in range(texts):
            for begin in range(self.window, base.shape[1], ROWS):
                at = slice(begin, begin + ROWS)
                own = head.log_probs(base[text, at])
                for i, stream in enumerate(streams):
                    theirs = head.log_probs(stream[text, at])
                    kl[i] += float((own.exp() * (own - theirs)).sum())
        positions = texts * (base.shape[1] - self.window)
        kl = [total / positions for total in kl]
        lost = [right - answered(stream) for stream in streams]
        state["kl"], state["lost"] = kl, lost
        damage = combined(kl, lost)
        assert isinstance(self.global_layers, int)
        ranked = sorted(range(len(damage)), key=lambda i: (-damage[i], i))
        stay = sorted(state["layers"][i] for i in ranked[: self.global_layers])
        run.state[GLOBAL] = stay
        run.note(
            f"local: layers {', '.join(map(str, stay))} stay global; alone with a window, a layer "
            "loses (KL of text, log-probability of hidden answers): "
            + "; ".join(f"{n}: {a:.2g}, {b:.2g}" for n, a, b in zip(state["layers"], kl, lost))
        )


def combined(kl: Sequence[float], lost: Sequence[float]) -> list[float]:
    """Each layer's share of the divergence plus its share of the lost answers; a gain is none."""
    found = [0.0] * len(kl)
    for values in (kl, lost):
        losses = [max(0.0, value) for value in values]
        total = sum(losses)
        if total > 0:
            found = [a + b / total for a, b in zip(found, losses)]
    return found


def _candidates(spec: ModelSpec) -> list[int]:
    """The layers that see the whole past."""
    return [i for i, layer in enumerate(spec.layers) if layer.mixer.window is None]


def _windowed(layer: LayerSpec, window: int) -> LayerSpec:
    assert isinstance(layer.mixer, AttentionSpec)
    return dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, window=window))
