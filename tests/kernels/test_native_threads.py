"""The thread team: concurrent callers, forks, many threads, many short programs."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time

import pytest
import torch
from native_support import make_linear, make_rows, needs_native
from torch import Tensor

from skimp.kernels import native
from skimp.kernels.native import NativeOps, Program

pytestmark = needs_native


def small_program() -> tuple[Program, Tensor, Tensor]:
    ops = NativeOps()
    x = make_rows(8, 64)
    linear = make_linear(64, 64, torch.float32)
    assert linear.weight is not None
    want = x @ linear.weight.detach().T
    with torch.no_grad():
        matrix = ops.pack([linear])
        with ops.capture(max_rows=8, max_seqs=1, max_logits=1) as program:
            out = ops.matmul(x, matrix)
    return program, out, want


def test_callers_take_turns() -> None:
    programs = [small_program() for _ in range(4)]
    failures: list[str] = []

    def work(program: Program, out: Tensor, want: Tensor) -> None:
        for i in range(300):
            out.zero_()
            program.run(8, threads=1 + i % 3)
            if not torch.allclose(out, want, atol=1e-4):
                failures.append(f"{threading.current_thread().name}, round {i}")

    threads = [threading.Thread(target=work, args=args) for args in programs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "deadlock"
    assert not failures


def test_many_more_threads_than_cores() -> None:
    program, out, want = small_program()
    for _ in range(20):
        out.zero_()
        program.run(8, threads=24)
        assert torch.allclose(out, want, atol=1e-4)


def test_number_of_threads() -> None:
    before = native.get_threads()
    assert 1 <= native.default_threads() <= (os.cpu_count() or 1)
    try:
        native.set_threads(3)
        assert native.get_threads() == 3
        with pytest.raises(ValueError, match="threads"):
            native.set_threads(0)
    finally:
        native.set_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_can_run() -> None:
    program, out, want = small_program()
    program.run(8, threads=2)

    def child() -> None:
        out.zero_()
        program.run(8, threads=2)
        os._exit(0 if bool((out - want).abs().max() < 1e-4) else 1)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(timeout=60)
    assert process.exitcode == 0
    program.run(8, threads=2)


def test_idle_threads_sleep() -> None:
    """Workers spin only for a moment: an idle team takes no processor time."""
    program, _, _ = small_program()
    for _ in range(10):
        program.run(8, threads=4)
    time.sleep(0.05)
    start = time.process_time()
    time.sleep(0.4)
    assert time.process_time() - start < 0.1
