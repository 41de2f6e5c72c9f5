"""What a decoder *is*, apart from its weights: frozen, comparable, printable.

A family adapter (``skimp.model.families``) makes a :class:`ModelSpec` from a Hugging Face
``config.json`` and turns it back into one. Everything downstream (decoder, caches, cost model,
converters) reads the spec and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from skimp.formats.weight import WeightFormat

Activation = Literal["silu", "gelu_tanh", "gelu"]


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021), half-split layout unless ``interleaved``.

    ``scaling`` is None or the Hugging Face ``rope_scaling`` parameters, normalised by the family
    so that ``scaling["rope_type"]`` is one of ``linear``, ``llama3``, ``yarn``, ``dynamic`` and
    every default is filled in.
    """

    theta: float
    rotary_dim: int
    scaling: Mapping[str, Any] | None = None
    interleaved: bool = False

    def __hash__(self) -> int:
        items = None if self.scaling is None else tuple(sorted(self.scaling.items()))
        return hash((self.theta, self.rotary_dim, items, self.interleaved))


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Softmax attention: MHA, GQA or MQA; the whole past or a window of it."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec | None
    scale: float
    window: int | None = None  # a query sees itself and window - 1 tokens before it
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False  # RMSNorm over head_dim, before RoPE
    softcap: float | None = None  # scores become cap * tanh(scores / cap)
    sinks: bool = False  # one learned logit a head joins the softmax denominator

    @property
    def q_dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class GatedFFNSpec:
    """``down(act(gate(x)) * up(x))`` (Shazeer 2020)."""

    intermediate_size: int
    activation: Activation = "silu"
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    mixer: AttentionSpec
    ffn: GatedFFNSpec
    post_norms: bool = False  # gemma: each sublayer's output is normed before it is added


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A whole decoder. ``family`` is the Hugging Face ``model_type`` it came from.

    ``config`` keeps the fields of the source config that the spec does not model (token ids,
    dtype, architectures), so that ``families.to_config`` writes them back unchanged.
    """

    family: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float
    max_positions: int
    tie_embeddings: bool
    norm_plus_one: bool = False  # gemma stores RMSNorm weights minus one
    embed_scale: float = 1.0
    logit_softcap: float | None = None
    dtype: str = "bfloat16"  # of the checkpoint: float32, bfloat16 or float16
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    # Matrices in a low-bit format, by our name without ".weight" ("layers.0.mixer.q_proj"); the
    # rest is dense.
    formats: Mapping[str, WeightFormat] = field(default_factory=dict, hash=False)
    cache_format: str | None = None  # int8 or fp8 if the checkpoint asks for such a cache
    config: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def num_layers(self) -> int:
        return len(self.layers)
