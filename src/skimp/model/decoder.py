"""The generic decoder: a list of layers, each a mixer and an ffn, around a residual stream.

A decoder is built from a :class:`~skimp.model.spec.ModelSpec`, given weights, then *bound* to a
backend (``bind``), which packs the matrices for its kernels and fixes each layer's place in the
cache. It never knows which backend or engine it runs in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from skimp.cache.spec import CacheSpec
from skimp.kernels.ops import LayerCache, Ops, StepInputs
from skimp.model.draft_head import Fusion
from skimp.model.ffn import make_ffn
from skimp.model.layers import Linear, RMSNorm
from skimp.model.mixers import cache_spec, make_mixer
from skimp.model.rope import rope_tables
from skimp.model.spec import LayerSpec, ModelSpec, RopeSpec


class DecoderLayer(nn.Module):
    def __init__(self, spec: LayerSpec, model: ModelSpec) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(model.hidden_size, eps=model.norm_eps, plus_one=model.norm_plus_one)

        assert spec.residual_scale == 1.0 or not spec.post_norms, "no class has both"
        self.spec = spec
        self.mixer_norm = norm()
        self.mixer = make_mixer(
            spec.mixer,
            model.hidden_size,
            norm_eps=model.norm_eps,
            norm_plus_one=model.norm_plus_one,
        )
        self.mixer_post_norm = norm() if spec.post_norms else None
        self.ffn_norm = norm()
        self.ffn = make_ffn(spec.ffn, model.hidden_size)
        self.ffn_post_norm = norm() if spec.post_norms else None

    def forward(self, x_RD: Tensor, ops: Ops, step: StepInputs) -> Tensor:
        return self.feed(self.mix(x_RD, ops, step), ops)

    def mix(self, x_RD: Tensor, ops: Ops, step: StepInputs) -> Tensor:
        """The stream behind the first sublayer."""
        mixed = self.mixer.mix(x_RD, self.mixer_norm, ops, step)
        return self._add(x_RD, mixed, self.mixer.out, self.mixer_post_norm, ops)

    def feed(self, x_RD: Tensor, ops: Ops) -> Tensor:
        """The stream behind the second."""
        hidden = self.ffn.hidden(x_RD, self.ffn_norm, ops)
        return self._add(x_RD, hidden, self.ffn.out, self.ffn_post_norm, ops)

    def _add(
        self, x_RD: Tensor, y: Tensor, matrix: Any, post_norm: RMSNorm | None, ops: Ops
    ) -> Tensor:
        """A sublayer's last product, or what one without a last matrix made, added to the residual
        stream."""
        scale = self.spec.residual_scale
        if matrix is not None:
            if post_norm is None and scale == 1.0:
                return ops.matmul(y, matrix, residual=x_RD)
            y = ops.matmul(y, matrix)
        if post_norm is not None:
            return ops.add_norm(x_RD, y, post_norm)
        return ops.add_scaled(x_RD, y, scale)


class Decoder(nn.Module):
    """``fusion``, set before ``bind``, has each forward leave ``features`` for a draft head."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed_tokens = Linear(spec.hidden_size, spec.vocab_size)
        self.layers = nn.ModuleList(DecoderLayer(layer, spec) for layer in spec.layers)
        self.norm = RMSNorm(spec.hidden_size, eps=spec.norm_eps, plus_one=spec.norm_plus_one)
        if not spec.tie_embeddings:
            self.lm_head = Linear(spec.hidden_size, spec.vocab_size)
        self.fusion: Fusion | None = None
        self.features: Tensor | None = None  # float32 [R, D] of the last forward

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def cache_specs(self, dtype: torch.dtype | None = None) -> list[CacheSpec]:
        """What each layer remembers at full precision, in layer order; ``dtype`` defaults to the
        weights'. Low-bit caches: ``model/caches.py``."""
        return [cache_spec(layer.mixer, dtype or self.dtype) for layer in self.spec.layers]

    def bind(
        self,
        ops: Ops,
        *,
        caches: Sequence[LayerCache] | None = None,
        max_positions: int | None = None,
    ) -> Decoder:
        """Pack all weights for ``ops``, layer by layer, and return self.

        ``caches`` gives each layer its place in the cache pages (None: no cache);
        ``max_positions`` bounds the positions a step may name (default: the spec's).
        """
        tables: dict[RopeSpec, tuple[Tensor, Tensor]] = {}
        device = self.norm.weight.device
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            rope = layer.mixer.spec.rope
            if rope is not None and rope not in tables:
                cos, sin = rope_tables(rope, max_positions or self.spec.max_positions)
                tables[rope] = (cos.to(device), sin.to(device))
            cache = None if caches is None else caches[index]
            layer.mixer.bind(ops, None if rope is None else tables[rope], cache)
            layer.ffn.bind(ops)
        if self.spec.tie_embeddings:
            self._head: Any = ops.pack((self.embed_tokens,), "table")
            self._table: Any = self._head
        else:
            self._table = ops.pack((self.embed_tokens,), "table")
            self._head = ops.pack((self.lm_head,))
        if self.fusion is not None:
            self.fusion.bind(ops)
        return self

    @property
    def table(self) -> Any:
        """The embedding table as the backend holds it."""
        return self._table

    def forward(self, step: StepInputs, ops: Ops) -> Tensor:
        """Logits float32 [L, V] of ``step.logit_rows``; the caches gain the step's rows."""
        return self.logits(self.states(step, ops), step, ops)

    def embed(self, step: StepInputs, ops: Ops) -> Tensor:
        """What enters the first layer, float32 [R, D]."""
        return ops.embed(step, self._table, self.spec.embed_scale)

    def states(self, step: StepInputs, ops: Ops) -> Tensor:
        """What leaves the last layer, float32 [R, D]; the caches gain the step's rows."""
        x_RD = self.embed(step, ops)
        fusion, features = self.fusion if step.wants_features else None, None
        for index, layer in enumerate(self.layers):
            if fusion is not None:
                features = fusion.add(index, x_RD, features, ops)
            x_RD = layer(x_RD, ops, step)
        if fusion is not None:
            features = fusion.add(len(self.layers), x_RD, features, ops)
        self.features = features
        return x_RD

    def logits(self, x_RD: Tensor, step: StepInputs, ops: Ops) -> Tensor:
        """Logits float32 [L, V] of what left the last layer."""
        spec = self.spec
        return ops.logits(
            x_RD, self._head, self.norm, spec.logit_softcap, step, scale=spec.logit_scale
        )

    @property
    def head(self) -> Linear:
        """The output matrix: the embedding table where they are tied."""
        return self.embed_tokens if self.spec.tie_embeddings else self.lm_head
