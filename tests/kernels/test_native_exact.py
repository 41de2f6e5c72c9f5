"""Bit-exactness: a row's result depends neither on the other rows nor on the threads."""

from __future__ import annotations

import pytest
import torch
from native_support import ISAS, ROWS, make_linear, make_norm, make_rows, needs_native
from torch import Tensor

from skimp.kernels import native
from skimp.kernels.native import NativeOps, Program
from skimp.kernels.ops import StepInputs

pytestmark = needs_native
K, N, FFN, VOCAB = 70, 45, 100, 131
MOST = 300


class Chain:
    """Every op with an epilogue of its own, one after another."""

    def __init__(self, dtype: torch.dtype) -> None:
        def linear(k: int, n: int, seed: int):  # type: ignore[no-untyped-def]
            return make_linear(k, n, dtype, bias=True, seed=seed)

        self.deterministic = dtype == torch.bfloat16  # float32 needs no such mode
        self.source = make_rows(MOST, K)
        self.x = self.source.clone()
        self.rows = torch.arange(MOST, dtype=torch.int32)
        step = StepInputs(*([self.rows] * 6))
        norm = make_norm(K)
        ops = NativeOps()
        with torch.inference_mode():
            first = ops.pack([linear(K, N, 1), linear(K, 7, 2)])
            gated = ops.pack([linear(K, FFN, 3), linear(K, FFN, 4)], "gated")
            down, head = ops.pack([linear(FFN, K, 5)]), ops.pack([linear(K, VOCAB, 6)])
            with ops.capture(max_rows=MOST, max_seqs=1, max_logits=MOST) as program:
                self.qkv = ops.matmul(self.x, first, norm=norm)
                hidden = ops.matmul(self.x, gated, norm=norm, activation="silu")
                x = ops.matmul(hidden, down, residual=self.x)
                x = ops.add_norm(x, ops.matmul(hidden, down), norm)
                self.logits = ops.logits(x, head, norm, 30.0, step)
        self.program: Program = program

    def run(self, rows: Tensor, threads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Results for these rows of the source, computed together."""
        count = len(rows)
        self.x[:count] = self.source[rows]
        self.program.run(count, 1, count, threads, self.deterministic)
        return self.qkv[:count].clone(), self.x[:count].clone(), self.logits[:count].clone()


def check(chain: Chain) -> None:
    whole = chain.run(torch.arange(MOST), 1)
    generator = torch.Generator().manual_seed(0)
    for threads in (1, 2, 3, 5):
        for count in [*ROWS, 128, 129, 257, MOST]:
            rows = torch.randperm(MOST, generator=generator)[:count]
            for got, want in zip(chain.run(rows, threads), whole):
                assert torch.equal(got, want[rows]), (threads, count)


@pytest.mark.parametrize("isa", ISAS)
def test_float32_always(isa: str) -> None:
    with native.instruction_set(isa):
        check(Chain(torch.float32))


@pytest.mark.parametrize("isa", ISAS)
def test_bfloat16_in_deterministic_mode(isa: str) -> None:
    with native.instruction_set(isa):
        check(Chain(torch.bfloat16))


@pytest.mark.parametrize("isa", ISAS)
def test_bfloat16_repeats_for_any_number_of_threads(isa: str) -> None:
    """Without the mode, the same step still gives the same bits."""
    with native.instruction_set(isa):
        chain = Chain(torch.bfloat16)
        for count in (1, 5, 40, 300):
            rows = torch.arange(count)
            want = chain.run(rows, 1)
            for threads in (2, 3, 4, 7):
                for got, expected in zip(chain.run(rows, threads), want):
                    assert torch.equal(got, expected)
