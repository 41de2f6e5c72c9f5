"""Exact rewrites of a layer that the folding steps share: norm gains, float64 arithmetic, refusals.

A norm's gain multiplies the inputs of the matrices behind it, so ``norm(x) * g @ W.T`` is
``norm(x) @ (W * g).T``: any part of the gain may move into the matrices' columns, and back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from skimp.errors import ShrinkError
from skimp.formats.weight import QuantizedWeight
from skimp.model.spec import AttentionSpec, GatedFFNSpec, all_of

if TYPE_CHECKING:
    from torch import Tensor

    from skimp.model.spec import ModelSpec
    from skimp.shrink.step import Tensors, Unit

# Matrices that read the output of each norm of a layer.
READERS: Final[Mapping[str, tuple[str, ...]]] = {
    "mixer_norm": ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"),
    "ffn_norm": ("ffn.gate_proj", "ffn.up_proj"),
}


def require_dense(spec: ModelSpec, kind: str) -> None:
    """Raises ShrinkError if a matrix is quantized already: folding into it would round it anew."""
    if spec.formats:
        name = next(iter(spec.formats))
        raise ShrinkError(
            f"{kind}: {name} is {spec.formats[name].name} already; put {kind} before quantize"
        )


def require_attention(spec: ModelSpec, kind: str) -> tuple[AttentionSpec, ...]:
    """Each layer's mixer. Raises ShrinkError unless all have keys and values of heads."""
    mixers = (layer.mixer for layer in spec.layers)
    return all_of(AttentionSpec, mixers, lambda i: _cannot(kind, i, "has latent attention"))


def require_gated(spec: ModelSpec, kind: str) -> tuple[GatedFFNSpec, ...]:
    """Each layer's feed-forward network. Raises ShrinkError if one is a mixture of experts."""
    ffns = (layer.ffn for layer in spec.layers)
    return all_of(GatedFFNSpec, ffns, lambda i: _cannot(kind, i, "is a mixture of experts"))


def _cannot(kind: str, layer: int, what: str) -> ShrinkError:
    return ShrinkError(f"{kind}: layer {layer} {what}, which {kind} cannot take")


def largest_layer(spec: ModelSpec) -> int:
    """Weights of the layer that has most."""
    return max(
        sum(n_in * n_out for n_in, n_out in layer.matrices(spec.hidden_size).values())
        for layer in spec.layers
    )


def dense(tensors: Tensors) -> dict[str, Tensor]:
    """The tensors of a unit without low-bit matrices (:func:`require_dense` keeps them out)."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        assert not isinstance(tensor, QuantizedWeight), name
        found[name] = tensor
    return found


def wide(unit: Unit) -> dict[str, Tensor]:
    """A unit's tensors by name without the unit's prefix (``mixer.q_proj.weight``), float64."""
    prefix = "" if unit.layer is None else f"{unit.name}."
    return {name.removeprefix(prefix): t.double() for name, t in dense(unit.tensors).items()}


def narrow(
    unit: Unit, tensors: Mapping[str, Tensor], dtype: str | None = None
) -> dict[str, Tensor]:
    """The reverse of :func:`wide`. ``dtype`` None: each tensor gets the dtype it came with."""
    import torch

    prefix = "" if unit.layer is None else f"{unit.name}."
    old = dense(unit.tensors)
    target = None if dtype is None else getattr(torch, dtype)
    narrowed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        source = old.get(prefix + name)
        kept = next(iter(old.values())).dtype if source is None else source.dtype
        narrowed[prefix + name] = tensor.to(target or kept).contiguous()
    return narrowed


def gain(tensor: Tensor, spec: ModelSpec) -> Tensor:
    """The factor a stored norm weight stands for."""
    return tensor + 1.0 if spec.norm_plus_one else tensor


def stored_gain(factor: Tensor, spec: ModelSpec) -> Tensor:
    """The reverse of :func:`gain`."""
    return factor - 1.0 if spec.norm_plus_one else factor


def divide_norm(
    tensors: dict[str, Tensor], norm: str, readers: Sequence[str], s: Tensor, spec: ModelSpec
) -> None:
    """Divide a norm's factor by ``s`` [D] and multiply its readers' columns by it, in place."""
    key = f"{norm}.weight"
    tensors[key] = stored_gain(gain(tensors[key], spec) / s, spec)
    for reader in readers:
        tensors[f"{reader}.weight"] = tensors[f"{reader}.weight"] * s


def storable(norm: Tensor, s: Tensor, spec: ModelSpec) -> Tensor:
    """``s`` moved by what storing ``norm``'s factor over s in the norm's dtype rounds off, so that
    the norm and the columns behind it stay exact reciprocals; float64 [D]."""
    import torch

    before = gain(norm.double(), spec)
    after = gain(stored_gain(before / s, spec).to(norm.dtype).double(), spec)
    return torch.where((before != 0) & (after != 0), before / after, s)


def absorb_norm(
    tensors: dict[str, Tensor], norm: str, readers: Sequence[str], spec: ModelSpec
) -> None:
    """Move a norm's whole factor into its readers; it stays as ones. A zero factor is exact too."""
    import torch

    key = f"{norm}.weight"
    factor = gain(tensors[key], spec)
    for reader in readers:
        tensors[f"{reader}.weight"] = tensors[f"{reader}.weight"] * factor
    tensors[key] = stored_gain(torch.ones_like(factor), spec)
