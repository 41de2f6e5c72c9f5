"""The GPU backend: a step of generation is one CUDA graph, launched before the last has ended."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from skimp.engine.backends import MOST_GRAPHED, Forward, StepBuffers
from skimp.kernels.ops import StepBounds, StepInputs
from skimp.kernels.triton import vendor
from skimp.kernels.triton.ops import TritonOps
from skimp.kernels.triton.rows import pick_drawn, row_max
from skimp.model.decoder import Decoder

ROWS_GRAPHED = (1, 2, 3, 5, 9, 17, 33)  # of a sequence: few, for each takes a capture


@dataclass(frozen=True)
class Shape:
    """``seqs`` sequences of at most ``rows`` rows, padding included; ``every``: logits of all rows,
    else of one a sequence; ``wants_features``: where a draft head goes on from the model."""

    seqs: int
    rows: int
    every: bool
    wants_features: bool = False

    @property
    def num_rows(self) -> int:
        return self.seqs * self.rows

    @property
    def num_logits(self) -> int:
        return self.num_rows if self.every else self.seqs


@dataclass(frozen=True)
class Captured:
    """A graph and what its replay leaves: logits, their rows' maxima and where they are, and what a
    draft head goes on from."""

    graph: torch.cuda.CUDAGraph
    logits: Tensor
    highest: tuple[Tensor, Tensor]
    features: Tensor | None


def graph_sizes(most: int) -> list[int]:
    """Batch sizes that have a graph; a batch takes the next larger one."""
    sizes = [1, 2, 4, 8, *range(16, 64, 8), *range(64, 128, 16), *range(128, MOST_GRAPHED + 1, 32)]
    return [size for size in sizes if size < most] + [min(most, MOST_GRAPHED)]


class GraphBackend:
    """Steps in which every sequence gains one row, or few where tokens are guessed, are replayed;
    others are launched kernel by kernel. A shape's graph is captured when it is first needed.

    The small inputs of a step travel in one copy out of pinned memory, which is written again only
    when that copy is done; block tables lie in pinned memory themselves.
    """

    name: Literal["triton"] = "triton"

    def __init__(
        self, decoder: Forward, buffers: StepBuffers, ops: TritonOps, *, max_context: int
    ) -> None:
        self._decoder, self._buffers, self._ops = decoder, buffers, ops
        self._device = buffers.arena.device
        self._max_context = max_context
        self._sizes = graph_sizes(buffers.max_seqs)
        self._graphs: dict[Shape, Captured] = {}
        self._highest: tuple[Tensor, Tensor] | None = None
        self._features: Tensor | None = None
        self._fuses = isinstance(decoder, Decoder) and decoder.fusion is not None
        self._pool = torch.cuda.graph_pool_handle()  # shared: only one graph runs at a time
        most = 5 * buffers.max_rows + buffers.max_seqs + 1 + buffers.max_logits
        self._staging = torch.zeros(most, dtype=torch.int32, pin_memory=True)
        self._inputs = torch.zeros(most, dtype=torch.int32, device=self._device)
        self._tables = [
            torch.zeros(table.shape, dtype=torch.int32, device=self._device)
            for table in buffers.tables
        ]
        self._copied = torch.cuda.Event()
        self._copied.record()

    @property
    def captures(self) -> int:
        return len(self._graphs)

    def wait(self) -> None:
        self._copied.synchronize()

    def graph(self, batch: int) -> torch.cuda.CUDAGraph:
        """The graph that a generation step of ``batch`` sequences replays; KeyError before it has
        been captured."""
        return self._graphs[Shape(self._size(batch), 1, False)].graph

    @torch.inference_mode()
    def forward(
        self, rows: int, num_seqs: int, num_logits: int, *, wants_features: bool = True
    ) -> Tensor:
        wants_features = wants_features and self._fuses
        shape = self._shape(rows, num_seqs, num_logits, wants_features)
        if shape is None:
            self._send(rows, num_seqs, num_logits)
            self._highest = None
            bounds = self._bounds(rows, num_seqs)
            logits = self._run(self._step(rows, num_seqs, num_logits, bounds, wants_features))
            self._features = self._decoder.features
            return logits
        self._pad(rows, num_seqs, num_logits, shape)
        self._send(shape.num_rows, shape.seqs, shape.num_logits)
        captured = self._graphs.get(shape)
        if captured is None:
            captured = self._graphs[shape] = self._capture(shape)
        captured.graph.replay()
        top, best = captured.highest
        self._highest = top[:num_logits], best[:num_logits]
        self._features = captured.features
        return captured.logits[:num_logits]

    def _size(self, num_seqs: int) -> int:
        return self._sizes[bisect_left(self._sizes, num_seqs)]

    def _shape(
        self, rows: int, num_seqs: int, num_logits: int, wants_features: bool
    ) -> Shape | None:
        """The smallest that has a graph and holds the step; None: there is none."""
        if num_seqs > self._sizes[-1]:
            return None
        size = self._size(num_seqs)
        if rows == num_seqs == num_logits:
            return Shape(size, 1, False, wants_features)
        most = int(np.diff(self._buffers.seq_starts[: num_seqs + 1]).max())
        if most > self._buffers.guessed_rows:
            return None
        most = ROWS_GRAPHED[bisect_left(ROWS_GRAPHED, most)]
        shape = Shape(size, most, num_logits > num_seqs, wants_features)
        return None if shape.num_rows > MOST_GRAPHED else shape

    def highest(self) -> tuple[Tensor, Tensor] | None:
        return self._highest

    def features(self) -> Tensor | None:
        return self._features

    def _bounds(self, rows: int, num_seqs: int) -> StepBounds:
        """Rounded up, so that few plans serve many steps."""
        buffers = self._buffers
        starts = buffers.seq_starts[: num_seqs + 1]
        lengths = np.diff(starts)
        most, context = int(lengths.max()), int(buffers.kv_end[:rows].max())
        fresh = not buffers.positions[starts[:-1]].any() and lengths.min() >= vendor.LEAST_ROWS
        return StepBounds(
            1 << (most - 1).bit_length(),
            1 << (context - 1).bit_length(),
            tuple(starts.tolist()) if fresh else (),
        )

    def _run(self, step: StepInputs) -> Tensor:
        pick_drawn(step.token_ids, self._source(step.token_ids.shape[0]), self._buffers.drawn)
        logits: Tensor = self._decoder(step, self._ops)
        return logits

    def _capture(self, shape: Shape) -> Captured:
        bounds = StepBounds(shape.rows, self._max_context, captured=True)
        step = self._step(
            shape.num_rows, shape.seqs, shape.num_logits, bounds, shape.wants_features
        )
        features = None if step.features is None else step.features.clone()
        row_max(self._run(step))  # compiles; the replay writes the same keys and values again
        if features is not None:
            assert step.features is not None
            step.features.copy_(features)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._run(step)
            highest = row_max(logits)
        return Captured(graph, logits, highest, self._decoder.features)

    def _pad(self, rows: int, num_seqs: int, num_logits: int, shape: Shape) -> None:
        """Rows without a sequence, which read and write nothing of the cache. Where each sequence
        has one row they are sequences of their own, else the last sequences have none."""
        buffers, size = self._buffers, shape.num_rows
        extra = np.arange(rows, size)
        alone = shape.rows == 1
        buffers.token_ids[rows:size] = 0
        buffers.token_source[rows:size] = -1
        buffers.positions[rows:size] = -1
        buffers.kv_end[rows:size] = 0
        buffers.row_seq[rows:size] = extra if alone else 0
        buffers.seq_starts[num_seqs + 1 : shape.seqs + 1] = extra + 1 if alone else rows
        buffers.logit_rows[num_logits : shape.num_logits] = extra if alone else 0

    def _send(self, rows: int, num_seqs: int, num_logits: int) -> None:
        buffers, staging, place = self._buffers, self._staging.numpy(), 0
        for source, count in (
            (buffers.token_ids, rows),
            (buffers.token_source, rows),
            (buffers.positions, rows),
            (buffers.row_seq, rows),
            (buffers.kv_end, rows),
            (buffers.seq_starts, num_seqs + 1),
            (buffers.logit_rows, num_logits),
        ):
            staging[place : place + count] = source[:count]
            place += count
        self._inputs[:place].copy_(self._staging[:place], non_blocking=True)
        changed = buffers.changed_tables
        if changed:
            low, high = min(changed), max(changed) + 1
            for table, pinned in zip(self._tables, buffers.table_tensors):
                table[low:high].copy_(pinned[low:high], non_blocking=True)
            changed.clear()
        self._copied.record()

    def _source(self, rows: int) -> Tensor:
        return self._inputs[rows : 2 * rows]

    def _step(
        self,
        rows: int,
        num_seqs: int,
        num_logits: int,
        bounds: StepBounds,
        wants_features: bool,
    ) -> StepInputs:
        """Where :meth:`_send` puts the inputs of a step of this size."""
        counts = (rows, rows, rows, rows, rows, num_seqs + 1, num_logits)
        parts = self._inputs[: sum(counts)].split(counts)
        return StepInputs(
            token_ids=parts[0],
            positions=parts[2],
            row_seq=parts[3],
            kv_end=parts[4],
            seq_starts=parts[5],
            logit_rows=parts[6],
            arena=self._buffers.arena,
            block_tables=tuple(self._tables),
            bounds=bounds,
            features=None if self._buffers.features is None else self._buffers.features[:rows],
            wants_features=wants_features,
        )
