"""Training a draft head beside its target, which computes features and laws as they are needed.

Nothing of the target is kept on the disk: a forward of it over packed documents costs about as
much as the head's own steps, and states of three depths would take kilobytes a token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

import skimp
from skimp.draft.files import check_output, empty_head, write_head
from skimp.draft.loss import Guesses, Judged, ce_share, judge
from skimp.draft.options import SELF, TrainOptions
from skimp.draft.start import choose_words, head_spec, start_tensors
from skimp.draft.unroll import (
    HeadRows,
    UnrolledOps,
    fused,
    head_rows,
    taps_and_states,
    unroll,
)
from skimp.errors import OptionError, ShrinkError
from skimp.kernels.plain import PlainOps, rms_norm
from skimp.model.draft_head import DraftHead, HeadSpec
from skimp.model.loading import assign, load_decoder, load_spec
from skimp.model.saving import module_tensors
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
from skimp.shrink.heal.loss import logits_of
from skimp.shrink.heal.optimizer import Optimizer, training_settings
from skimp.shrink.heal.own_text import MOST_TOKENS, from_tensors, write_text
from skimp.shrink.heal.schedule import rate
from skimp.shrink.heal.weights import Weights, build, computing
from skimp.shrink.text import default_text
from skimp.text import Tokenizer

MOST_HELD_OUT: Final = 16384  # tokens, unless the user says how many
HELD_OUT_SHARE: Final = 20  # the text's tokens over them, at least


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a head's guesses are worth on held-out text, by how far ahead they are.

    ``accepted``: mean probability that a guess drawn at temperature 1 stands, the tokens before it
    being the text's; ``agreed``: share where head and target would say the same greedily.
    ``drawn`` and ``greedy`` tokens a step are what chains of as many guesses as are unrolled give:
    1 + the mean over rows of the chances that the first 1, 2, .. stand.
    """

    accepted: tuple[float, ...]
    agreed: tuple[float, ...]
    drawn: float
    greedy: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """``covered``: the share of held-out tokens that the head can guess at all. ``curve``: a
    mapping a measurement, with step, tokens, lr, loss and the fields of a Report."""

    output: Path
    spec: HeadSpec
    parameters: int
    tokens: int
    covered: float
    report: Report
    curve: tuple[Mapping[str, Any], ...]


Progress = Callable[[int, int], None]
Tell = Callable[[str], None]


def train_head(
    directory: Path,
    output: Path,
    options: TrainOptions,
    *,
    text: Path | str | None = None,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
    tell: Tell = lambda line: None,
) -> Outcome:
    """Train a head for the model in ``directory`` and write it to ``output``.

    ``text`` is a file, plain or .jsonl, ``"self"`` for what the model itself writes, or None for
    the text that comes with skimp. ``progress`` hears of steps, ``tell`` gets a line a measurement.
    Raises SkimpError naming the field or the file.
    """
    check_output(output, overwrite)
    target = load_spec(directory)
    _check(options, target)
    docs = _documents(directory, target, options, text, tell)
    with training_settings(torch.device(options.device)):
        trainer = Trainer(directory, options, docs)
        trainer.train(progress, tell)
    head, report = trainer.finished()
    record = {
        "version": skimp.__version__,
        "text": SELF if text == SELF else Path(text or default_text()).name,
        "tokens": trainer.steps * options.batch,
        **{
            field: getattr(options, field)
            for field in ("loss", "unroll", "decay", "length", "batch", "lr", "seed")
        },
        "held_out": {"covered": trainer.covered, **asdict(report)},
    }
    write_head(output, head, record=record, overwrite=overwrite)
    return Outcome(
        output=output,
        spec=head.spec,
        parameters=sum(p.numel() for p in head.parameters()),
        tokens=trainer.steps * options.batch,
        covered=trainer.covered,
        report=report,
        curve=tuple(trainer.curve),
    )


def _check(options: TrainOptions, target: ModelSpec) -> None:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise OptionError("device: cuda is not to be had on this machine")
    if options.length > target.max_positions:
        raise OptionError(
            f"length: {options.length} tokens, and the model has {target.max_positions} positions"
        )
    if options.vocabulary is not None and options.vocabulary > target.vocab_size:
        raise OptionError(
            f"vocabulary: {options.vocabulary} words, and the target has {target.vocab_size}"
        )
    head_spec(target, options, options.vocabulary or target.vocab_size)


def _documents(
    directory: Path,
    target: ModelSpec,
    options: TrainOptions,
    text: Path | str | None,
    tell: Tell,
) -> list[np.ndarray]:
    if text == SELF:
        wanted = options.self_tokens or min(options.tokens, MOST_TOKENS)
        tell(f"the target writes {wanted:,} tokens")
        written = write_text(
            directory,
            wanted,
            longest=options.length,
            dtype=options.computes_in,
            device=options.device,
            seed=options.seed,
        )
        docs = from_tensors(written)
    else:
        if options.self_tokens is not None:
            raise OptionError("self_tokens: how much the target writes, but text is not self")
        docs = documents(Tokenizer.load(directory), None if text is None else Path(text), None)
    docs = [doc for doc in docs if len(doc) > 1]
    if not docs:
        raise ShrinkError("text: there is nothing in it to learn from")
    check_ids(docs, target.vocab_size)
    return docs


class Trainer:
    """One run. ``docs`` are token ids int32, each of two tokens at least."""

    def __init__(self, directory: Path, options: TrainOptions, docs: Sequence[np.ndarray]) -> None:
        self._options = options
        self._device = device = torch.device(options.device)
        compute = getattr(torch, options.computes_in)
        spec = load_spec(directory)
        size = sum(map(len, docs))
        held_out = options.held_out or max(2, min(MOST_HELD_OUT, size // HELD_OUT_SHARE))
        held, rest = split_off(docs, held_out, options.seed)
        self._held = packed(cut(held, options.length), options.rows)
        self._stream = Stream(cut(rest, options.length), options.seed)
        self._fresh = sum(map(len, rest))
        words = choose_words(rest, spec.vocab_size, options.vocabulary)
        self.covered = _covered(held, words, spec.vocab_size)
        own = head_spec(spec, options, len(words))

        self._target = build(
            spec,
            module_tensors(load_decoder(directory)),
            compute=compute,
            device=device,
            positions=options.length,
        )
        self._ops = PlainOps(dtype=compute)
        self._unrolled = UnrolledOps(dtype=compute)
        start = start_tensors(own, self._target, words, options.seed)
        self._head = empty_head(own)
        for name, value in start.items():
            made = computing(self._head, name, compute)
            assign(self._head, name, value.to(device, made, copy=True))
        self._head.token_ids = words.to(device)
        self._weights = Weights(self._head, start, start)
        self._head.fusion.bind(self._unrolled)
        table = self._unrolled.pack((self._target.embed_tokens,), "table")
        self._head.attach(table, spec.embed_scale)
        self._head.bind(self._unrolled, max_positions=options.length + options.unroll)
        decays = [options.decay**step for step in range(options.unroll)]
        self._step_weights = [d / sum(decays) / options.batch for d in decays]
        self._accepted = [0.0] * options.unroll  # in the last batch
        self.steps = 0
        self.curve: list[dict[str, Any]] = []

    def train(self, progress: Progress, tell: Tell) -> None:
        """All steps, measured now and then; weights are those to be written when it is done."""
        options = self._options
        if (rounds := options.steps * options.batch / self._fresh) > 1:
            tell(f"the text's {self._fresh:,} tokens are gone through up to {rounds:.1f} times")
        optimizer = Optimizer(
            self._weights.masters,
            betas=options.betas,
            weight_decay=options.weight_decay,
            clip=options.clip,
        )
        cursor, losses = Cursor(), []
        every = max(1, options.steps // options.measurements)
        began = time.monotonic()
        for step in range(options.steps):
            due = step
            if options.minutes is not None:
                spent = (time.monotonic() - began) / 60 / options.minutes
                due = max(step, int(spent * options.steps))
                if due >= options.steps:
                    tell(f"{options.minutes:g} minutes are over")
                    break
            sequences, cursor = self._stream.take(options.batch, cursor)
            losses.append(self._learn(sequences))
            lr = options.lr * rate(
                due, options.steps, "cosine", warmup=options.warmup, final=options.final
            )
            optimizer.update(lr, f"step {step + 1}")
            self._weights.moved()
            self.steps = step + 1
            progress(step + 1, options.steps)
            if (step + 1) % every == 0 and step + 1 < options.steps:
                self._add_row(step + 1, lr, losses, tell)
                losses = []
        self._weights.settle()
        self._add_row(self.steps, 0.0, losses, tell)

    def finished(self) -> tuple[DraftHead, Report]:
        """The head as it is written, on the CPU, and what it is worth."""
        head = empty_head(self._head.spec)
        for name, tensor in self._weights.written().items():
            assign(head, name, tensor)
        head.token_ids = self._head.token_ids.cpu()
        return head, self._report

    def _learn(self, sequences: Sequence[np.ndarray]) -> float:
        """Gradients of one batch, and its loss, a mean over tokens and steps."""
        total = torch.zeros((), device=self._device)
        sums = torch.zeros(self._options.unroll, 2, device=self._device)
        for group in packed(sequences, self._options.rows):
            found = self._judged(group)
            if found is None:
                continue
            judged, guesses, _ = found
            judged.loss.backward()
            total += judged.loss.detach()
            steps = torch.from_numpy(guesses.steps).to(self._device)
            counted = torch.stack((judged.accepted, torch.ones_like(judged.accepted)), dim=1)
            sums.index_add_(0, steps, counted)
        accepted = (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist()
        self._accepted = accepted
        return float(total)

    def _judged(self, group: Sequence[np.ndarray]) -> tuple[Judged, Guesses, HeadRows] | None:
        """The guesses of one forward; None if no document has two tokens."""
        group = [own for own in group if len(own) > 1]
        if not group:
            return None
        options, head = self._options, self._head
        step = step_inputs(group, self._device)
        assert step.bounds is not None
        tapped, states = taps_and_states(self._target, head.spec.taps, step, self._ops)
        at = head_rows(step.bounds.whole)
        before = torch.from_numpy(at.rows - 1).to(self._device)
        features = fused(head.fusion, tapped, before, self._unrolled)
        streams = unroll(head, self._unrolled, step, at, features, options.unroll)
        rows, steps, chosen = _guesses(at, options.unroll)
        stacked = torch.cat(streams).index_select(0, torch.from_numpy(chosen).to(self._device))
        guesses = Guesses(target_rows=rows, steps=steps)
        weight = head.lm_head.weight
        assert weight is not None
        judged = judge(
            rms_norm(stacked, head.norm),
            weight,
            None if head.spec.draft_vocab_size == head.spec.vocab_size else head.token_ids,
            logits_of(self._target, states, step, self._ops),
            guesses,
            weights=self._step_weights,
            ce_shares=[ce_share(options.loss, accepted) for accepted in self._accepted],
        )
        return judged, guesses, at

    # ---- measuring ------------------------------------------------------------------------

    def _add_row(self, step: int, lr: float, losses: Sequence[float], tell: Tell) -> None:
        self._report = report = self._measure(step)
        tokens = step * self._options.batch
        row = {
            "step": step,
            "tokens": tokens,
            "lr": lr,
            "loss": sum(losses) / len(losses) if losses else None,
            **asdict(report),
        }
        self.curve.append(row)
        loss = "" if row["loss"] is None else f"loss {row['loss']:.4f}, "
        shares = " ".join(f"{a:.3f}" for a in report.accepted)
        tell(f"{tokens:,} tokens: {loss}accepted {shares}, {report.drawn:.2f} tokens a step")

    def _measure(self, step: int) -> Report:
        """On the held-out text. Raises ShrinkError if the head has fallen apart."""
        options = self._options
        tables: list[np.ndarray] = []
        with torch.no_grad():
            for group in self._held:
                found = self._judged(group)
                if found is None:
                    continue
                judged, guesses, at = found
                if not bool(judged.accepted.isfinite().all()):
                    raise ShrinkError(f"lr: the head fell apart by step {step}; lower it")
                table = np.full((2, len(at.rows), options.unroll), np.nan)
                row = np.searchsorted(at.rows, guesses.target_rows - guesses.steps)
                table[0, row, guesses.steps] = judged.accepted.cpu().numpy()
                table[1, row, guesses.steps] = judged.agreed.cpu().numpy()
                tables.append(table)
        return _report(np.concatenate(tables, axis=1))


def _guesses(at: HeadRows, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row of the target, step, place in all steps' rows one after another) of every guess that is
    within its document, by row of the target."""
    rows = np.concatenate([at.rows + step for step in range(count)])
    steps = np.repeat(np.arange(count), len(at.rows))
    chosen = np.flatnonzero(np.concatenate([at.within(step) for step in range(count)]))
    chosen = chosen[np.argsort(rows[chosen], kind="stable")]
    return rows[chosen], steps[chosen], chosen


def _report(table: np.ndarray) -> Report:
    """``table`` [2, rows, steps]: accepted and agreed, NaN behind a document's end."""
    means = np.nanmean(table, axis=1)
    whole = table[:, ~np.isnan(table[0]).any(axis=1)]
    chains = np.cumprod(whole, axis=2).sum(axis=2).mean(axis=1) if whole.shape[1] else means[:, 0]
    return Report(
        accepted=tuple(means[0].tolist()),
        agreed=tuple(means[1].tolist()),
        drawn=1 + float(chains[0]),
        greedy=1 + float(chains[1]),
    )


def _covered(docs: Sequence[np.ndarray], words: Tensor, vocab_size: int) -> float:
    """The share of tokens behind a document's first that are among ``words``."""
    known = np.zeros(vocab_size, dtype=bool)
    known[words.numpy()] = True
    later = np.concatenate([doc[1:] for doc in docs])
    return float(known[later].mean()) if len(later) else 1.0
