"""What healing takes, from shapes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from skimp.cost.work import item_bytes
from skimp.model.loading import parameter_shapes
from skimp.model.spec import FFNSpec, GatedFFNSpec, ModelSpec
from skimp.shrink.heal.loss import CHUNK_VALUES

if TYPE_CHECKING:
    from skimp.shrink.heal.step import Heal


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """``numbers`` train. Memory is that of the device, two saves take the disk."""

    numbers: int
    memory_bytes: int
    disk_bytes: int


def footprint(step: Heal, spec: ModelSpec, original: ModelSpec) -> Footprint:
    """Both models, masters, gradients and moments, what one forward keeps for its backward, and
    the logits of a chunk."""
    width = item_bytes(step.computes_in)
    shapes = parameter_shapes(spec)
    trained = step.trained(spec)
    sizes = {name: math.prod(shapes[name]) for name in trained}
    whole = sum(sizes.values())
    numbers = whole
    if step.lora is not None:
        numbers = sum(step.lora.rank * sum(shapes[name]) for name in trained)
    models = width * (_count(spec) + _count(original))
    # Gradient and two moments; a master, unless it is what the student computes with.
    masters = 4 * numbers * (4 if step.lora is not None or width < 4 else 3)
    passing = (4 + width) * max(sizes.values())  # the gradient of one parameter, on its way
    chunk = 5 * 4 * min(CHUNK_VALUES[step.device], step.rows * spec.vocab_size)
    head = 4 * spec.vocab_size * spec.hidden_size
    memory = models + masters + passing + chunk + head + step.rows * _kept(spec, width)
    return Footprint(numbers=numbers, memory_bytes=memory, disk_bytes=2 * 3 * 4 * numbers)


def _count(spec: ModelSpec) -> int:
    return sum(math.prod(shape) for shape in parameter_shapes(spec).values())


def _kept(spec: ModelSpec, width: int) -> int:
    """Bytes a row that the backward needs of all layers: the residual stream in float32 and what
    norms make of it, q, k and v on their ways, and the ffn's products."""
    total = 0
    for layer in spec.layers:
        matrices = layer.mixer.matrices(spec.hidden_size)
        heads = sum(out for name, (_, out) in matrices.items() if name != "o_proj")
        stream = 4 * 6 * spec.hidden_size + 2 * width * spec.hidden_size
        total += stream + (8 + 4 * width) * heads + 5 * width * _inner(layer.ffn)
    return total


def _inner(ffn: FFNSpec) -> int:
    """Numbers a token between the products of a feed-forward network, or of those it meets."""
    if isinstance(ffn, GatedFFNSpec):
        return ffn.intermediate_size
    shared = 0 if ffn.shared is None else ffn.shared.intermediate_size
    return ffn.experts_per_token * ffn.intermediate_size + shared
