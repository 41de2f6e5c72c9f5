"""From raw logits to the law a token is drawn from: the only place where logits are changed.

Speculative sampling applies the same function to every row of the target, drafted or bonus, so the
law it must preserve is by construction the law of plain sampling.

Order, and where it comes from:

1. repetition penalty (Keskar et al. 2019) over prompt and output: divide positive, multiply
   negative logits; then frequency and presence penalties over the output only (OpenAI). This is
   vLLM's ``apply_all_penalties``.
2. ``logit_bias`` (OpenAI: added to the logits prior to sampling). vLLM and transformers add the
   bias *before* the penalties; after them, a bias keeps its nominal size whatever the penalty.
3. masks (-inf): end tokens before ``min_tokens``, the last token of a bad word, and tokens a
   grammar does not allow.
4. temperature. Temperature 0 is argmax and ends here.
5. top-k, 6. top-p, 7. min-p, each on what the one before has left: the order of transformers'
   ``_get_logits_processor``. (vLLM applies min-p before top-k and top-p.)

Ties: top-k keeps every token equal to the k-th, as both libraries do; top-p takes equal tokens in
order of their id; argmax takes the lowest id. Weights are float64.

Shapes: L rows, V vocabulary, S sampled rows, F rows with top-k or top-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skimp.decoding.params import SamplingParams
from skimp.decoding.rows import RowState
from skimp.kernels.draws import find_laws, temper

_NEG_INF = float("-inf")
_FIRST_WIDTH = 1024  # columns tried first: most nuclei are smaller
_SORTED_ROWS = 64  # at a time on a GPU, some 30 bytes a logit


@dataclass(frozen=True, kw_only=True)
class Processed:
    """The outcome of :func:`process`.

    Attributes:
        logits: float32 [L, V] after steps 1-3; the input itself when no row changed it.
        best: [L], the argmax of ``logits``, lowest id first.
        errors: per row None, or why the row has no law.
        sampled: the rows with a temperature above 0 and no error, in order.
        weights: float64 [S, V], their unnormalised law; the largest weight of a row is 1. None
            when no row is sampled.
    """

    logits: Tensor
    best: list[int]
    errors: tuple[str | None, ...]
    sampled: tuple[int, ...]
    weights: Tensor | None

    def probabilities(self) -> Tensor:
        """The law of every row, float64 [L, V]: one-hot where greedy, NaN where in error."""
        law = torch.zeros(self.logits.shape, dtype=torch.float64, device=self.logits.device)
        law[range(len(law)), self.best] = 1.0
        if self.weights is not None:
            law[list(self.sampled)] = self.weights / self.weights.sum(-1, keepdim=True)
        wrong = [i for i, error in enumerate(self.errors) if error is not None]
        if wrong:
            law[wrong] = float("nan")
        return law


def process(logits: Tensor, rows: Sequence[RowState]) -> Processed:
    """Apply every row's parameters to its logits [L, V]; a bad row never touches another.

    ``logits`` is any floating dtype, taken to float32, and is not written to. -inf is an allowed
    logit (never drawn). A row with NaN or +inf, or with nothing left to draw, gets an error.
    Raises ValueError when the shape does not fit the rows.
    """
    if logits.dim() != 2 or logits.shape[0] != len(rows):
        raise ValueError(f"logits must be [{len(rows)}, V], got {list(logits.shape)}")
    for row in rows:
        if row.vocab_size != logits.shape[1]:
            raise ValueError(f"a row expects V = {row.vocab_size}, logits have {logits.shape[1]}")
    raw = logits if logits.dtype == torch.float32 else logits.float()
    adjusted = adjust(raw, rows)
    scales = [inverse_temperature(row.params) for row in rows]
    raw_tops = None
    if adjusted is not raw:
        # a mask may hide a NaN, so the raw row is looked at too
        raw_tops = raw.amax(dim=-1).tolist()
        scales = [0.0 if judge(top, top) else scale for top, scale in zip(raw_tops, scales)]
    # the maximum carries NaN and +inf along, so the finiteness check is free
    tops, best, weights = find_laws(adjusted, scales)
    errors = tuple(judge(a, b) for a, b in zip(raw_tops or tops, tops))
    sampled = tuple(i for i, error in enumerate(errors) if error is None and scales[i] > 0.0)
    if sampled:
        _cut_weights(weights, adjusted, rows, sampled)
    return Processed(
        logits=adjusted,
        best=best,
        errors=errors,
        sampled=sampled,
        weights=weights if sampled else None,
    )


def adjust(logits: Tensor, rows: Sequence[RowState]) -> Tensor:
    """Steps 1-3 on float32 [L, V]; returns ``logits`` itself when no row asks for anything."""
    if not any(row.touched() for row in rows):
        return logits
    penalised = [i for i, row in enumerate(rows) if row.penalties is not None]
    biased = [i for i, row in enumerate(rows) if row.params.logit_bias]
    masked = _masked_indices(rows, logits.shape[1])
    constrained = [i for i, row in enumerate(rows) if row.allowed is not None]
    if not (penalised or biased or masked or constrained):
        return logits
    out = logits.clone()
    flat = out.view(-1)
    if penalised:
        _penalise(flat, logits.shape[1], penalised, rows)
    if biased:
        index, values = [], []
        for i in biased:
            for token, value in rows[i].params.logit_bias.items():
                index.append(i * logits.shape[1] + token)
                values.append(value)
        # ids are distinct within a row, so there is nothing to accumulate
        where = torch.tensor(index, device=out.device)
        flat[where] += torch.tensor(values, dtype=out.dtype, device=out.device)
    if masked:
        flat[torch.tensor(masked, device=out.device)] = _NEG_INF
    for i in constrained:
        allowed = rows[i].allowed
        assert allowed is not None
        out[i].masked_fill_(~allowed, _NEG_INF)
    return out


def _masked_indices(rows: Sequence[RowState], vocab_size: int) -> list[int]:
    found = []
    for i, row in enumerate(rows):
        if row.bad_words or row.params.min_tokens:
            found += [i * vocab_size + token for token in row.masked_ids()]
    return found


def _penalise(flat: Tensor, vocab_size: int, which: list[int], rows: Sequence[RowState]) -> None:
    """Step 1, in place, on the tokens the rows have seen and nowhere else."""
    index: list[NDArray[np.int64]] = []
    columns: list[NDArray[np.float32]] = []
    for i in which:
        state, params = rows[i].penalties, rows[i].params
        assert state is not None
        ids, counts = state.seen(rows[i].draft)
        if params.repetition_penalty == 1.0:
            ids, counts = ids[counts > 0], counts[counts > 0]
        index.append(ids + i * vocab_size)
        column = np.empty((2, len(ids)), dtype=np.float32)
        column[0] = params.repetition_penalty
        column[1] = counts * params.frequency_penalty + (counts > 0) * params.presence_penalty
        columns.append(column)
    where = torch.from_numpy(np.concatenate(index)).to(flat.device)
    factor, less = torch.from_numpy(np.concatenate(columns, axis=1)).to(flat.device)
    values = flat[where]
    flat[where] = torch.where(values > 0, values / factor, values * factor) - less


def judge(raw_highest: float, highest: float) -> str | None:
    """Why a row cannot be drawn from, given its maxima before and after steps 1-3."""
    if raw_highest != raw_highest or raw_highest in (float("inf"), _NEG_INF):
        return f"non-finite logits (maximum {raw_highest})"
    if highest == _NEG_INF:
        return "every token is masked"
    if highest != highest or highest == float("inf"):
        return "logits overflow after penalties and bias"
    return None


def _cut_weights(
    weights: Tensor, logits: Tensor, rows: Sequence[RowState], sampled: Sequence[int]
) -> None:
    """Steps 5-7 on the weights [S, V] of the ``sampled`` rows, in place."""
    params = [rows[i].params for i in sampled]
    if any(one.has_filters for one in params):
        part = logits if len(sampled) == len(rows) else logits[list(sampled)]
        truncate(weights, part, [rows[i] for i in sampled])
    if any(one.min_p > 0.0 for one in params):
        # the largest weight is exactly 1, so the ratio to it is the weight
        weights.masked_fill_(weights < _column([one.min_p for one in params], weights), 0.0)


def unwaited_weights(
    logits: Tensor, top: Tensor, scales: Tensor, min_p: Tensor, rows: Sequence[RowState]
) -> Tensor:
    """Steps 4-7 as :class:`Processed` has them, float64 [S, V], without waiting for a GPU.

    ``scales`` and ``min_p`` are float64 [S] on the device of the logits; ``scales`` are
    :func:`inverse_temperature`.
    """
    weights = temper(logits, top, scales)
    truncate(weights, logits, rows)
    if any(row.params.min_p > 0.0 for row in rows):
        weights.masked_fill_(weights < min_p[:, None], 0.0)
    return weights


def tempered_only(row: RowState, ahead: int) -> bool:
    """Whether step 4 alone makes the row's law, ``ahead`` tokens past those committed."""
    params = row.params
    cut = params.temperature != 0.0 and (params.has_filters or params.min_p > 0.0)
    return not cut and not row.touched(ahead)


def inverse_temperature(params: SamplingParams) -> float:
    """1/T, cut where it would overflow: 0 * inf is no number. 0 where T is 0."""
    if params.temperature == 0.0:
        return 0.0
    return min(1.0 / params.temperature, 1e300)


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy on the device, from pinned memory, because a copy from any other would wait for it."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def truncate(weights: Tensor, logits: Tensor, rows: Sequence[RowState]) -> None:
    """Steps 5-6 on ``weights`` [S, V], in place, for the rows that ask for them."""
    filtered = [s for s, row in enumerate(rows) if row.params.has_filters]
    if filtered and logits.device.type == "cpu":
        truncate_largest(weights, logits, filtered, rows)
    elif filtered:
        truncate_sorted(weights, logits, filtered, rows)


def truncate_sorted(
    weights: Tensor, logits: Tensor, filtered: list[int], rows: Sequence[RowState]
) -> None:
    """Steps 5-6 in place by sorting whole rows: no number is waited for."""
    for first in range(0, len(filtered), _SORTED_ROWS):
        some = filtered[first : first + _SORTED_ROWS]
        params = [rows[s].params for s in some]
        numbers = np.array(
            [[p.top_k or logits.shape[1] for p in params], [p.top_p for p in params]]
        )
        table = to_device(numbers, logits.device)
        index = to_device(np.array(some), logits.device)
        kept = _nucleus(weights[index], logits[index], table[0].long(), table[1])
        weights.index_copy_(0, index, kept)


def _nucleus(weights: Tensor, logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The weights [F, V] that are left; ``top_k`` int64 [F] from 1 on, ``top_p`` float64 [F]."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)  # equals by their id
    last = (top_k.clamp(max=logits.shape[1]) - 1)[:, None]
    within = ordered >= ordered.gather(1, last)
    mass = weights.gather(1, order).masked_fill_(~within, 0.0).cumsum(dim=-1)
    before = torch.nn.functional.pad(mass[:, :-1], (1, 0))
    within &= (before < top_p[:, None] * mass[:, -1:]) | (top_p >= 1.0)[:, None]
    return weights.masked_fill_(~torch.empty_like(within).scatter_(1, order, within), 0.0)


def truncate_largest(
    weights: Tensor, logits: Tensor, filtered: list[int], rows: Sequence[RowState]
) -> None:
    """Steps 5-6 in place. The largest ``width`` logits are sorted, all if they do not decide."""
    vocab_size = logits.shape[1]
    need_total = any(rows[s].params.top_p < 1.0 for s in filtered)
    totals = weights.sum(dim=-1).tolist() if need_total else [0.0] * len(rows)
    # one more than k shows whether the k-th has ties beyond it
    width = max(rows[s].params.top_k for s in filtered) + 1
    width = min(vocab_size, max(width, _FIRST_WIDTH))
    pending = filtered
    while pending:
        part = logits if len(pending) == len(logits) else logits[pending]
        values = _largest(part, width)
        undecided = []
        for j, s in enumerate(pending):
            cut = _cut(values[j], rows[s].params, totals[s], whole=width == vocab_size)
            if cut is None:
                undecided.append(s)
            else:
                _drop(weights[s], logits[s], *cut)
        pending, width = undecided, vocab_size


def _largest(logits: Tensor, width: int) -> NDArray[np.float32]:
    """The ``width`` largest of each row of [F, V], descending, as numpy [F, width]."""
    # numpy's vector sorts are several times faster than torch.topk on a CPU
    values, start = logits.numpy(), logits.shape[1] - width
    if start > 0:
        values = np.partition(values, start, axis=-1)[:, start:]
    return np.sort(values, axis=-1)[:, ::-1]


def _cut(
    values: NDArray[np.float32], params: SamplingParams, total: float, *, whole: bool
) -> tuple[float, int | None] | None:
    """Where a row ends: (smallest logit kept, how many of its ties; None for all).

    ``values`` [W] are the row's largest logits, descending; ``total`` is the weight of the whole
    row. None when W columns do not decide.
    """
    top_k, count = params.top_k, len(values)
    limit, ties = _NEG_INF, None
    ascending = values[::-1]
    if 0 < top_k <= count:
        limit = float(values[top_k - 1])
        if limit == values[-1] and limit != _NEG_INF and not whole:
            return None
        count -= int(np.searchsorted(ascending, limit, side="left"))
    if params.top_p < 1.0:
        # float64 before the subtraction, as for the weights themselves
        scaled = values[:count].astype(np.float64) - float(values[0])
        scaled *= inverse_temperature(params)
        mass = np.exp(scaled).cumsum()
        if 0 < top_k <= len(values):
            total = float(mass[-1])
        last = int(np.searchsorted(mass, params.top_p * total, side="left"))
        if last >= count:
            if limit == _NEG_INF and not whole:
                return None
            last = count - 1  # rounding only: the sum fell short of its own total
        limit = float(values[last])
        below, upto = (int(np.searchsorted(ascending, limit, side=e)) for e in ("left", "right"))
        ties = last + 1 - (len(values) - upto)
        if ties == upto - below and (below > 0 or whole):
            ties = None  # all of them, and none beyond the W columns
    return limit, ties


def _drop(weights: Tensor, logits: Tensor, limit: float, ties: int | None) -> None:
    """Zero what lies below ``limit`` and, of its ties, all but the first ``ties`` by id."""
    if limit == _NEG_INF:
        return
    weights.masked_fill_(logits < limit, 0.0)
    if ties is not None:
        equal = (logits == limit).nonzero().view(-1)
        if len(equal) > ties:
            weights[equal[ties:]] = 0.0
