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

from collections.abc import Sequence
from typing import Final, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skimp.decoding.process import Processed, draw, process
from skimp.decoding.proposal import Accepted, Draft
from skimp.decoding.rng import Purpose, uniforms
from skimp.decoding.rows import RowState
from skimp.decoding.sampler import Sampler, TokenLogprobs

Floats = NDArray[np.float64]
RuleName = Literal["block", "chain"]


class Rule(Protocol):
    """Of one block, everything in float64; see the module."""

    def shares(self, ratios: Floats) -> Floats:
        """c_0 .. c_k, of ``ratios`` r_1 .. r_k."""
        ...

    def chances(self, ratios: Floats, left: Floats) -> Floats:
        """That exactly 0 .. k tokens stand; ``left`` [k] are the sums of (c_i p_{i+1} - q_{i+1})+
        for i = 0 .. k - 1."""
        ...


class Chain:
    """The first refusal ends the block."""

    def shares(self, ratios: Floats) -> Floats:
        return np.ones(len(ratios) + 1)

    def chances(self, ratios: Floats, left: Floats) -> Floats:
        keeps = np.minimum(ratios, 1.0)
        reached = np.concatenate(([1.0], np.cumprod(keeps)))
        reached[:-1] *= 1.0 - keeps
        return reached


class Block:
    """A token with p > q makes up for one before it with p < q."""

    def shares(self, ratios: Floats) -> Floats:
        found = np.ones(len(ratios) + 1)
        for i, ratio in enumerate(ratios):
            found[i + 1] = min(found[i] * ratio, 1.0) if found[i] > 0.0 else 0.0
        return found

    def chances(self, ratios: Floats, left: Floats) -> Floats:
        shares = self.shares(ratios)
        stands = shares.copy()  # the chance of "i or more", given that i + 1 and more fell
        stands[0] = 1.0
        inner, rest = left[1:], 1.0 - shares[1:-1]
        whole = inner + rest
        # Nothing left and nothing missing: both laws are one, and no draft falls here.
        stands[1:-1] = np.divide(inner, whole, out=np.ones_like(inner), where=whole > 0.0)
        fell = np.concatenate((np.cumprod((1.0 - stands[1:])[::-1])[::-1], [1.0]))
        found: Floats = stands * fell
        return found


RULES: Final[dict[RuleName, Rule]] = {"block": Block(), "chain": Chain()}


def left_of(weights: Tensor, laws: Tensor, shares: Tensor) -> Tensor:
    """(c p - q)+, float64 [N, V]. ``weights`` are p and ``laws`` q [N, V]; ``shares`` c [N]."""
    return (weights * shares[:, None]).sub_(laws).clamp_(min=0.0)


def ends_after(weights: Tensor, laws: Tensor, shares: Tensor) -> Tensor:
    """What the token after a refusal is drawn from: :func:`left_of`, or p where nothing is left
    (p = q to the last bit)."""
    left = left_of(weights, laws, shares)
    empty = left.sum(dim=-1) <= 0.0
    return torch.where(empty[:, None], weights, left)


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
        kept, after = self._judge(processed, rows, drafts, blocks)
        tokens = [-1] * len(views)
        for draft, block, count, token in zip(drafts, blocks, kept, after):
            tokens[block.line : block.line + count] = draft.tokens[:count]
            tokens[block.line + count] = token
        logprobs = self._sampler.logprobs(logits, processed, views, tokens)
        return [_outcome(block, count, tokens, logprobs) for block, count in zip(blocks, kept)]

    def _judge(
        self,
        processed: Processed,
        rows: Sequence[RowState],
        drafts: Sequence[Draft],
        blocks: Sequence[_Block],
    ) -> tuple[list[int], list[int]]:
        """Of each block, how many tokens stand, and the one after them (-1: it has no law)."""
        if processed.weights is None:  # every line is in error
            return [0] * len(rows), [-1] * len(rows)
        device = processed.weights.device
        target = processed.weights / processed.weights.sum(dim=-1, keepdim=True)
        place = {line: i for i, line in enumerate(processed.sampled)}
        lines = [place[b.line + i] for b in blocks for i in range(b.length)]
        ids = [draft.tokens[i] for draft, b in zip(drafts, blocks) for i in range(b.length)]
        parts = [
            draft.laws[: b.length] for draft, b in zip(drafts, blocks) if draft.laws is not None
        ]
        laws = torch.cat(parts).to(device)
        at = torch.tensor([lines, ids], dtype=torch.int64, device=device)
        p = target[at[0]]
        chosen = at[1][:, None]
        q_there = laws.gather(1, chosen)[:, 0].cpu().numpy()
        assert (q_there > 0.0).all(), "a drafted token has no chance under the law it came from"
        ratios = p.gather(1, chosen)[:, 0].cpu().numpy() / q_there
        ends = np.cumsum([b.length for b in blocks])[:-1]
        by_block = np.split(ratios, ends)
        shares = [self._rule.shares(one) for one in by_block]
        flat = np.concatenate([one[:-1] for one in shares])
        share = torch.from_numpy(flat).to(device)
        left = left_of(p, laws, share).sum(dim=-1).cpu().numpy()
        keys = [row.key for row in rows]
        starts = [row.position for row in rows]
        kept = []
        numbers = uniforms(keys, starts, Purpose.ACCEPT)
        for one, rest, number in zip(by_block, np.split(left, ends), numbers):
            chances = self._rule.chances(one, rest).cumsum()
            kept.append(int(np.searchsorted(chances[:-1], number * chances[-1], side="right")))
        return kept, self._follow(target, place, p, laws, share, rows, blocks, kept)

    def _follow(
        self,
        target: Tensor,
        place: dict[int, int],
        p: Tensor,
        laws: Tensor,
        share: Tensor,
        rows: Sequence[RowState],
        blocks: Sequence[_Block],
        kept: Sequence[int],
    ) -> list[int]:
        """Draw the token after those that stand."""
        begins = np.cumsum([0, *(b.length for b in blocks)])
        fell = [i for i, b in enumerate(blocks) if kept[i] < b.length]
        whole = [
            i for i, b in enumerate(blocks) if kept[i] == b.length and b.line + kept[i] in place
        ]
        found: dict[int, int] = {}

        def draw_after(weights: Tensor, which: Sequence[int], purpose: Purpose) -> None:
            keys = [rows[i].key for i in which]
            positions = [rows[i].position + kept[i] for i in which]
            numbers = torch.from_numpy(uniforms(keys, positions, purpose)).to(weights.device)
            found.update(zip(which, draw(weights, numbers).tolist()))

        if fell:
            at = torch.tensor([int(begins[i]) + kept[i] for i in fell], device=p.device)
            draw_after(ends_after(p[at], laws[at], share[at]), fell, Purpose.RESIDUAL)
        if whole:
            at = torch.tensor([place[blocks[i].line + kept[i]] for i in whole], device=p.device)
            draw_after(target[at], whole, Purpose.SAMPLE)
        return [found.get(i, -1) for i in range(len(rows))]


class _Block:
    """A draft's lines in the logits: the first, how many of its tokens are judged, and what is
    wrong with the line after these, if anything is."""

    __slots__ = ("error", "length", "line")

    def __init__(self, line: int, length: int, error: str | None) -> None:
        self.line, self.length, self.error = line, length, error


def _blocks(processed: Processed, drafts: Sequence[Draft]) -> list[_Block]:
    """A line without a law ends its block: whoever gets there learns why."""
    found, line = [], 0
    for draft in drafts:
        errors = processed.errors[line : line + len(draft.tokens) + 1]
        wrong = next((i for i, error in enumerate(errors) if error is not None), None)
        if wrong is None:
            found.append(_Block(line, len(draft.tokens), None))
        else:
            found.append(_Block(line, wrong, errors[wrong]))
        line += len(errors)
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
    begins = np.cumsum([0, *(1 + len(draft.tokens) for draft in drafts)])
    return [line for i in which for line in range(int(begins[i]), int(begins[i + 1]))]
