"""The loop: parts, optimiser steps, measurements, saves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from skimp.errors import ShrinkError
from skimp.kernels.ops import StepInputs
from skimp.kernels.plain import PlainOps
from skimp.model.decoder import DecoderLayer
from skimp.model.spec import ModelSpec
from skimp.shrink.heal.data import (
    Cursor,
    Stream,
    check_ids,
    cut,
    documents,
    packed,
    split_off,
    step_inputs,
)
from skimp.shrink.heal.loss import divergence, teacher_logits
from skimp.shrink.heal.optimizer import Optimizer, training_settings
from skimp.shrink.heal.own_text import MOST_TOKENS, TEXT_TENSORS, from_tensors, write_text
from skimp.shrink.heal.schedule import Part, has_settled, rate
from skimp.shrink.heal.weights import Adapter, Weights, build
from skimp.shrink.step import Tensors, Whole
from skimp.text import Tokenizer

if TYPE_CHECKING:
    from skimp.shrink.heal.step import Heal

LEAST_HELD_OUT, MOST_HELD_OUT = 512, 16384  # tokens, unless the recipe says how many
HELD_OUT_SHARE: Final = 20  # the text's tokens over them, at least
SELF: Final = "self"


def read_texts(step: Heal, spec: ModelSpec, directory: Path) -> list[np.ndarray]:
    """The documents that a step names. Raises SkimpError."""
    docs = documents(Tokenizer.load(directory), step.path("text"), step.path("chat"))
    if not docs:
        raise ShrinkError("text: there is nothing in it to heal on")
    check_ids(docs, spec.vocab_size)
    return docs


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: which part and how many steps into it, steps ``total``, updates of the
    optimiser, how far the part's text is read, and the losses since the last line of the curve."""

    part: int = 0
    step: int = 0
    ended: bool = False  # the part
    total: int = 0
    updates: int = 0
    cursor: Mapping[str, int] = field(default_factory=lambda: asdict(Cursor()))
    loss: float = 0.0
    losses: int = 0

    def after(self, cursor: Cursor, loss: float) -> Progress:
        """One step on."""
        return replace(
            self,
            step=self.step + 1,
            total=self.total + 1,
            updates=self.updates + 1,
            cursor=asdict(cursor),
            loss=self.loss + loss,
            losses=self.losses + 1,
        )

    def measured(self, ended: bool) -> Progress:
        return replace(self, ended=ended, loss=0.0, losses=0)

    def beyond(self, part: int) -> Progress:
        """At the beginning of another part."""
        return Progress(part=part, total=self.total, updates=self.updates)


class Healer:
    """A run of a ``heal`` step."""

    def __init__(self, step: Heal, whole: Whole) -> None:
        self._step, self._whole = step, whole
        self._device = torch.device(step.device)
        self._parts = step.parts()
        self._rows = list(whole.rows)
        self._fresh: list[dict[str, Any]] = []  # of the rows, those not saved yet
        self._progress = Progress()
        self._own_text: dict[str, Tensor] = {}
        compute = getattr(torch, step.computes_in)
        self._ops = PlainOps(dtype=compute)
        self._student, self._teacher = (
            build(spec, tensors, compute=compute, device=self._device, positions=step.longest)
            for spec, tensors in (
                (whole.spec, whole.tensors),
                (whole.original, whole.original_tensors),
            )
        )
        lora = step.lora
        self._weights = Weights(
            self._student,
            whole.tensors,
            step.trained(whole.spec),
            adapter=None if lora is None else Adapter(lora.rank, lora.alpha),
            keep_zeros=step.keep_zeros,
            seed=whole.seed,
        )
        self._changed = _changed(whole) if step.layerwise is not None else []

    def run(self) -> Tensors:
        """The healed model's tensors."""
        saved = self._whole.saved
        with training_settings(self._device):
            if saved is not None:
                self._weights.load(saved.tensors)
                self._own_text = {
                    n: saved.tensors[n].clone() for n in TEXT_TENSORS if n in saved.tensors
                }
            if saved is None or not saved.state["done"]:
                self._train()
            else:
                self._whole.notes[:] = saved.state["notes"]
        return self._weights.written()

    # ---- parts ----------------------------------------------------------------------------

    def _train(self) -> None:
        step = self._step
        # Once used, a save is let go: the next one but one takes its place on the disk.
        saved, self._whole.saved = self._whole.saved, None
        state: Mapping[str, Any] = {} if saved is None else saved.state
        self._progress = Progress(**state.get("progress", {}))
        started = self._progress.part
        docs = self._documents(fresh=saved is None)
        size = sum(map(len, docs))
        held_tokens = step.held_out or _held_out(step, size)
        held, rest = split_off(docs, held_tokens, self._whole.seed)
        self._held = packed(cut(held, step.length), step.rows)
        self._note_rounds(size - held_tokens)
        if not self._rows:
            self._add_row(self._parts[0].name, 0.0, self._measure())
        optimizer: Optimizer | None = None
        for index, part in enumerate(self._parts):
            if index < self._progress.part or (part.layerwise and not self._changed):
                continue
            if index > self._progress.part:
                self._progress = self._progress.beyond(index)
            if optimizer is None or self._parts[index - 1].layerwise:
                optimizer = Optimizer(
                    self._of_part(part),
                    betas=step.betas,
                    weight_decay=step.weight_decay,
                    clip=step.clip,
                )
                if saved is not None and index == started and self._progress.updates:
                    optimizer.load(saved.tensors, self._progress.updates)
                else:
                    self._progress = replace(self._progress, updates=0)
                saved = None
            stream = Stream(cut(rest, part.length), self._whole.seed + index)
            while not self._progress.ended:
                self._optimise(part, stream, optimizer)
        self._weights.settle()
        self._add_row(self._parts[-1].name, 0.0, self._measure(), written=True)
        self._whole.note(self._summary())
        self._save(None, {})

    def _optimise(self, part: Part, stream: Stream, optimizer: Optimizer) -> None:
        """One optimiser step, and what is due after it."""
        step, at = self._step, self._progress
        sequences, cursor = stream.take(step.batch, Cursor(**at.cursor))
        loss = 0.0
        for group in packed(sequences, step.rows):
            inputs = step_inputs(group, self._device)
            loss += self._mixers(inputs) if part.layerwise else self._model(inputs)
        lr = part.lr * self._rate(at.part, at.step)
        optimizer.update(lr, f"step {at.total + 1}")
        self._weights.moved()
        at = self._progress = at.after(cursor, loss)
        last = at.step == part.steps
        if last or at.total % step.measures_at == 0:
            self._add_row(part.name, lr, self._measure())
            last = last or self._has_settled(part)
            at = self._progress = at.measured(last)
        if last or at.total % step.saves_at == 0:
            self._save(at, optimizer.tensors())
        before = sum(earlier.steps for earlier in self._parts[: at.part])
        self._whole.progress(before + at.step, self._how_it_goes(loss))

    def _rate(self, index: int, number: int) -> float:
        """A long part goes on with the schedule of the part before it."""
        step = self._step
        own = [i for i, p in enumerate(self._parts) if p.layerwise == self._parts[index].layerwise]
        before = sum(self._parts[i].steps for i in own if i < index)
        steps = sum(self._parts[i].steps for i in own)
        return rate(before + number, steps, step.schedule, warmup=step.warmup, final=step.final)

    def _of_part(self, part: Part) -> dict[str, Tensor]:
        """The masters that train in it."""
        names = self._step.trained(self._whole.spec)
        if part.layerwise:
            prefixes = tuple(f"layers.{layer}.mixer." for layer in self._changed)
            names = [name for name in names if name.startswith(prefixes)]
        return self._weights.of(names)

    # ---- losses ---------------------------------------------------------------------------

    def _model(self, inputs: StepInputs) -> float:
        """KL of the whole model, its share of the step's mean over tokens; adds to gradients."""
        logits = teacher_logits(self._teacher, inputs, self._ops)
        loss = divergence(self._student.states(inputs, self._ops), self._student, logits)
        loss = loss / self._step.batch
        loss.backward()
        return float(loss.detach())

    def _mixers(self, inputs: StepInputs) -> float:
        """Mean over layers of |y' - y|^2 / |y|^2, y being what a mixer adds to the stream that
        enters it in the original, and y' what the student's adds; adds to gradients."""
        total = 0.0
        share = len(inputs.token_ids) / self._step.batch / len(self._changed)
        with torch.no_grad():
            x = self._teacher.embed(inputs, self._ops)
        for index, (own, theirs) in enumerate(zip(self._student.layers, self._teacher.layers)):
            assert isinstance(own, DecoderLayer) and isinstance(theirs, DecoderLayer)
            with torch.no_grad():
                mixed = theirs.mix(x, self._ops, inputs)
            if index in self._changed:
                found = own.mix(x, self._ops, inputs)
                loss = share * (found - mixed).square().sum() / (mixed - x).square().sum()
                loss.backward()
                total += float(loss.detach())
            with torch.no_grad():
                x = theirs.feed(mixed, self._ops)
        return total

    def _measure(self) -> float:
        """KL on the held-out text, nats a token."""
        total, rows = 0.0, 0
        with torch.no_grad():
            for group in self._held:
                inputs = step_inputs(group, self._device)
                logits = teacher_logits(self._teacher, inputs, self._ops)
                states = self._student.states(inputs, self._ops)
                total += float(divergence(states, self._student, logits))
                rows += len(inputs.token_ids)
        return total / rows

    # ---- text, account --------------------------------------------------------------------

    def _documents(self, *, fresh: bool) -> list[np.ndarray]:
        if self._step.text != SELF:
            return read_texts(self._step, self._whole.original, self._whole.directory)
        if fresh:
            self._own_text = self._write_text()
            self._save(self._progress, {})
        return from_tensors(self._own_text)

    def _write_text(self) -> dict[str, Tensor]:
        step, whole = self._step, self._whole

        def tell(done: int, wanted: int) -> None:
            whole.progress(0, f"{done:,} of {wanted:,} tokens written by the original")

        return write_text(
            whole.directory,
            step.self_tokens or min(step.tokens, MOST_TOKENS),
            longest=step.longest,
            dtype=step.computes_in,
            device=step.device,
            seed=whole.seed,
            tell=tell,
        )

    def _note_rounds(self, tokens: int) -> None:
        rounds = self._step.steps * self._step.batch / tokens
        if rounds > 1:
            self._whole.note(
                f"heal: the text's {tokens:,} tokens were gone through up to {rounds:.1f} times"
            )

    def _add_row(self, part: str, lr: float, held_out: float, *, written: bool = False) -> None:
        """A line of the curve. ``loss`` is the mean since the line before, KL in nats a token (in
        the layerwise part the mixers' relative error); ``written``: of the weights as rounded for
        the output."""
        at = self._progress
        if not math.isfinite(held_out):
            raise ShrinkError(f"lr: the model fell apart by step {at.total}; lower it")
        row: dict[str, Any] = {
            "part": part,
            "step": at.total,
            "tokens": at.total * self._step.batch,
            "lr": lr,
            "loss": at.loss / at.losses if at.losses else None,
            "held_out_kl": held_out,
            "written": written,
        }
        self._rows.append(row)
        self._fresh.append(row)

    def _has_settled(self, part: Part) -> bool:
        stop = self._step.stop
        if stop is None or part.layerwise:
            return False
        losses = [row["held_out_kl"] for row in self._rows if row["part"] == part.name]
        return has_settled(losses, stop.slope, stop.window)

    def _save(self, at: Progress | None, moments: Mapping[str, Tensor]) -> None:
        """``at`` None: there is nothing left to do."""
        state: dict[str, Any] = {"done": True, "notes": self._whole.notes}
        if at is not None:
            state = {"done": False, "progress": asdict(at)}
        self._whole.save(state, {**self._weights.masters, **moments, **self._own_text}, self._fresh)
        self._fresh = []

    def _how_it_goes(self, loss: float) -> str:
        done, total = (n * self._step.batch for n in (self._progress.total, self._step.steps))
        held = self._rows[-1]["held_out_kl"]
        return f"{done:,} of {total:,} tokens, loss {loss:.4f}, held-out KL {held:.4f}"

    def _summary(self) -> str:
        first, last = self._rows[0], self._rows[-1]
        return (
            f"heal: held-out KL to the original {first['held_out_kl']:.4f} before and "
            f"{last['held_out_kl']:.4f} nats a token after {last['tokens']:,} tokens"
        )


def _held_out(step: Heal, size: int) -> int:
    """Tokens of a text of ``size`` that are worth holding out: all measurements together take a
    fifth of the training's time at most, a token's forward through both models being half of it."""
    measurements = -(-step.steps // step.measures_at) + 1
    affordable = 2 * step.steps * step.batch // (5 * measurements)
    wanted = min(MOST_HELD_OUT, max(LEAST_HELD_OUT, affordable))
    return max(2, min(wanted, size // HELD_OUT_SHARE))


def _changed(whole: Whole) -> list[int]:
    """Layers whose mixers are not the original's, in kind or in numbers."""
    own, theirs = whole.tensors, whole.original_tensors
    found = []
    for layer, (a, b) in enumerate(zip(whole.spec.layers, whole.original.layers)):
        names = [name for name in own if name.startswith(f"layers.{layer}.mixer.")]
        if a.mixer != b.mixer or not all(_same(own[n], theirs[n]) for n in names):
            found.append(layer)
    if not found:
        whole.note("layerwise: no mixer differs from the original's, so there was nothing to do")
    return found


def _same(a: Any, b: Any) -> bool:
    both = isinstance(a, Tensor) and isinstance(b, Tensor)
    return both and a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))
