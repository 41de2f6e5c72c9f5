"""How many drafted tokens stand, and what follows them, so that the target's law is kept.

A draft x_1 .. x_k was drawn from laws q_1 .. q_k; the target would draw from p_1 .. p_{k+1}, each
law given the drafted tokens before it and after all processing (``process``). A rule answers two
questions, from the ratios r_i = p_i(x_i) / q_i(x_i):

- with which chance do exactly i tokens stand;
- which share c_i of the target's law the draft's is taken from: after i < k tokens the next one
  is drawn from (c_i p_{i+1} - q_{i+1})+, and after all k from p_{k+1}.

``Chain`` tests token after token (Leviathan et al. 2023; Chen et al. 2023). ``Block`` judges the
draft as a whole (Sun et al. 2024, "Block verification accelerates speculative decoding"): the same
law, and on average never fewer tokens.

A draft that was not drawn (a lookup, an argmax) has no q. There the target draws and the draft
stands as far as it agrees: the ratio test with a one-hot q, and the tokens of plain generation.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Final, Literal, Protocol

import torch
from torch import Tensor

from skimp.decoding.process import Processed, process
from skimp.decoding.proposal import Accepted, Draft
from skimp.decoding.rng import Purpose, uniforms
from skimp.decoding.rows import RowState
from skimp.decoding.sampler import Sampler, TokenLogprobs
from skimp.kernels.draws import Rows, rows_of

Floats = Sequence[float]
RuleName = Literal["block", "chain"]


class Rule(Protocol):
    """Of one block, everything in float64; see the module."""

    def shares(self, ratios: Floats) -> list[float]:
        """c_0 .. c_k, of ``ratios`` r_1 .. r_k."""
        ...

    def chances(self, ratios: Floats, left: Floats) -> list[float]:
        """That exactly 0 .. k tokens stand; ``left`` [k] are the sums of (c_i p_{i+1} - q_{i+1})+
        for i = 0 .. k - 1."""
        ...


class Chain:
    """The first refusal ends the block."""

    def shares(self, ratios: Floats) -> list[float]:
        return [1.0] * (len(ratios) + 1)

    def chances(self, ratios: Floats, left: Floats) -> list[float]:
        found, reached = [], 1.0
        for ratio in ratios:
            keeps = min(ratio, 1.0)
            found.append(reached * (1.0 - keeps))
            reached *= keeps
        return [*found, reached]


class Block:
    """A token with p > q makes up for one before it with p < q."""

    def shares(self, ratios: Floats) -> list[float]:
        found = [1.0]
        for ratio in ratios:
            found.append(min(found[-1] * ratio, 1.0) if found[-1] > 0.0 else 0.0)
        return found

    def chances(self, ratios: Floats, left: Floats) -> list[float]:
        shares = self.shares(ratios)
        found, fell = [], 1.0  # the chance that all longer ones fell
        for i in range(len(ratios), 0, -1):
            if i == len(ratios):
                stands = shares[i]
            else:
                # Nothing left and nothing missing: both laws are one, and no draft falls here.
                whole = left[i] + (1.0 - shares[i])
                stands = left[i] / whole if whole > 0.0 else 1.0
            found.append(stands * fell)
            fell *= 1.0 - stands
        return [fell, *reversed(found)]


RULES: Final[dict[RuleName, Rule]] = {"block": Block(), "chain": Chain()}


class DrawAndCompare:
    """Draws every position from the target's own law and keeps the draft as far as it agrees.

    For proposals that are not random this is the ratio test of Leviathan et al. (2023) with a
    one-hot draft, so the law is unchanged; and as each position has its own random number, the
    tokens are the very ones that plain generation draws.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def accept(
        self, logits: Tensor, rows: Sequence[RowState], drafts: Sequence[Draft]
    ) -> list[Accepted]:
        batch = self._sampler.sample(logits, _views(rows, drafts))
        found, line = [], 0
        for draft in drafts:
            kept, tokens = 0, draft.tokens
            while kept < len(tokens) and batch.token_ids[line + kept] == tokens[kept]:
                kept += 1
            stop = line + kept + 1
            error = batch.errors[stop - 1]
            if error is not None:
                stop -= 1
            found.append(Accepted(batch.token_ids[line:stop], batch.logprobs[line:stop], error))
            line += 1 + len(tokens)
        return found


class RatioTest:
    """Accepts by a rule where the draft was drawn, and by comparison where it was not or where the
    target takes the likeliest token."""

    def __init__(self, sampler: Sampler, rule: Rule) -> None:
        self._sampler, self._rule = sampler, rule
        self._compare = DrawAndCompare(sampler)

    def accept(
        self, logits: Tensor, rows: Sequence[RowState], drafts: Sequence[Draft]
    ) -> list[Accepted]:
        drawn = [
            draft.laws is not None and row.params.temperature != 0.0
            for row, draft in zip(rows, drafts)
        ]
        if all(drawn):
            return self._test(logits, rows, drafts)
        if not any(drawn):
            return self._compare.accept(logits, rows, drafts)
        found: list[Accepted | None] = [None] * len(rows)
        for wanted, judge in ((True, self._test), (False, self._compare.accept)):
            some = [i for i, one in enumerate(drawn) if one is wanted]
            lines = torch.tensor(_lines(drafts, some), device=logits.device)
            part = judge(logits[lines], [rows[i] for i in some], [drafts[i] for i in some])
            for i, one in zip(some, part):
                found[i] = one
        return [one for one in found if one is not None]

    def _test(
        self, logits: Tensor, rows: Sequence[RowState], drafts: Sequence[Draft]
    ) -> list[Accepted]:
        views = _views(rows, drafts)
        processed = process(logits, views)
        blocks = _blocks(processed, drafts)
        if processed.weights is None:  # every line is in error
            kept, after = [0] * len(rows), [-1] * len(rows)
        else:
            kept, after = self._judge(processed.weights, rows, drafts, blocks)
        tokens = [-1] * len(views)
        for draft, block, count, token in zip(drafts, blocks, kept, after):
            tokens[block.line : block.line + count] = draft.tokens[:count]
            tokens[block.line + count] = token
        logprobs = self._sampler.logprobs(logits, processed, views, tokens)
        return [_outcome(block, count, tokens, logprobs) for block, count in zip(blocks, kept)]

    def _judge(
        self,
        weights: Tensor,
        rows: Sequence[RowState],
        drafts: Sequence[Draft],
        blocks: Sequence[_Block],
    ) -> tuple[list[int], list[int]]:
        """Of each block, how many tokens stand, and the one after them (-1: it has no law)."""
        targets = rows_of((weights,))
        kept, scales, laws = [0] * len(blocks), [], None
        parts = [
            draft.laws[: block.length].to(weights.device)
            for draft, block in zip(drafts, blocks)
            if draft.laws is not None and block.length
        ]
        if parts:
            laws = rows_of(parts)
            judged = targets.select([b.place + i for b in blocks for i in range(b.length)])
            ids = [token for d, b in zip(drafts, blocks) for token in d.tokens[: b.length]]
            q_there = laws.chosen(ids)
            assert min(q_there) > 0.0, "a drafted token has no chance under the law it came from"
            factors = [1.0 / total for total in judged.sums()]
            ratios = [
                weight * factor / q
                for weight, factor, q in zip(judged.chosen(ids), factors, q_there)
            ]
            by_block = [ratios[block.first : block.first + block.length] for block in blocks]
            shares = [share for one in by_block for share in self._rule.shares(one)[:-1]]
            scales = [share * factor for share, factor in zip(shares, factors)]
            left = judged.sums_left(laws, scales)
            keys, starts = [row.key for row in rows], [row.position for row in rows]
            numbers = uniforms(keys, starts, Purpose.ACCEPT)
            for i, (block, one, number) in enumerate(zip(blocks, by_block, numbers)):
                rest = left[block.first : block.first + block.length]
                reached = list(accumulate(self._rule.chances(one, rest)))
                kept[i] = bisect_right(reached[:-1], number * reached[-1])
        return kept, self._follow(targets, laws, scales, rows, blocks, kept)

    def _follow(
        self,
        targets: Rows,
        laws: Rows | None,
        scales: Sequence[float],
        rows: Sequence[RowState],
        blocks: Sequence[_Block],
        kept: Sequence[int],
    ) -> list[int]:
        """Draw the token after those that stand."""
        found = [-1] * len(rows)
        fell = [i for i, block in enumerate(blocks) if kept[i] < block.length]
        whole = [
            i for i, block in enumerate(blocks) if kept[i] == block.length and block.error is None
        ]

        def numbers(which: Sequence[int], purpose: Purpose) -> list[float]:
            positions = [rows[i].position + kept[i] for i in which]
            return uniforms([rows[i].key for i in which], positions, purpose)

        if fell:
            assert laws is not None
            left = targets.select([blocks[i].place + kept[i] for i in fell])
            at = [blocks[i].first + kept[i] for i in fell]
            tokens = left.draw_left(
                laws.select(at), [scales[j] for j in at], numbers(fell, Purpose.RESIDUAL)
            )
            for i, token in zip(fell, tokens):
                found[i] = token
        if whole:
            last = targets.select([blocks[i].place + kept[i] for i in whole])
            for i, token in zip(whole, last.draw(numbers(whole, Purpose.SAMPLE))):
                found[i] = token
        return found


class _Block:
    """A draft's lines in the logits: the first (``place``: among those with a law), how many of its
    tokens are judged (``first``: the first among those of all drafts), and what is wrong with the
    line after these, if anything is."""

    __slots__ = ("error", "first", "length", "line", "place")

    def __init__(self, line: int, place: int, first: int, length: int, error: str | None) -> None:
        self.line, self.place, self.first = line, place, first
        self.length, self.error = length, error


def _blocks(processed: Processed, drafts: Sequence[Draft]) -> list[_Block]:
    """A line without a law ends its block: whoever gets there learns why."""
    found, line, place, first = [], 0, 0, 0
    for draft in drafts:
        errors = processed.errors[line : line + len(draft.tokens) + 1]
        wrong = next((i for i, error in enumerate(errors) if error is not None), None)
        length = len(draft.tokens) if wrong is None else wrong
        found.append(_Block(line, place, first, length, None if wrong is None else errors[wrong]))
        line += len(errors)
        place += errors.count(None)
        first += length
    return found


def _outcome(
    block: _Block, count: int, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None]
) -> Accepted:
    error = block.error if count == block.length else None
    stop = block.line + count + (error is None)
    return Accepted(list(tokens[block.line : stop]), list(logprobs[block.line : stop]), error)


def _views(rows: Sequence[RowState], drafts: Sequence[Draft]) -> list[RowState]:
    """A row for every line: its request as it would be with the drafted tokens before it."""
    views: list[RowState] = []
    for row, draft in zip(rows, drafts):
        views.append(row)
        views.extend(row.drafted(draft.tokens[:i]) for i in range(1, len(draft.tokens) + 1))
    return views


def _lines(drafts: Sequence[Draft], which: Sequence[int]) -> list[int]:
    begins = list(accumulate((1 + len(draft.tokens) for draft in drafts), initial=0))
    return [line for i in which for line in range(begins[i], begins[i + 1])]
