"""Decides how many tokens of which sequences the next step computes.

There are no phases: a prompt's tokens and a generated token are alike, and one budget covers both.
Every sequence has tokens that are known and a cache that holds the first few of them; the
scheduler hands out the difference. When pages run out the sequence that came last gives its own
back and is computed again later (preemption by recompute).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from skimp.cache import CacheManager
from skimp.decoding.proposal import EMPTY, Ask, Draft, Proposer
from skimp.engine.request import Sequence


@dataclass(frozen=True)
class Work:
    """Compute tokens of ``seq`` from position ``start`` on: known ones, then drafted ones.

    ``reaches_end``: new tokens can be drawn from its logits. The last known token may be one that
    the host has yet to see (``Sequence.flying``).
    """

    seq: Sequence
    start: int
    num_known: int
    known_logits: int  # of the last known rows
    draft: Draft = EMPTY
    asked: int = 0  # the most that could have been drafted
    reaches_end: bool = False

    @property
    def num_logits(self) -> int:
        """Rows whose logits are wanted, the last ones."""
        return self.known_logits + len(self.draft.tokens)

    @property
    def num_tokens(self) -> int:
        return self.num_known + len(self.draft.tokens)

    @property
    def token_ids(self) -> list[int]:
        return [*self.seq.tokens[self.start : self.start + self.num_known], *self.draft.tokens]


class Scheduler:
    def __init__(
        self,
        cache: CacheManager,
        proposer: Proposer | None,
        *,
        token_budget: int,
        max_batch: int,
        max_logits: int,
    ) -> None:
        self.cache = cache
        self.proposer = proposer
        self.token_budget = token_budget
        self.max_batch = max_batch
        self.max_logits = max_logits
        self.running: list[Sequence] = []  # in order of rank: the first is preempted last
        self._waiting: list[tuple[tuple[int, int, int], Sequence]] = []
        self.preemptions = 0
        self._ended: list[Sequence] = []  # that the proposer may still know
        self.prompts_first = False  # generation waits while a prompt can go on
        self._no_room = False  # the first in the queue found no pages, and none came back since

    def add(self, seq: Sequence) -> None:
        self._no_room = False
        heapq.heappush(self._waiting, (seq.rank, seq))

    def start_running(self, seq: Sequence) -> None:
        """Admit a fork, whose cache is already open, beside its parent."""
        self.running.append(seq)
        self.running.sort(key=lambda s: s.rank)

    def remove(self, seq: Sequence) -> None:
        """Forget a finished or aborted sequence; its pages go back."""
        self._no_room = False
        self._ended.append(seq)
        if seq.cache is not None:
            self.cache.close(seq.cache)
            seq.cache = None
        if seq in self.running:
            self.running.remove(seq)
        else:
            self._waiting = [item for item in self._waiting if item[1] is not seq]
            heapq.heapify(self._waiting)

    def forget_ended(self) -> list[Sequence]:
        """Let the proposer forget what has ended, once nothing depends on its doing so; what that
        was."""
        ended, self._ended = self._ended, []
        if self.proposer is not None:
            for seq in ended:
                self.proposer.end(seq)
        return ended

    def schedule(self) -> list[Work]:
        """The next step, with cache room reserved for each part of it."""
        work = self._schedule(prompts_only=True) if self.prompts_first else []
        return work or self._schedule(prompts_only=False)

    def _schedule(self, *, prompts_only: bool) -> list[Work]:
        work: list[Work] = []
        budget, logits = self.token_budget, self.max_logits
        preempted = False
        index = 0
        while index < len(self.running) and budget and logits:
            seq = self.running[index]
            assert seq.cache is not None
            generates = seq.cache.length >= seq.num_prompt
            if seq.tokens_left <= 0 or (prompts_only and generates):
                index += 1  # its last token is drawn and on its way, or it waits for prompts
                continue
            item = self._size(seq, budget, logits)
            while seq.cache is not None and not self.cache.append(seq.cache, item.num_tokens):
                self.preempt(self.running[-1])
                preempted = True
            if seq.cache is None:
                break  # it was itself the last
            work.append(item)
            budget -= item.num_tokens
            logits -= item.num_logits
            index += 1
        # Windows give pages back as a prompt is read, and then generation would take them.
        if not self.running or prompts_only:
            self._no_room = False
        while self._waiting and budget and logits and not preempted and not self._no_room:
            seq = self._waiting[0][1]
            if sum(s.places for s in self.running) + seq.places > self.max_batch:
                break
            seq.cache = self.cache.open(seq.reusable, salt=seq.request.salt)
            seq.num_reused = seq.cache.length
            item = self._size(seq, budget, logits)
            if not self.cache.append(seq.cache, item.num_tokens):
                self.cache.close(seq.cache)
                seq.cache = None
                self._no_room = True
                break
            heapq.heappop(self._waiting)
            self.start_running(seq)
            work.append(item)
            budget -= item.num_tokens
            logits -= item.num_logits
        return work

    def add_drafts(
        self,
        work: list[Work],
        length: Callable[[Sequence], int],
        features: Mapping[Sequence, Tensor],
    ) -> None:
        """Put guesses, of a sequence at most ``length``, into what a step leaves of the budget,
        evenly: none takes the place of a token that is to be computed, or a page that somebody has.
        ``features``: see :class:`~skimp.decoding.proposal.Ask`."""
        may = [i for i, item in enumerate(work) if _may_draft(item)]
        if self.proposer is None or not may:
            return
        budget = self.token_budget - sum(item.num_tokens for item in work)
        logits = self.max_logits - sum(item.num_logits for item in work)
        share = min(budget // len(may), logits // len(may))
        asks: dict[int, Ask] = {}
        needs = getattr(self.proposer, "needs_features", False)
        for i in may:
            if needs and work[i].seq not in features:
                continue
            most = min(share, length(work[i].seq), work[i].seq.tokens_left - 1)
            if most > 0:
                asks[i] = _ask(work[i].seq, most, features.get(work[i].seq))
        if not asks:
            return
        drafts = self.proposer.propose(list(asks.values()))
        for (i, ask), draft in zip(asks.items(), drafts, strict=True):
            assert len(draft.tokens) <= ask.most, "a draft is longer than was asked for"
            cache = work[i].seq.cache
            assert cache is not None
            if draft.tokens:
                room = self.cache.extend(cache, len(draft.tokens))
                draft = draft.cut(room)
            work[i] = replace(work[i], draft=draft, asked=ask.most)

    def _size(self, seq: Sequence, budget: int, logits: int) -> Work:
        assert seq.cache is not None
        start = seq.cache.length
        known = min(seq.num_tokens - start, budget)
        row = seq.request.next_row
        if row is not None:
            known = min(known, row - start + logits)
            end = start + known == seq.num_tokens
            return Work(seq, start, known, max(0, start + known - row), reaches_end=end)
        end = start + known == seq.num_tokens
        return Work(seq, start, known, int(end), reaches_end=end)

    def preempt(self, seq: Sequence) -> None:
        """Take a running sequence's pages; it waits to be computed again."""
        assert seq.cache is not None
        self.cache.close(seq.cache)
        seq.cache = None
        seq.request.metrics.preemptions += 1
        self.running.remove(seq)
        self.preemptions += 1
        self.add(seq)


def _may_draft(item: Work) -> bool:
    """Samples that share a cache until the prompt is done may accept different parts of a draft,
    and what a grammar allows now says nothing of later tokens."""
    seq = item.seq
    free = seq.request.next_row is None and seq.sampling.allowed is None
    return item.reaches_end and seq.places == 1 and free


def _ask(seq: Sequence, most: int, features: Tensor | None) -> Ask:
    return Ask(
        key=seq,
        tokens=seq.tokens,
        num_prompt=seq.num_prompt,
        most=most,
        row=seq.sampling,
        salt=seq.request.salt,
        features=features,
    )
