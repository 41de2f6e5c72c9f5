"""A smaller model that guesses for a larger one: a draft model with a cache of its own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from skimp.decoding.proposal import Ask
from skimp.engine.drafting import DraftedSequence, Guess, GuessRows, ModelProposer
from skimp.engine.options import EngineOptions
from skimp.engine.served import ServedModel
from skimp.errors import OptionError
from skimp.model.decoder import Decoder
from skimp.model.spec import ModelSpec
from skimp.text.tokenizer import Tokenizer


def require_same_tokens(
    name: str, draft: ModelSpec, own: Tokenizer | None, target: ModelSpec, theirs: Tokenizer | None
) -> None:
    """Raise ``OptionError`` unless a token id means the same to both models."""
    if draft.vocab_size != target.vocab_size:
        raise OptionError(
            f"draft_model: {name} has {draft.vocab_size} tokens, the model {target.vocab_size}"
        )
    if own is None or theirs is None:
        return
    for token_id in range(target.vocab_size):
        if own.token(token_id) != theirs.token(token_id):
            raise OptionError(
                f"draft_model: token {token_id} is {own.token(token_id)!r} to {name} and "
                f"{theirs.token(token_id)!r} to the model"
            )


class DraftModel(ModelProposer):
    """Guesses with a whole model, which reads what the target reads."""

    def __init__(self, decoder: Decoder, options: EngineOptions, *, coupled: bool) -> None:
        longest = min(decoder.spec.max_positions, options.max_context or 1 << 62)
        own = options.for_draft(max_context=longest)
        served = ServedModel(
            decoder,
            decoder.spec,
            own,
            max_logits=options.max_batch,
            guessed_rows=1 + options.longest_draft,
        )
        super().__init__(served, coupled=coupled, vocab_size=decoder.spec.vocab_size)

    def _begin(self, ask: Ask) -> Guess | None:
        tokens, cache = ask.tokens, self.served.cache
        if len(tokens) + ask.most > self.served.max_context or ask.most < 1:
            return None
        seq = self._known.get(ask.key)
        if seq is None:
            seq = DraftedSequence(cache.open(list(tokens), salt=ask.salt))
            self._known[ask.key] = seq
            seq.tokens = list(tokens)
        else:
            base, last = seq.cache.length, len(tokens) - 1
            right = 0
            while right < min(seq.written, last - base) and (
                seq.tokens[base + right] == tokens[base + right]
            ):
                right += 1
            if seq.cache.pending:
                cache.commit(seq.cache, right, tokens[base : base + right])
            seq.tokens[base + right :] = tokens[base + right :]
            seq.written = 0
        missing = len(tokens) - seq.cache.length
        if not cache.append(seq.cache, missing + ask.most - 1):
            return None
        return Guess(ask, seq)

    def _end_of(self, guess: Guess) -> None:
        """Nothing yet: guesses that turn out right need not be computed again."""

    def _logits(self, work: Sequence[GuessRows]) -> Tensor:
        return self.served.runner.run(work)
