"""Turns a scheduler's decision into one forward: fills the step's inputs and runs the backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from skimp.cache import BlockTables, CacheSequence
from skimp.engine.backends import Backend, StepBuffers
from skimp.engine.request import Flying


class Tokens(Protocol):
    """A sequence, as far as a runner reads it."""

    @property
    def tokens(self) -> list[int]: ...
    @property
    def cache(self) -> CacheSequence | None: ...
    @property
    def flying(self) -> Flying | None: ...


class Rows(Protocol):
    """``num_tokens`` rows of a sequence from ``start`` on; of the last ``num_logits`` of them the
    logits are wanted."""

    @property
    def seq(self) -> Tokens: ...
    @property
    def start(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_logits(self) -> int: ...
    @property
    def token_ids(self) -> list[int]: ...


class Runner:
    def __init__(self, backend: Backend, buffers: StepBuffers) -> None:
        self.backend, self.buffers = backend, buffers
        self._tables = BlockTables(buffers.tables)

    def run(
        self,
        work: Sequence[Rows],
        features: Tensor | None = None,
        *,
        wants_features: bool = True,
    ) -> Tensor:
        """Logits float32 [L, V] of the rows each part of the work asked for, in order; of a draft
        head from the rows' ``features`` float32 [R, D]. ``wants_features``: see ``Backend``."""
        buffers = self.buffers
        self.backend.wait()
        if features is not None:
            assert buffers.features is not None
            buffers.features[: len(features)] = features
        buffers.any_drawn = False
        row = logit = 0
        for index, item in enumerate(work):
            start, count = item.start, item.num_tokens
            buffers.seq_starts[index] = row
            if count == 1:
                if start < len(item.seq.tokens):
                    buffers.token_ids[row] = item.seq.tokens[start]
                    buffers.token_source[row] = -1
                else:
                    assert item.seq.flying is not None
                    buffers.token_source[row] = item.seq.flying.place
                    buffers.any_drawn = True
                buffers.positions[row] = start
                buffers.kv_end[row] = start + 1
                buffers.row_seq[row] = index
            else:
                rows = slice(row, row + count)
                token_ids = item.token_ids
                assert len(token_ids) == count, "a prompt's token is on its way"
                buffers.token_ids[rows] = token_ids
                buffers.token_source[rows] = -1
                buffers.positions[rows] = np.arange(start, start + count)
                buffers.kv_end[rows] = np.arange(start + 1, start + count + 1)
                buffers.row_seq[rows] = index
            row += count
            for offset in range(item.num_logits, 0, -1):
                buffers.logit_rows[logit] = row - offset
                logit += 1
        buffers.seq_starts[len(work)] = row
        caches = [item.seq.cache for item in work if item.seq.cache is not None]
        buffers.changed_tables.update(self._tables.update(caches))
        return self.backend.forward(row, len(work), logit, wants_features=wants_features)

    @contextmanager
    def sampling_threads(self) -> Iterator[None]:
        """PyTorch on one thread while it draws from a native step's logits: waking its second
        team costs more than it saves, and the two teams would spin against each other."""
        threads = torch.get_num_threads()
        if self.backend.name != "native" or threads == 1:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
