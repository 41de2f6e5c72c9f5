"""Mixed precision: the format of each matrix by what rounding it was measured to cost.

A pass that looks rounds one group of matrices at a time (those that read the same input, which
must share a format) to each candidate, and measures what that does to the residual stream h:

    error = mean over tokens of |h' - h|^2 / |h|^2

right behind the layer, for every candidate; and, for the worst one, at the end of the model, where
a few perturbed windows have travelled through all later layers (later layers dilute some errors
and feed on others). A candidate's damage is its error behind the layer times the growth to the end
that was measured for its group. Small independent errors add up, so the choice is a
multiple-choice knapsack: one candidate a group, least total damage, and no more bits, scales and
zero points counted, than ``target_bits`` a weight. An integer program solves it to the optimum
(HiGHS, Huangfu & Hall 2018, through SciPy).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from skimp.errors import ShrinkError
from skimp.formats.weight import QuantizedWeight, WeightFormat, quantize
from skimp.kernels.plain import rms_norm
from skimp.model.layers import RMSNorm
from skimp.shrink.capture import GROUPS, LayerRunner, embedded
from skimp.shrink.step import UnitResult

if TYPE_CHECKING:
    from skimp.model.spec import ModelSpec
    from skimp.shrink.step import Run, Unit

STATE: Final = "mixed"
DENSE: Final = "dense"
PASSES: Final = 2  # one that looks, one that quantizes
WINDOWS, WINDOW_TOKENS = 4, 128  # of the text that travel to the end, for each group
Rounder = Callable[[Tensor, WeightFormat], QuantizedWeight]


def format_name(format: WeightFormat | None) -> str:
    return DENSE if format is None else format.name


@dataclass(frozen=True, kw_only=True)
class Group:
    """Matrices that share a format; ``damage`` and ``bits`` (a weight) by candidate name."""

    matrices: tuple[str, ...]
    weights: int
    damage: Mapping[str, float]
    bits: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class MixedPrecision:
    """What a quantizing step holds to choose formats. ``candidates`` may contain None, which
    leaves a matrix as it is; ``lm_head`` counts an untied output matrix among those to choose
    for; ``rounder`` is the method that stands in for the one used in the end."""

    target_bits: float
    candidates: tuple[WeightFormat | None, ...]
    lm_head: bool = False
    rounder: Rounder = quantize

    def check(self, spec: ModelSpec) -> None:
        """Raises ShrinkError, naming the field, before anything is read."""
        names = [format_name(c) for c in self.candidates]
        if not names:
            raise ShrinkError("candidates: there is none")
        twice = next((n for n in names if names.count(n) > 1), None)
        if twice is not None:
            raise ShrinkError(f"candidates: {twice} is named twice")
        if self.lm_head and spec.tie_embeddings:
            raise ShrinkError("lm_head: it is the embedding table in this model")
        _solver()

    def look(self, unit: Unit, run: Run) -> UnitResult:
        """A visit of the first pass: adds this unit's groups to ``run.state``."""
        if run.tokens is None:
            raise ShrinkError("calibration: mixed precision measures activations and needs a text")
        found = run.state.setdefault(STATE, [])
        if unit.name == "embed":
            found.clear()
            return UnitResult(tensors=None, hidden=embedded(unit.spec, unit.tensors, run.tokens))
        assert run.hidden is not None
        samples, width = len(run.tokens), min(WINDOW_TOKENS, run.tokens.shape[1])
        text = run.hidden[:samples]
        windows = min(WINDOWS, samples)
        travellers = _unpacked(run.hidden[samples:], len(found) * windows, width)
        if unit.layer is None:
            self._arrive(unit, found, text[:windows, :width], travellers)
            if self.lm_head:
                found.append(self._look_at_head(unit, text))
            return UnitResult(tensors=None)
        runner = LayerRunner(unit.spec, unit.layer, unit.tensors)
        base, travellers = runner.forward(text), [runner.forward(w[None]) for w in travellers]
        for names in _groups(unit):
            weights = [_dense(unit, name) for name in names]
            worst = base, -1.0

            def damage(format: WeightFormat, names: tuple[str, ...] = names) -> float:
                nonlocal worst
                assert unit.layer is not None
                changed = dict(unit.tensors)
                for name in names:
                    changed[f"{name}.weight"] = self.rounder(_dense(unit, name), format)
                out = LayerRunner(unit.spec, unit.layer, changed).forward(text)
                error = relative_error(base, out)
                if error > worst[1]:
                    worst = out, error
                return error

            found.append(self._entry(names, weights, damage))
            # A token sees none behind it, so the start of a sample is a window of its own.
            travellers += worst[0][:windows, :width].split(1)
        return UnitResult(
            tensors=None, hidden=torch.cat((base, _packed(travellers, base.shape[1])))
        )

    def _arrive(
        self, unit: Unit, found: list[dict[str, Any]], base: Tensor, travellers: list[Tensor]
    ) -> None:
        """Scale every group's damages by the growth of its error, behind the final norm."""
        norm = _final_norm(unit)
        end = rms_norm(base, norm)
        for i, entry in enumerate(found):
            mine = torch.stack(travellers[i * len(base) : (i + 1) * len(base)])
            worst = max(entry["damage"].values())
            if worst > 0:
                growth = relative_error(end, rms_norm(mine, norm)) / worst
                entry["damage"] = {name: d * growth for name, d in entry["damage"].items()}

    def formats(self, state: Mapping[str, Any]) -> dict[str, WeightFormat]:
        """The format of every matrix that gets one, once the first pass is through."""
        groups = [
            Group(**{**entry, "matrices": tuple(entry["matrices"])}) for entry in state[STATE]
        ]
        by_name = {format_name(c): c for c in self.candidates}
        chosen = allocate(groups, self.target_bits)
        return {
            matrix: form
            for group, name in zip(groups, chosen)
            for matrix in group.matrices
            if (form := by_name[name]) is not None
        }

    def _look_at_head(self, unit: Unit, hidden: Tensor) -> dict[str, Any]:
        norm = _final_norm(unit)
        weight = _dense(unit, "lm_head")

        def damage(format: WeightFormat) -> float:
            low = self.rounder(weight, format).dequantize()
            errors = []
            for sample in hidden:  # a sample's logits at a time
                x = rms_norm(sample, norm)
                base = x @ weight.float().T
                middle = base.mean(-1, keepdim=True)  # softmax sees no common shift
                errors.append(relative_error(base - middle, x @ low.T - middle))
            return sum(errors) / len(errors)

        return self._entry(("lm_head",), [weight], damage)

    def _entry(
        self,
        names: tuple[str, ...],
        weights: Sequence[Tensor],
        damage: Callable[[WeightFormat], float],
    ) -> dict[str, Any]:
        """A :class:`Group` as JSON. Candidates whose groups do not fit the inputs are left out."""
        width = weights[0].shape[1]
        damages: dict[str, float] = {}
        bits: dict[str, float] = {}
        for candidate in self.candidates:
            name = format_name(candidate)
            if candidate is None:
                damages[name], bits[name] = 0.0, 8.0 * weights[0].dtype.itemsize
            elif candidate.group_size is None or width % candidate.group_size == 0:
                damages[name] = damage(candidate)
                bits[name] = candidate.bits_per_weight(width)
        if not damages:
            raise ShrinkError(f"candidates: no group_size divides the {width} inputs of {names[0]}")
        count = sum(w.numel() for w in weights)
        return {"matrices": list(names), "weights": count, "damage": damages, "bits": bits}


def relative_error(base: Tensor, changed: Tensor) -> float:
    """Mean over tokens of the squared error relative to the token's own square. A mean of sums
    would follow the few tokens whose activations are huge."""
    error = (changed - base).double().square().sum(-1)
    return float((error / base.double().square().sum(-1).clamp(min=1e-30)).mean())


def allocate(groups: Sequence[Group], target_bits: float) -> list[str]:
    """The candidate's name for each group: least damage within ``target_bits`` a weight on
    average. Raises ShrinkError naming target_bits, with the range there is, if none fits."""
    import numpy as np

    total = sum(group.weights for group in groups)
    if not total:
        raise ShrinkError("quantize: there is no matrix to choose a format for")
    least, most = (
        sum(pick(g.bits.values()) * g.weights for g in groups) / total for pick in (min, max)
    )
    if not least <= target_bits + 1e-9 or target_bits > most + 1e-9:
        raise ShrinkError(
            f"target_bits: {target_bits:g} is outside {least:.4g} to {most:.4g}, what the "
            "candidates allow on average"
        )
    optimize, sparse = _solver()
    pairs = [(i, name) for i, group in enumerate(groups) for name in group.damage]
    costs = np.array([groups[i].damage[name] for i, name in pairs])
    # The solver's tolerances are absolute: 100 makes them 1e-8 bits a weight.
    costs *= 1e4 / (costs.max() or 1.0)
    share = np.array([100 * groups[i].bits[n] * groups[i].weights / total for i, n in pairs])
    one = sparse.csr_array(
        (np.ones(len(pairs)), ([i for i, _ in pairs], range(len(pairs)))),
        shape=(len(groups), len(pairs)),
    )
    found = optimize.milp(
        costs,
        integrality=np.ones(len(pairs)),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one, 1, 1),
            optimize.LinearConstraint(share[None, :], -np.inf, 100 * target_bits + 1e-7),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if not found.success:
        raise ShrinkError(f"target_bits: {target_bits:g} could not be met: {found.message}")
    chosen = {i: name for (i, name), x in zip(pairs, found.x) if x > 0.5}
    return [chosen[i] for i in range(len(groups))]


def average_bits(groups: Sequence[Group], names: Sequence[str]) -> float:
    """Bits a weight of a choice."""
    total = sum(group.weights for group in groups)
    return sum(g.bits[name] * g.weights for g, name in zip(groups, names)) / total


def _solver() -> tuple[Any, Any]:
    try:
        from scipy import optimize, sparse
    except ImportError as error:
        raise ShrinkError(
            "target_bits: mixed precision needs SciPy; pip install 'skimp[shrink]'"
        ) from error
    return optimize, sparse


def _groups(unit: Unit) -> list[tuple[str, ...]]:
    return [tuple(f"{unit.name}.{name}" for name in names) for names in GROUPS.values()]


def _dense(unit: Unit, name: str) -> Tensor:
    tensor = unit.tensors[f"{name}.weight"]
    if isinstance(tensor, QuantizedWeight):
        raise ShrinkError(f"quantize: {name} is {tensor.format.name} already")
    return tensor


def _final_norm(unit: Unit) -> RMSNorm:
    spec = unit.spec
    norm = RMSNorm(spec.hidden_size, eps=spec.norm_eps, plus_one=spec.norm_plus_one)
    norm.weight = torch.nn.Parameter(_dense(unit, "norm"), requires_grad=False)
    return norm


def _packed(windows: Sequence[Tensor], length: int) -> Tensor:
    """Windows [1, P, D] one after another in rows of ``length`` tokens, as the pipeline keeps
    activations; the last row is filled up with zeros."""
    flat = torch.cat([window.flatten(0, 1) for window in windows])
    flat = torch.nn.functional.pad(flat, (0, 0, 0, -len(flat) % length))
    return flat.unflatten(0, (-1, length))


def _unpacked(rows: Tensor, count: int, width: int) -> list[Tensor]:
    """The reverse of :func:`_packed`: ``count`` windows [width, D]."""
    flat = rows.flatten(0, 1)[: count * width]
    return list(flat.unflatten(0, (count, width))) if count else []
