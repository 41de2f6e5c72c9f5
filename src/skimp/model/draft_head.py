"""A draft head: one layer that guesses on from what the target computed of the tokens before.

EAGLE-3 (Li et al. 2025, arXiv 2503.01840). Row s of a head sees token s and the *feature* of the
row before it, and predicts token s + 1. The feature of a row that the target computed is a sum of
products of its residual stream at three depths; that of a row which the head computed itself is
the head's own stream. Where a row's feature comes from is not the head's business: ``StepInputs``
carries them, and what the head makes of a row stays in ``features`` for whoever goes on from it.

Shapes: R rows, D the target's hidden size, W the words that a head can guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from skimp.cache.spec import CacheSpec
from skimp.kernels.ops import AttentionParams, LayerCache, Ops, StepInputs
from skimp.model.ffn import make_ffn
from skimp.model.layers import Linear, RMSNorm
from skimp.model.mixers.attention import cache_spec
from skimp.model.rope import rope_tables
from skimp.model.spec import AttentionSpec, GatedFFNSpec, LayerSpec, ModelSpec

FAMILY = "eagle3"


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """``taps``: the target's residual stream is read where it enters these layers, or, by the
    number of layers, where it leaves the last.

    ``draft_vocab_size`` words of the target's ``vocab_size`` can be guessed.
    """

    hidden_size: int  # the target's
    vocab_size: int
    draft_vocab_size: int
    taps: tuple[int, ...]
    mixer: AttentionSpec
    ffn: GatedFFNSpec
    norm_eps: float
    max_positions: int
    dtype: str = "bfloat16"

    def as_model(self, *, max_positions: int | None = None) -> ModelSpec:
        """The layer and its output matrix, as a model of one layer: what a cache and a backend ask
        of a model."""
        return ModelSpec(
            family=FAMILY,
            vocab_size=self.draft_vocab_size,
            hidden_size=self.hidden_size,
            layers=(LayerSpec(mixer=self.mixer, ffn=self.ffn),),
            norm_eps=self.norm_eps,
            max_positions=max_positions or self.max_positions,
            tie_embeddings=False,
            dtype=self.dtype,
        )


class Fusion(nn.Module):
    """Features of a target's rows: what its stream is at the taps, each times a matrix, summed."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.taps = spec.taps
        size = spec.hidden_size
        self.parts = nn.ModuleList(Linear(size, size) for _ in spec.taps)

    def bind(self, ops: Ops) -> None:
        self._packed: Sequence[Any] = [ops.pack((part,)) for part in _linears(self.parts)]

    def add(self, layer: int, x_RD: Tensor, features: Tensor | None, ops: Ops) -> Tensor | None:
        """``features`` float32 [R, D] with what is read of the stream ``x_RD`` that enters
        ``layer``; None as long as nothing was."""
        for tap, part in zip(self.taps, self._packed):
            if tap == layer:
                features = ops.matmul(x_RD, part, residual=features)
        return features


class DraftHead(nn.Module):
    """Embeddings are the target's. ``token_ids`` int64 [W] are the words in the target's ids."""

    token_ids: Tensor

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        size, eps, mixer = spec.hidden_size, spec.norm_eps, spec.mixer
        self.spec = spec
        self.fusion = Fusion(spec)
        self.embed_norm = RMSNorm(size, eps=eps)
        self.feature_norm = RMSNorm(size, eps=eps)
        # Queries, keys and values of a token and a feature: a product of each, summed.
        widths = (mixer.q_dim, mixer.kv_dim, mixer.kv_dim)
        self.embed_qkv = nn.ModuleList(Linear(size, width) for width in widths)
        self.feature_qkv = nn.ModuleList(Linear(size, width) for width in widths)
        self.o_proj = Linear(mixer.q_dim, size)
        self.ffn_norm = RMSNorm(size, eps=eps)
        self.ffn = make_ffn(spec.ffn, size)
        self.norm = RMSNorm(size, eps=eps)
        self.lm_head = Linear(size, spec.draft_vocab_size)
        self.register_buffer("token_ids", torch.arange(spec.draft_vocab_size))
        self.features: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def cache_specs(self, dtype: torch.dtype | None = None) -> list[CacheSpec]:
        return [cache_spec(self.spec.mixer, dtype or self.dtype)]

    def attach(self, table: Any, embed_scale: float) -> None:
        """Before ``bind``: the target's embedding table as the same kind of backend holds it."""
        self._table, self._embed_scale = table, embed_scale

    def bind(
        self,
        ops: Ops,
        *,
        caches: Sequence[LayerCache] | None = None,
        max_positions: int | None = None,
    ) -> DraftHead:
        """Pack the layer's weights for ``ops``, as :meth:`Decoder.bind` does. The fusion is bound
        where it is computed, beside the target."""
        mixer = self.spec.mixer
        rope = None
        if mixer.rope is not None:
            cos, sin = rope_tables(mixer.rope, max_positions or self.spec.max_positions)
            device = self.norm.weight.device
            rope = (cos.to(device), sin.to(device))
        self._of_embed: Any = ops.pack(_linears(self.embed_qkv))
        self._of_feature: Any = ops.pack(_linears(self.feature_qkv))
        self._out: Any = ops.pack((self.o_proj,))
        self.ffn.bind(ops)
        self._head: Any = ops.pack((self.lm_head,))
        self._params = AttentionParams(
            spec=mixer,
            norm_eps=self.spec.norm_eps,
            q_norm=None,
            k_norm=None,
            sinks=None,
            rope=rope,
            cache=None if caches is None else caches[0],
        )
        return self

    def forward(self, step: StepInputs, ops: Ops) -> Tensor:
        """Logits float32 [L, W] of ``step.logit_rows``, from ``step.features``, which may be
        overwritten; ``features`` are then the rows' own."""
        assert step.features is not None, "a draft head needs features"
        words = ops.embed(step, self._table, self._embed_scale)
        qkv = ops.matmul(words, self._of_embed, norm=self.embed_norm)
        qkv = ops.matmul(step.features, self._of_feature, norm=self.feature_norm, residual=qkv)
        mixed = ops.attention(qkv, self._params, step)
        x_RD = ops.matmul(mixed, self._out, residual=step.features)
        hidden = self.ffn.hidden(x_RD, self.ffn_norm, ops)
        self.features = ops.matmul(hidden, self.ffn.out, residual=x_RD)
        return ops.logits(self.features, self._head, self.norm, None, step)


def _linears(modules: nn.ModuleList) -> list[Linear]:
    return [module for module in modules if isinstance(module, Linear)]
