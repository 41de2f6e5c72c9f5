"""A trained head that guesses from what the target computed of the tokens before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from skimp.decoding.proposal import Ask
from skimp.engine.drafting import DraftedSequence, Guess, GuessRows, ModelProposer
from skimp.engine.options import EngineOptions
from skimp.engine.served import ServedModel
from skimp.model.decoder import Decoder
from skimp.model.draft_head import DraftHead


class HeadProposer(ModelProposer):
    """Guesses with a :class:`~skimp.model.draft_head.DraftHead`, whose fusion ``target`` computes.

    Features last until the target's next step, and a prompt that was reused has none. So a head
    remembers what it has seen without a gap: after one it begins again with an empty past.
    """

    needs_features = True

    def __init__(
        self,
        head: DraftHead,
        decoder: Decoder,
        target: ServedModel,
        options: EngineOptions,
        *,
        coupled: bool,
    ) -> None:
        """``decoder`` is the one that ``target`` serves, with the head's fusion."""
        head.attach(decoder.table, decoder.spec.embed_scale)
        own = options.for_draft(max_context=target.max_context, backend=target.backend_name)
        # Its past begins anywhere in a text, so none of it serves another.
        own = replace(own, prefix_cache=False, cache_dtype="auto")
        spec = head.spec.as_model(max_positions=target.max_context)
        served = ServedModel(
            head,
            spec,
            own,
            max_logits=options.max_batch,
            feature_size=spec.hidden_size,
            guessed_rows=1 + options.longest_draft,
        )
        ids = head.token_ids.cpu()
        every = torch.equal(ids, torch.arange(target.spec.vocab_size))
        super().__init__(
            served,
            coupled=coupled,
            vocab_size=target.spec.vocab_size,
            words=None if every else ids.long().to(options.device),
        )

    def _begin(self, ask: Ask) -> Guess | None:
        features, tokens, cache = ask.features, ask.tokens, self.served.cache
        if features is None or ask.most < 1:
            return None
        first = len(tokens) - len(features)
        seq = self._known.get(ask.key)
        if seq is None or seq.base + seq.cache.length != first:
            if seq is not None:
                cache.close(seq.cache)
            seq = DraftedSequence(cache.open([]), first)
            self._known[ask.key] = seq
        if seq.cache.pending:  # a round before failed
            cache.commit(seq.cache, 0, [])
        start = seq.cache.length
        room = self.served.max_context - start - len(features) - ask.most
        if room < 0 or not cache.append(seq.cache, len(features) + ask.most - 1):
            self.end(ask.key)
            return None
        seq.tokens[start:] = tokens[first:]
        seq.written = 0
        return Guess(ask, seq, start=start)

    def _end_of(self, guess: Guess) -> None:
        """Rows that came of the target's features stay, those of guesses do not."""
        seq, features = guess.seq, guess.ask.features
        assert features is not None
        stop = guess.start + len(features)
        kept = min(len(features), seq.written)
        self.served.cache.commit(seq.cache, kept, seq.tokens[guess.start : stop])
        seq.written = 0

    def _logits(self, work: Sequence[GuessRows]) -> Tensor:
        runner = self.served.runner
        features = self._features(work)
        row = 0
        for rows in work:
            row += rows.num_tokens
            rows.guess.last_row = row - 1
        return runner.run(work, features)

    def _features(self, work: Sequence[GuessRows]) -> Tensor:
        """What the rows go on from: the target's as long as there are any, then the head's own."""
        own = self.served.runner.backend.features()
        parts, lasts = [], []
        for rows in work:
            given = rows.guess.ask.features
            assert given is not None
            offset = rows.start - rows.guess.start
            if offset < len(given):
                parts.append(given[offset : offset + rows.num_tokens])
            else:
                assert own is not None
                last = rows.guess.last_row
                lasts.append(last)
                parts.append(own[last : last + 1])
        if own is not None and lasts == list(range(len(work))):
            return own[: len(work)]
        return torch.cat(parts)
