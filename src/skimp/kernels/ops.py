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
from skimp.model.layers import FusedExperts, Linear, RMSNorm
from skimp.model.spec import Activation, AttentionSpec, ExpertsSpec, LatentAttentionSpec

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
    features: Tensor | None = None  # float32 [R, D]: what a draft head's rows go on from
    wants_features: bool = True  # whether a model leaves those of its rows, if it has a fusion

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


@dataclass
class LatentParams:
    """Everything latent attention needs besides queries, latents and what makes heads of them."""

    spec: LatentAttentionSpec
    latent_norm: RMSNorm
    rope: tuple[Tensor, Tensor] | None  # cos, sin: float32 [max_positions, rope_dim / 2]
    cache: LayerCache | None


@dataclass
class ExpertParams:
    """A mixture of experts but for the shared one; built by the feed-forward sublayer."""

    spec: ExpertsSpec
    router: Linear
    correction: Tensor | None  # float32 [experts]
    experts: FusedExperts | Sequence[tuple[Linear, Linear, Linear]]  # each: gate, up, down


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

    def pack_latent(self, linear: Linear, spec: LatentAttentionSpec) -> Any:
        """The matrix that makes keys and values of latents, [heads * (nope_dim + value_dim),
        latent_dim], of each head first the key, for :meth:`latent_attention`."""
        ...

    def pack_experts(self, params: ExpertParams) -> Any:
        """A mixture of experts for :meth:`experts`."""
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

    def experts(self, x: Tensor, experts: Any, norm: RMSNorm) -> Tensor:
        """The experts of each row of ``norm(x)`` with their weights: float32 [R, D].

        Router and sum are float32, the sum in the order of the experts.
        """
        ...

    def add_norm(self, x: Tensor, y: Tensor, norm: RMSNorm) -> Tensor:
        """``x + norm(y)`` for sandwich norms."""
        ...

    def add_scaled(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        """``x + scale * y``."""
        ...

    def attention(self, qkv: Tensor, params: AttentionParams, step: StepInputs) -> Tensor:
        """QK-norm, RoPE, append of keys and values to the cache, then attention.

        ``qkv`` is [R, q_dim + 2 kv_dim]; the result is [R, q_dim].
        """
        ...

    def latent_attention(
        self, queries: Tensor, latents: Tensor, heads: Any, params: LatentParams, step: StepInputs
    ) -> Tensor:
        """Norm of the latents, RoPE, append to the cache, then attention.

        ``queries`` [R, heads * (nope_dim + rope_dim)], of each head first what is not rotated;
        ``latents`` [R, latent_dim + rope_dim] as projected; the result is [R, out_dim].
        """
        ...

    def logits(
        self,
        x: Tensor,
        matrix: Any,
        norm: RMSNorm,
        softcap: float | None,
        step: StepInputs,
        *,
        scale: float = 1.0,
    ) -> Tensor:
        """Final norm and output matrix for ``step.logit_rows``: float32 [L, V], times ``scale``
        (no class has a cap and a scale)."""
        ...
