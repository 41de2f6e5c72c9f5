"""Whole sequences padded side by side against one after another: values and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from skimp.kernels.whole import attend_padded, attend_whole


def _qkv(rows: int, kv_heads: int, value_dim: int) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (rows, 4, 16), (rows, kv_heads, 16), (rows, kv_heads, value_dim)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("window", [None, 1, 5, 400])
@pytest.mark.parametrize("kv_heads, value_dim", [(4, 16), (2, 16), (4, 8)])
@pytest.mark.parametrize(
    "lengths", [(7, 1, 7, 3, 300, 290, 299, 6), (5,), (4, 0, 4), (600, 3)], ids=str
)
def test_padding_changes_nothing(
    lengths: tuple[int, ...], kv_heads: int, value_dim: int, window: int | None
) -> None:
    starts = (0, *itertools.accumulate(lengths))
    weights = torch.randn(starts[-1], 4, value_dim)
    found = []
    for attend in (attend_whole, attend_padded):
        qkv = _qkv(starts[-1], kv_heads, value_dim)
        out = attend(*qkv, starts, scale=0.3, window=window)
        (out * weights).sum().backward()
        found.append([out.detach(), *(x.grad for x in qkv)])
    for one, other in zip(*found):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


def test_each_sequence_sees_itself_alone() -> None:
    starts = (0, 3, 40, 43)
    q, k, v = (x.detach() for x in _qkv(43, 4, 16))
    before = attend_padded(q, k, v, starts, scale=0.3, window=None)
    k[3:40], v[3:40] = 7.0, float("nan")
    after = attend_padded(q, k, v, starts, scale=0.3, window=None)
    assert torch.equal(before[:3], after[:3]) and torch.equal(before[40:], after[40:])
    assert bool(after[3:40].isnan().all())
