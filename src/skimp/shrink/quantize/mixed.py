"""Mixed precision: the format of each matrix by what rounding it was measured to cost.

A pass that looks rounds one group of matrices at a time (those that read the same input, which
must share a format) to each candidate, and measures what that does to the residual stream h:

    error = mean over tokens of |h' - h|^2 / |h|^2

right behind the layer, for every candidate; and, for the worst one, the KL divergence of the next
token's distribution at the end of the model, where a few perturbed windows have travelled through
all later layers (later layers dilute some errors and feed on others). A candidate's damage is that
divergence, scaled as the errors behind the layer are. Small independent errors add up, so the
choice is a
multiple-choice knapsack: one candidate a group, least total damage, and no more bits, scales and
zero points counted, than ``target_bits`` a weight. An integer program solves it to the optimum
(HiGHS, Huangfu & Hall 2018, through SciPy).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from skimp.cost.work import item_bytes
from skimp.errors import ShrinkError
from skimp.formats.weight import QuantizedWeight, WeightFormat, quantize
from skimp.model.loading import parameter_shapes
from skimp.shrink.capture import HeadRunner, LayerRunner, embedded
from skimp.shrink.quantize.step import DENSE
from skimp.shrink.step import UnitResult

if TYPE_CHECKING:
    from skimp.model.spec import ModelSpec
    from skimp.shrink.step import Run, Unit

STATE: Final = "mixed"  # the groups, as measured
CHOSEN: Final = "mixed_chosen"  # a candidate's name for each
PASSES: Final = 2  # one that looks, one that quantizes
SAMPLES: Final = 8  # of the text are looked at: it takes a forward a group and candidate
WINDOWS, WINDOW_TOKENS = 4, 128  # of these travel to the end, for each group
Rounder = Callable[[Tensor, WeightFormat], QuantizedWeight]


def format_name(format: WeightFormat | None) -> str:
    return DENSE if format is None else format.name


@dataclass(frozen=True, kw_only=True)
class Group:
    """Matrices that share a format; ``bits`` (a weight) and ``damage``, once it is measured, by
    candidate name."""

    matrices: tuple[str, ...]
    weights: int
    bits: Mapping[str, float]
    damage: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MixedPrecision:
    """What a quantizing step holds to choose formats. ``candidates`` may contain None, which
    leaves a matrix as it is; ``lm_head`` counts an untied output matrix among those to choose
    for; ``skip`` are matrices that are none of its business; ``rounder`` is the method that stands
    in for the one used in the end."""

    target_bits: float
    candidates: tuple[WeightFormat | None, ...]
    lm_head: bool = False
    skip: frozenset[str] = frozenset()
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
        _check_range(self.groups(spec), self.target_bits)
        _solver()

    @property
    def passes(self) -> int:
        return PASSES

    def extra_tokens(self, spec: ModelSpec) -> int:
        """Tokens of the windows that travel along, at the last layer."""
        return len(self.groups(spec)) * WINDOWS * WINDOW_TOKENS

    def extra_bytes(self, spec: ModelSpec, layer_weights: int) -> int:
        """Of memory at the worst unit: a layer as it is and one that is changed, in float32, beside
        what rounding takes; or the output matrix twice and the logits of a sample."""
        head = 3 * 4 * spec.vocab_size * spec.hidden_size if self.lm_head else 0
        return max((2 * 4 + 5) * layer_weights, head)

    def widest(self, spec: ModelSpec) -> dict[str, WeightFormat]:
        """Of each matrix the format of most bits, short of leaving it dense, that it can get."""
        forms = {c.name: c for c in self.candidates if c is not None}
        found: dict[str, WeightFormat] = {}
        for group in self.groups(spec):
            names = [name for name in group.bits if name in forms]
            if names:
                most = max(names, key=lambda name: group.bits[name])
                found |= dict.fromkeys(group.matrices, forms[most])
        return found

    def groups(self, spec: ModelSpec) -> list[Group]:
        """What there is to choose for, nothing measured. Raises ShrinkError if no candidate fits a
        matrix."""
        shapes = parameter_shapes(spec)
        names = [
            tuple(f"layers.{index}.{name}" for name in group)
            for index, layer in enumerate(spec.layers)
            for group in layer.input_groups.values()
        ]
        names += [("lm_head",)] if self.lm_head else []
        return [
            self._group(group, [shapes[f"{n}.weight"] for n in group], item_bytes(spec.dtype))
            for group in names
            if group[0] not in self.skip
        ]

    def _group(
        self, names: tuple[str, ...], shapes: Sequence[Sequence[int]], dense_bytes: int
    ) -> Group:
        """Candidates whose groups do not fit the inputs are left out."""
        width = shapes[0][1]
        bits: dict[str, float] = {}
        for candidate in self.candidates:
            if candidate is None:
                bits[DENSE] = 8.0 * dense_bytes
            elif candidate.group_size is None or width % candidate.group_size == 0:
                bits[candidate.name] = candidate.bits_per_weight(width)
        if not bits:
            raise ShrinkError(f"candidates: no group_size divides the {width} inputs of {names[0]}")
        weights = sum(math.prod(shape) for shape in shapes)
        return Group(matrices=names, weights=weights, bits=bits)

    def look(self, unit: Unit, run: Run) -> UnitResult:
        """A visit of the first pass: adds this unit's groups to ``run.state``."""
        if run.tokens is None:
            raise ShrinkError("calibration: mixed precision measures activations and needs a text")
        if unit.name == "embed":
            run.state[STATE] = []
            hidden = embedded(unit.spec, unit.tensors, run.tokens[:SAMPLES])
            return UnitResult(tensors=None, hidden=hidden)
        assert run.hidden is not None
        found = run.state[STATE]
        samples, width = min(SAMPLES, len(run.tokens)), min(WINDOW_TOKENS, run.tokens.shape[1])
        text = run.hidden[:samples]
        windows = min(WINDOWS, samples)
        travellers = _unpacked(run.hidden[samples:], len(found) * windows, width)
        if unit.layer is None:
            base = text[:windows, :width]
            self._arrive(unit, found, base, travellers)
            if self.lm_head:
                found.append(self._look_at_head(unit, base))
            self._choose(run)
            return UnitResult(tensors=None)
        runner = LayerRunner(unit.spec, unit.layer, unit.tensors)
        base, travellers = runner.forward(text), [runner.forward(w[None]) for w in travellers]
        for names in _groups(unit):
            if names[0] in self.skip:
                continue
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
        if travellers:
            base = torch.cat((base, _packed(travellers, base.shape[1])))
        return UnitResult(tensors=None, hidden=base)

    def _arrive(
        self, unit: Unit, found: list[dict[str, Any]], base: Tensor, travellers: list[Tensor]
    ) -> None:
        """Turn every group's errors into divergences of the model's output."""
        matrix = unit.table if unit.table is not None else unit.tensors["lm_head.weight"]
        head = HeadRunner(unit.spec, _dense(unit, "norm"), matrix)
        harm = [0.0] * len(found)
        for window, hidden in enumerate(base):
            right = head.log_probs(hidden)
            for i in range(len(found)):
                theirs = head.log_probs(travellers[i * len(base) + window])
                harm[i] += divergence(right, theirs) / len(base)
        for entry, kl in zip(found, harm):
            worst = max(entry["damage"].values())
            if worst > 0:
                entry["damage"] = {name: d * kl / worst for name, d in entry["damage"].items()}

    def _choose(self, run: Run) -> None:
        groups = [Group(**entry) for entry in run.state[STATE]]
        run.state[CHOSEN] = chosen = allocate(groups, self.target_bits)
        counts = Counter(name for g, name in zip(groups, chosen) for _ in g.matrices)
        what = ", ".join(f"{counts[n]} x {n}" for n in sorted(counts))
        bits = average_bits(groups, chosen)
        run.note(f"mixed precision: {what}; {bits:.4f} bits a weight on average")

    def formats(self, state: Mapping[str, Any]) -> dict[str, WeightFormat]:
        """The format of every matrix that gets one, once the first pass is through."""
        by_name = {format_name(c): c for c in self.candidates}
        return {
            matrix: form
            for entry, name in zip(state[STATE], state[CHOSEN], strict=True)
            for matrix in entry["matrices"]
            if (form := by_name[name]) is not None
        }

    def _look_at_head(self, unit: Unit, base: Tensor) -> dict[str, Any]:
        weight, norm = _dense(unit, "lm_head"), _dense(unit, "norm")
        right = HeadRunner(unit.spec, norm, weight)

        def damage(format: WeightFormat) -> float:
            low = HeadRunner(unit.spec, norm, self.rounder(weight, format))
            kl = [divergence(right.log_probs(h), low.log_probs(h)) for h in base]
            return sum(kl) / len(kl)

        return self._entry(("lm_head",), [weight], damage)

    def _entry(
        self,
        names: tuple[str, ...],
        weights: Sequence[Tensor],
        damage: Callable[[WeightFormat], float],
    ) -> dict[str, Any]:
        """A :class:`Group` as JSON."""
        group = self._group(names, [w.shape for w in weights], weights[0].dtype.itemsize)
        by_name = {format_name(c): c for c in self.candidates}
        measured = {n: 0.0 if (c := by_name[n]) is None else damage(c) for n in group.bits}
        return dataclasses.asdict(dataclasses.replace(group, damage=measured))


def relative_error(base: Tensor, changed: Tensor) -> float:
    """Mean over tokens of the squared error relative to the token's own square. A mean of sums
    would follow the few tokens whose activations are huge."""
    error = (changed - base).double().square().sum(-1)
    return float((error / base.double().square().sum(-1).clamp(min=1e-30)).mean())


def divergence(right: Tensor, other: Tensor) -> float:
    """Mean KL over rows of log-probabilities [T, V]."""
    return float((right.exp() * (right - other)).sum(-1).mean())


def allocate(groups: Sequence[Group], target_bits: float) -> list[str]:
    """The candidate's name for each group: least damage within ``target_bits`` a weight on
    average. Raises ShrinkError naming target_bits, with the range there is, if none fits."""
    import numpy as np

    _check_range(groups, target_bits)
    total = sum(group.weights for group in groups)
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
    with _silent_stdout():
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


def _check_range(groups: Sequence[Group], target_bits: float) -> None:
    total = sum(group.weights for group in groups)
    if not total:
        raise ShrinkError("exclude: it leaves no matrix to choose a format for")
    least, most = (
        sum(pick(g.bits.values()) * g.weights for g in groups) / total for pick in (min, max)
    )
    if not least <= target_bits + 1e-9 or target_bits > most + 1e-9:
        raise ShrinkError(
            f"target_bits: {target_bits:g} is outside {least:.4g} to {most:.4g}, what the "
            "candidates allow on average"
        )


@contextlib.contextmanager
def _silent_stdout() -> Iterator[None]:
    """Nothing of what C code prints. HiGHS 1.12 leaves a line of debugging on stdout, whatever it
    is told, now and then; it would spoil ``--json``."""
    print(end="", flush=True)
    try:
        kept = os.dup(1)
    except OSError:  # there is no stdout
        yield
        return
    flush = ctypes.CDLL(None).fflush
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        flush(None)
        os.dup2(nowhere, 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


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
    assert unit.layer is not None
    groups = unit.spec.layers[unit.layer].input_groups.values()
    return [tuple(f"{unit.name}.{name}" for name in names) for names in groups]


def _dense(unit: Unit, name: str) -> Tensor:
    tensor = unit.tensors[f"{name}.weight"]
    if isinstance(tensor, QuantizedWeight):
        raise ShrinkError(f"quantize: {name} is {tensor.format.name} already")
    return tensor


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
