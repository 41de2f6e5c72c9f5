"""What trains: float32 masters behind the student's parameters, whole matrices or adapters.

A parameter of the decoder is what a forward computes with, in the dtype it computes in. Its master
is the same tensor where it trains whole in float32, a float32 copy where it computes in bfloat16,
and two thin factors where an adapter stands in for it: W = W0 + alpha / rank * B @ A (LoRA, Hu et
al. 2022). Gradients go to the masters as soon as they are made, one parameter's at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from skimp.formats.weight import QuantizedWeight
from skimp.kernels.plain import PlainOps
from skimp.model.decoder import Decoder
from skimp.model.layers import Linear
from skimp.model.loading import assign, empty_decoder
from skimp.model.spec import ModelSpec
from skimp.shrink.step import Tensors

# Rows of a smaller mean size than this train in units of their own: the optimiser's steps do not
# know how small a number is. The mla step makes such rows (see ``shrink/latents.py``).
TINY: Final = 2.0**-12
USUAL: Final = 2.0**-5
DOWN: Final = ".lora_a"
UP: Final = ".lora_b"


def build(
    spec: ModelSpec,
    tensors: Tensors,
    *,
    compute: torch.dtype,
    device: torch.device,
    positions: int,
) -> Decoder:
    """A decoder that plain ops can train or ask, on ``device``, for texts of ``positions`` tokens.

    Matrices and biases are in ``compute``, what multiplies the float32 residual stream (norms, and
    sinks) in float32. Low-bit matrices stay as they are.
    """
    decoder = empty_decoder(spec)
    for name, value in tensors.items():
        if isinstance(value, QuantizedWeight):
            linear = decoder.get_submodule(name.removesuffix(".weight"))
            assert isinstance(linear, Linear)
            linear.quantized = value.to(device)
        else:
            assign(decoder, name, value.to(device, computing(decoder, name, compute), copy=True))
    return decoder.bind(PlainOps(dtype=compute), max_positions=positions)


def computing(model: nn.Module, name: str, compute: torch.dtype) -> torch.dtype:
    """The dtype that a parameter computes in."""
    module = model.get_submodule(name.rpartition(".")[0])
    return compute if isinstance(module, Linear) else torch.float32


class Adapter:
    """Rank and scale of the factors of a matrix."""

    def __init__(self, rank: int, alpha: float) -> None:
        self.rank = rank
        self.scale = alpha / rank

    def start(self, name: str, weight: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """(A, B): A drawn for this name, uniform within 1 / sqrt(in_features); B zero, so that
        nothing has changed yet."""
        digest = hashlib.sha256(f"{seed} {name}".encode()).hexdigest()
        generator = torch.Generator().manual_seed(int(digest[:15], 16))
        bound = 1 / math.sqrt(weight.shape[1])
        down = torch.empty(self.rank, weight.shape[1]).uniform_(-bound, bound, generator=generator)
        return down, torch.zeros(weight.shape[0], self.rank)


class Weights:
    """A model's parameters called ``names``, trained; the others stay. ``tensors`` are those it
    began with. ``keep_zeros``: weights of matrices that are exactly 0 stay 0."""

    def __init__(
        self,
        model: nn.Module,
        tensors: Tensors,
        names: Iterable[str],
        *,
        adapter: Adapter | None = None,
        keep_zeros: bool = False,
        seed: int = 0,
    ) -> None:
        self._start = tensors
        self._names = dict.fromkeys(names)
        self._adapter, self._keep_zeros = adapter, keep_zeros
        self.masters: dict[str, Tensor] = {}
        self._bases: dict[str, Tensor] = {}  # of adapters, as they are stored
        self._units: dict[str, Tensor] = {}  # [rows, 1], of matrices with tiny rows
        self._parameters = dict(model.named_parameters())
        for name in self._names:
            parameter = self._parameters[name].requires_grad_()
            start = _dense(tensors, name)
            if (units := _units(start)) is not None:
                self._units[name] = units.to(parameter.device)
            if adapter is not None:
                self._bases[name] = start.to(parameter.device, copy=True)
                down, up = adapter.start(name, parameter, seed)
                self.masters[name + DOWN] = down.to(parameter.device)
                self.masters[name + UP] = up.to(parameter.device)
                hook = self._to_factors
            else:
                own = parameter.detach()
                if not self._is_master(name):
                    own = start.to(parameter.device, torch.float32, copy=True)
                if name in self._units:
                    own /= self._units[name]
                self.masters[name] = own
                hook = self._to_master
            parameter.register_post_accumulate_grad_hook(partial(hook, name))

    def of(self, names: Collection[str]) -> dict[str, Tensor]:
        """The masters of these parameters."""
        keys = {f"{name}{part}" for name in names for part in ("", DOWN, UP)}
        return {key: master for key, master in self.masters.items() if key in keys}

    def load(self, masters: Mapping[str, Tensor]) -> None:
        """Take over saved masters."""
        for key, master in self.masters.items():
            master.copy_(masters[key])
        self.moved()

    def moved(self) -> None:
        """Compute with what the masters have become; their gradients are used up."""
        for master in self.masters.values():
            master.grad = None
        for name in self._names:
            if not self._is_master(name):
                self._parameters[name].data.copy_(self._value(name))

    def settle(self) -> None:
        """Compute with the weights as :meth:`written`, which may round them."""
        for name in self._names:
            self._parameters[name].data.copy_(self.written_one(name))

    def written(self) -> Mapping[str, Tensor]:
        """All tensors of the student, in the dtypes it began with, each made when asked for."""
        return _Written(self._start, self.written_one)

    def written_one(self, name: str) -> Tensor:
        """One of :meth:`written`."""
        old = _dense(self._start, name)
        return self._value(name).to("cpu", old.dtype) if name in self._names else old

    def _is_master(self, name: str) -> bool:
        whole = self._adapter is None and name not in self._units
        return whole and self._parameters[name].dtype == torch.float32

    def _value(self, name: str) -> Tensor:
        """What a parameter should be, float32."""
        if self._adapter is None:
            master = self.masters[name]
            return master * self._units[name] if name in self._units else master
        down, up = self.masters[name + DOWN], self.masters[name + UP]
        start = self._bases[name].float()
        change = self._adapter.scale * (up @ down)
        if name in self._units:
            change *= self._units[name]
        return start + (change * (start != 0) if self._keep_zeros else change)

    # ---- gradients ------------------------------------------------------------------------

    def _to_master(self, name: str, parameter: Tensor) -> None:
        grad, master = self._taken(name, parameter), self.masters[name]
        if self._masked(parameter):
            grad.mul_(master != 0)
        master.grad = _sum(master.grad, grad)

    def _to_factors(self, name: str, parameter: Tensor) -> None:
        assert self._adapter is not None
        grad = self._taken(name, parameter).mul_(self._adapter.scale)
        if self._masked(parameter):
            grad.mul_(self._bases[name] != 0)
        down, up = self.masters[name + DOWN], self.masters[name + UP]
        up.grad = _sum(up.grad, grad @ down.T)
        down.grad = _sum(down.grad, up.T @ grad)

    def _taken(self, name: str, parameter: Tensor) -> Tensor:
        """A parameter's gradient in float32, which it has no more, for what its master is in."""
        grad = parameter.grad
        assert grad is not None
        parameter.grad = None
        grad = grad.float()
        return grad.mul_(self._units[name]) if name in self._units else grad

    def _masked(self, parameter: Tensor) -> bool:
        return self._keep_zeros and parameter.dim() == 2


class _Written(Mapping[str, Tensor]):
    """Tensors made on demand: held all at once, mapped ones would take a file descriptor each."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _dense(tensors: Tensors, name: str) -> Tensor:
    tensor = tensors[name]
    assert isinstance(tensor, Tensor), name
    return tensor


def _units(start: Tensor) -> Tensor | None:
    """Powers of two by which the rows of a matrix are of a usual size; None if they are anyway."""
    if start.dim() != 2:
        return None
    size = start.float().square().mean(1, keepdim=True).sqrt()
    tiny = (size > 0) & (size < TINY)
    if not tiny.any():
        return None
    units = torch.exp2(torch.log2(size / USUAL).round())
    return torch.where(tiny, units, torch.ones_like(units))


def _sum(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)
