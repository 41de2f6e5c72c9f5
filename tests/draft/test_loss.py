"""The chunked losses against those that hold all laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from skimp.draft.loss import Guesses, ce_share, judge
from skimp.draft.options import LOSSES, Loss

ROWS, SIZE, VOCAB = 11, 8, 30
GUESSES = Guesses(
    target_rows=np.array([1, 1, 2, 2, 2, 4, 5, 5, 8, 9, 10]),
    steps=np.array([0, 1, 0, 1, 2, 0, 0, 2, 0, 1, 0]),
)
WEIGHTS = [0.5, 0.3, 0.2]


def _brute(
    x: Tensor, weight: Tensor, words: Tensor | None, logits: Tensor, shares: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    p = logits.softmax(-1)[torch.from_numpy(GUESSES.target_rows)]
    z = x @ weight.T
    ids = torch.arange(VOCAB) if words is None else words
    q = torch.zeros(ROWS, VOCAB, dtype=x.dtype).index_add(1, ids, z.softmax(-1))
    own = p[:, ids]
    ce = -(own * z.log_softmax(-1)).sum(-1)
    accepted = torch.minimum(p, q).sum(-1)
    share = torch.tensor(shares, dtype=x.dtype)[torch.from_numpy(GUESSES.steps)]
    rows = torch.tensor(WEIGHTS, dtype=x.dtype)[torch.from_numpy(GUESSES.steps)]
    total = (rows * (share * ce + (1 - share) * (1 - accepted))).sum()
    return total, accepted, ids[z.argmax(-1)] == p.argmax(-1)


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_losses(loss: Loss, pruned: bool, chunk: int) -> None:
    generator = torch.Generator().manual_seed(2)
    words = torch.randperm(VOCAB, generator=generator)[:13].sort().values if pruned else None
    count = 13 if pruned else VOCAB
    x = torch.randn(ROWS, SIZE, generator=generator, requires_grad=True)
    weight = torch.randn(count, SIZE, generator=generator, requires_grad=True)
    logits = 2 * torch.randn(12, VOCAB, generator=generator)
    logits[3:6, :5] = -torch.inf  # words that the target rules out
    shares = [ce_share(loss, accepted) for accepted in (0.9, 0.5, 0.0)]
    found = judge(
        x, weight, words, lambda a, b: logits[a:b].clone(), GUESSES,
        weights=WEIGHTS, ce_shares=shares, chunk=chunk,
    )  # fmt: skip
    (found.loss * 3).backward()
    copies = [t.detach().double().requires_grad_() for t in (x, weight)]
    total, accepted, agreed = _brute(*copies, words, logits.double(), shares)
    (total * 3).backward()
    torch.testing.assert_close(found.loss, total.float())
    torch.testing.assert_close(found.accepted, accepted.float())
    assert torch.equal(found.agreed, agreed)
    for own, copy in zip((x, weight), copies):
        assert own.grad is not None and copy.grad is not None
        torch.testing.assert_close(own.grad, copy.grad.float(), rtol=1e-4, atol=1e-6)


def test_shares_of_ce() -> None:
    assert [ce_share(loss, 0.5) for loss in ("ce", "tv", "mix")] == [1.0, 0.0, 0.1]
    assert ce_share("lk", 0.0) == 1.0 > ce_share("lk", 0.3) > ce_share("lk", 0.9) > 0.05
