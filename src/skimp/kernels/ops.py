"""The kernel interface: what a mixer may ask of a backend.

A mixer or ffn is written once, against :class:`Ops`. Backends:

* ``plain`` (``kernels/plain.py``): PyTorch, any device, differentiable; the reference every other
  backend is tested against, and what runs where there is no compiler.
* ``native`` (``kernels/native``): C++ on the CPU. Calls are captured once into a program, and a
  step replays the program in one call.

Shape legend: R rows (query tokens of all sequences in the step, one after another), D hidden
size, N output features, V vocabulary, S sequences, L rows whose logits are wanted.
The residual stream is float32 on the CPU in both backends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from skimp.cache.spec import CacheSpec
from skimp.model.layers import Linear, RMSNorm
from skimp.model.spec import Activation, AttentionSpec

PackLayout = Literal["stack", "gated", "table"]


@dataclass(frozen=True)
class StepBounds:
    """What the host knows of a step whose inputs lie on a device."""

    rows: int  # of the sequence that has most
    context: int  # no ``kv_end`` is above
    whole: tuple[int, ...] = ()  # seq_starts, if all are causal, from 0, and worth a call each
    captured: bool = False  # the step is part of a graph, which goes on using its memory


@dataclass
class StepInputs:
    """One forward's inputs. Rows of a sequence are adjacent and in position order.

    With ``arena`` None nothing is cached: each sequence attends to the rows of this very step
    (training, calibration, evaluation of whole texts).
    """

    token_ids: Tensor  # int32 [R]
    positions: Tensor  # int32 [R]
    row_seq: Tensor  # int32 [R], index into the block tables
    kv_end: Tensor  # int32 [R]: the row sees keys at positions < kv_end (position + 1 if causal)
    seq_starts: Tensor  # int32 [S + 1], first row of each sequence, then R
    logit_rows: Tensor  # int32 [L]
    arena: Tensor | None = None  # uint8, the cache arena
    block_tables: tuple[Tensor, ...] = ()  # per group int32 [S, pages]: page address / 64 bytes
    bounds: StepBounds | None = None  # for backends that may not look at the tensors

    def to(self, device: torch.device) -> StepInputs:
        """The same step with its small tensors on ``device``; the arena stays where it is."""
        if self.token_ids.device == device:
            return self
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            positions=self.positions.to(device),
            row_seq=self.row_seq.to(device),
            kv_end=self.kv_end.to(device),
            seq_starts=self.seq_starts.to(device),
            logit_rows=self.logit_rows.to(device),
            block_tables=tuple(table.to(device) for table in self.block_tables),
        )


@dataclass(frozen=True)
class LayerCache:
    """Where one layer's share of a cache page lies: page start + ``offset`` bytes.

    How keys and values are laid out there is private to a backend. ``recent`` is where the newest
    tokens lie at full precision, beside the rounded ones: a query at position p reads those at
    positions > p - recent.spec.horizon there.
    """

    spec: CacheSpec
    group: int  # index into StepInputs.block_tables
    offset: int
    page_tokens: int
    recent: LayerCache | None = None


@dataclass
class AttentionParams:
    """Everything attention needs besides qkv; built by the attention mixer."""

    spec: AttentionSpec
    norm_eps: float
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    sinks: Tensor | None  # float32 [num_heads]
    rope: tuple[Tensor, Tensor] | None  # cos, sin: float32 [max_positions, rotary_dim / 2]
    cache: LayerCache | None


class Ops(Protocol):
    """A backend. ``Any`` matrices are the backend's own packed form, made by :meth:`pack`."""

    def pack(self, linears: Sequence[Linear], layout: PackLayout = "stack") -> Any:
        """One matrix from several that share their input.

        ``stack``: outputs side by side in order. ``gated``: (gate, up) arranged so that
        ``act(gate) * up`` is an epilogue. ``table``: a stack whose rows :meth:`embed` can read
        too, so tied embeddings are held once. The backend may set ``linear.weight`` to None once
        it holds its own copy.
        """
        ...

    def embed(self, step: StepInputs, table: Any, scale: float) -> Tensor:
        """Rows ``step.token_ids`` of a ``table`` matrix times ``scale``: float32 [R, D]."""
        ...

    def matmul(
        self,
        x: Tensor,
        matrix: Any,
        *,
        norm: RMSNorm | None = None,
        activation: Activation | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """``norm(x) @ matrix``; ``activation`` needs a gated matrix; ``residual`` is added (in
        place where the backend can) and returned as float32."""
        ...

    def add_norm(self, x: Tensor, y: Tensor, norm: RMSNorm) -> Tensor:
        """``x + norm(y)`` for sandwich norms."""
        ...

    def attention(self, qkv: Tensor, params: AttentionParams, step: StepInputs) -> Tensor:
        """QK-norm, RoPE, append of keys and values to the cache, then attention.

        ``qkv`` is [R, q_dim + 2 kv_dim]; the result is [R, q_dim].
        """
        ...

    def logits(
        self, x: Tensor, matrix: Any, norm: RMSNorm, softcap: float | None, step: StepInputs
    ) -> Tensor:
        """Final norm and output matrix for ``step.logit_rows``: float32 [L, V]."""
        ...
