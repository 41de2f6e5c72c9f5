"""A small model, a run of a recipe over it, and what a run left."""

from __future__ import annotations

import hashlib
import multiprocessing
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from shrink.steps import REGISTRY
from tiny_models import VOCAB, tiny_decoder, tiny_spec

from skimp.model.saving import save_checkpoint
from skimp.shrink import pipeline
from skimp.shrink.recipe import parse_recipe

SHARD = 100_000
RECIPE = """
- look: {log: LOG}
- rotate: {}
- quantize: {format: int4, method: gptq, group_size: 32}
"""


def write_small(directory: Path, layers: int = 4, seed: int = 0) -> Path:
    decoder = tiny_decoder(tiny_spec((None,) * layers), seed=seed)
    return save_checkpoint(directory, decoder.spec, decoder, shard_bytes=SHARD)


def small_tokens() -> torch.Tensor:
    return torch.randint(1, VOCAB, (6, 24), generator=torch.Generator().manual_seed(1))


def run(
    model: Path, text: str, output: Path, *, tokens: torch.Tensor | None = None, **kw: Any
) -> pipeline.Outcome:
    recipe = parse_recipe(text, "r.yaml", model.parent, REGISTRY)
    job = pipeline.prepare(model, recipe)
    tokens = small_tokens() if tokens is None else tokens
    return pipeline.shrink(job, output, tokens=tokens, shard_bytes=SHARD, **kw)


def hashes(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir())}


def work_of(output: Path) -> Path:
    return output.parent / f".{output.name}.shrink"


def _child(pipe: Connection, model: Path, text: str, output: Path) -> None:
    torch.set_num_threads(1)
    real = pipeline.save_checkpoint

    def save(*args: Any, **kw: Any) -> Path:
        pipe.send("writing")
        return real(*args, **kw)

    pipeline.save_checkpoint = save
    small_tokens()
    pipe.send("running")
    run(model, text, output)
    pipe.send("done")


class Victim:
    """A run in a process of its own, which can be killed."""

    def __init__(self, model: Path, text: str, output: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["shrink.runs", "skimp.shrink.quantize.calibrated", "skimp.shrink.heal.train"]
        )
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_child, args=(theirs, model, text, output))
        self._process.start()
        theirs.close()
        self.wait("running")

    def wait(self, word: str) -> float:
        """Seconds until the run says ``word``; EOFError if it dies first."""
        begin = time.perf_counter()
        while self._pipe.recv() != word:
            pass
        return time.perf_counter() - begin

    def kill_after(self, seconds: float) -> bool:
        """Whether it was still running."""
        time.sleep(seconds)
        self._process.kill()
        self._process.join()
        return self._process.exitcode == -signal.SIGKILL

    def join(self) -> None:
        self._process.join()
        assert self._process.exitcode == 0
