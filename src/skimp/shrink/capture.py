"""One layer at a time over calibration activations, with a look at the inputs of every matrix."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from skimp.formats.weight import QuantizedWeight
from skimp.kernels.lowbit import round_rows
from skimp.kernels.ops import StepInputs
from skimp.kernels.plain import PlainMatrix, PlainOps
from skimp.model.decoder import DecoderLayer
from skimp.model.layers import Linear, RMSNorm
from skimp.model.loading import assign
from skimp.model.rope import rope_tables
from skimp.model.spec import ModelSpec
from skimp.shrink.step import Tensors

Observe = Callable[[str, Tensor], None]
Rounding = Literal["int8", "fp8"] | None


class LayerRunner:
    """Layer ``layer`` of a model with ``tensors`` (its unit's), in float32.

    Low-bit matrices act as the weights they stand for, on inputs rounded as their format says.
    """

    def __init__(self, spec: ModelSpec, layer: int, tensors: Tensors) -> None:
        with torch.device("meta"):
            self._layer = DecoderLayer(spec.layers[layer], spec)
        prefix = f"layers.{layer}."
        for name, tensor in tensors.items():
            value = tensor.dequantize() if isinstance(tensor, QuantizedWeight) else tensor.float()
            assign(self._layer, name.removeprefix(prefix), value)
        self._rope = spec.layers[layer].mixer.rope
        rounding: dict[str, Rounding] = {}
        groups = spec.layers[layer].input_groups
        for group, names in groups.items():
            matrix = tensors.get(f"{prefix}{names[0]}.weight")
            if isinstance(matrix, QuantizedWeight):
                rounding[group] = matrix.format.activations
        self._ops = _ObservedOps(self._layer, groups, rounding)

    def forward(self, hidden: Tensor, observe: Observe | None = None) -> Tensor:
        """Activations that leave the layer, float32 [samples, T, D]. ``observe(group, x)`` sees
        the inputs [T, in_features] of each of the layer's ``input_groups``, sample by sample."""
        step = self._bind(hidden.shape[1])
        self._ops.observe, self._ops.until = observe, None
        with torch.no_grad():
            return torch.stack([self._layer(sample, self._ops, step) for sample in hidden.float()])

    def watch(self, hidden: Tensor, group: str, observe: Observe) -> None:
        """Show ``observe`` what it sees in ``forward``, but compute nothing behind ``group``."""
        step = self._bind(hidden.shape[1])
        self._ops.observe, self._ops.until = observe, group
        with torch.no_grad():
            for sample in hidden.float():
                with contextlib.suppress(_Seen):
                    self._layer(sample, self._ops, step)

    def _bind(self, count: int) -> StepInputs:
        tables = None if self._rope is None else rope_tables(self._rope, count)
        self._layer.mixer.bind(self._ops, tables, None)
        self._layer.ffn.bind(self._ops)
        return whole_text(torch.zeros(count, dtype=torch.int32))


class HeadRunner:
    """The final norm and the output matrix of a model, in float32."""

    def __init__(self, spec: ModelSpec, norm: Tensor, matrix: Tensor | QuantizedWeight) -> None:
        self._norm, self._softcap = final_norm(spec, norm), spec.logit_softcap
        self._scale = spec.logit_scale
        with torch.device("meta"):
            linear = Linear(spec.hidden_size, spec.vocab_size)
        value = matrix.dequantize() if isinstance(matrix, QuantizedWeight) else matrix.float()
        assign(linear, "weight", value)
        self._ops = PlainOps()
        self._matrix = self._ops.pack((linear,))

    def log_probs(self, hidden: Tensor) -> Tensor:
        """float64 [T, V] of what leaves the last layer [T, D]: a divergence is a difference of
        near numbers."""
        step = whole_text(torch.zeros(len(hidden), dtype=torch.int32))
        with torch.no_grad():
            logits = self._ops.logits(
                hidden, self._matrix, self._norm, self._softcap, step, scale=self._scale
            )
        return logits.double().log_softmax(-1)


def final_norm(spec: ModelSpec, weight: Tensor) -> RMSNorm:
    norm = RMSNorm(spec.hidden_size, eps=spec.norm_eps, plus_one=spec.norm_plus_one)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm


class _Seen(Exception):
    """The inputs that were asked for have been observed."""


class _ObservedOps(PlainOps):
    def __init__(
        self,
        layer: DecoderLayer,
        groups: Mapping[str, tuple[str, ...]],
        rounding: Mapping[str, Rounding],
    ) -> None:
        super().__init__()
        self._rounding = rounding
        self.observe: Observe | None = None
        self.until: str | None = None  # the group behind whose inputs nothing is computed
        modules = dict(layer.named_modules())
        self._groups = {id(modules[names[0]]): group for group, names in groups.items()}

    def _product(self, x: Tensor, matrix: PlainMatrix) -> Tensor:
        group = self._groups.get(id(matrix.linears[0]))
        if group is None:
            return super()._product(x, matrix)
        if self.observe is not None:
            self.observe(group, x)
        if group == self.until:
            raise _Seen
        rounding = self._rounding.get(group)
        return super()._product(x if rounding is None else round_rows(x, rounding), matrix)


def whole_text(token_ids: Tensor) -> StepInputs:
    """One sequence, every position, nothing cached; ``token_ids`` int32 [T]."""
    count = len(token_ids)
    positions = torch.arange(count, dtype=torch.int32)
    return StepInputs(
        token_ids=token_ids,
        positions=positions,
        row_seq=torch.zeros(count, dtype=torch.int32),
        kv_end=positions + 1,
        seq_starts=torch.tensor([0, count], dtype=torch.int32),
        logit_rows=positions,
    )


def embedded(spec: ModelSpec, tensors: Tensors, tokens: Tensor) -> Tensor:
    """What the embed unit hands to the first layer, float32 [samples, T, D]."""
    table = tensors["embed_tokens.weight"]
    if isinstance(table, QuantizedWeight):
        table = table.dequantize()
    return torch.nn.functional.embedding(tokens, table).float() * spec.embed_scale
