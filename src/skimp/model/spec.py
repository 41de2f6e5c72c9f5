"""What a decoder *is*, apart from its weights: frozen, comparable, printable.

A family adapter (``skimp.model.families``) makes a :class:`ModelSpec` from a Hugging Face
``config.json`` and turns it back into one. Everything downstream (decoder, caches, cost model,
converters) reads the spec and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from skimp.formats.weight import WeightFormat

Activation = Literal["silu", "gelu_tanh", "gelu"]
Shape = tuple[int, int]  # in_features, out_features
Part = TypeVar("Part")


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

    @property
    def flops_per_pair(self) -> int:
        """Of a query and a key that it sees, all heads: a multiply-add is two."""
        return 4 * self.q_dim

    def matrices(self, hidden_size: int) -> dict[str, Shape]:
        return {
            "q_proj": (hidden_size, self.q_dim),
            "k_proj": (hidden_size, self.kv_dim),
            "v_proj": (hidden_size, self.kv_dim),
            "o_proj": (self.q_dim, hidden_size),
        }

    @property
    def input_groups(self) -> dict[str, tuple[str, ...]]:
        """Matrices that read one input, by its name, in the order of a forward. Backends fuse
        them, and so they share a format."""
        return {"qkv": ("q_proj", "k_proj", "v_proj"), "o_proj": ("o_proj",)}

    def vector_numbers(self, hidden_size: int) -> int:
        """In norms, biases and sinks."""
        total = 2 * self.head_dim if self.qk_norm else 0
        total += self.q_dim + 2 * self.kv_dim if self.qkv_bias else 0
        total += hidden_size if self.out_bias else 0
        return total + (self.num_heads if self.sinks else 0)


@dataclass(frozen=True, kw_only=True)
class LatentAttentionSpec:
    """Multi-head latent attention (MLA, DeepSeek-V2 2024): a token is remembered as ``latent_dim``
    normed numbers, from which every head's key and value are made, and one rotated key of
    ``rope_dim`` numbers that all heads share."""

    num_heads: int
    latent_dim: int
    rope_dim: int
    nope_dim: int  # of a head's query and key, without rotation
    value_dim: int  # of a head
    rope: RopeSpec | None
    scale: float
    query_latent_dim: int | None = None  # queries come of a normed latent, too
    latent_eps: float = 1e-6  # of the latents' norms
    in_bias: bool = False  # of the projections into latents
    out_bias: bool = False

    window: ClassVar[None] = None

    @property
    def query_dim(self) -> int:
        """Of all heads' queries, the rotated parts included."""
        return self.num_heads * (self.nope_dim + self.rope_dim)

    @property
    def cached_dim(self) -> int:
        """Numbers a token that are remembered."""
        return self.latent_dim + self.rope_dim

    @property
    def out_dim(self) -> int:
        """Numbers a token that enter the output projection."""
        return self.num_heads * self.value_dim

    @property
    def flops_per_pair(self) -> int:
        """Of a query and a key that it sees, all heads, queries brought to the latent."""
        return 2 * self.num_heads * (2 * self.latent_dim + self.rope_dim)

    @property
    def expanded_flops_per_pair(self) -> int:
        """The same once every head's key and value are made."""
        return 2 * self.num_heads * (self.nope_dim + self.rope_dim + self.value_dim)

    @property
    def flops_per_made_token(self) -> int:
        """Of all heads' keys and values of one latent."""
        return 2 * self.num_heads * (self.nope_dim + self.value_dim) * self.latent_dim

    def matrices(self, hidden_size: int) -> dict[str, Shape]:
        if self.query_latent_dim is None:
            queries = {"q_proj": (hidden_size, self.query_dim)}
        else:
            queries = {
                "q_a_proj": (hidden_size, self.query_latent_dim),
                "q_b_proj": (self.query_latent_dim, self.query_dim),
            }
        heads = self.num_heads * (self.nope_dim + self.value_dim)
        return queries | {
            "kv_a_proj": (hidden_size, self.cached_dim),
            "kv_b_proj": (self.latent_dim, heads),
            "o_proj": (self.out_dim, hidden_size),
        }

    @property
    def input_groups(self) -> dict[str, tuple[str, ...]]:
        """See :attr:`AttentionSpec.input_groups`. What makes heads of latents is in none: backends
        take it apart, and hold it dense whatever the checkpoint has."""
        if self.query_latent_dim is None:
            queries: dict[str, tuple[str, ...]] = {"down": ("q_proj", "kv_a_proj")}
        else:
            queries = {"down": ("q_a_proj", "kv_a_proj"), "q_b_proj": ("q_b_proj",)}
        return queries | {"o_proj": ("o_proj",)}

    def vector_numbers(self, hidden_size: int) -> int:
        """In norms and biases."""
        latents = self.query_latent_dim or 0
        total = self.latent_dim + latents
        total += self.cached_dim + latents if self.in_bias else 0
        return total + (hidden_size if self.out_bias else 0)


MixerSpec = AttentionSpec | LatentAttentionSpec


@dataclass(frozen=True, kw_only=True)
class GatedFFNSpec:
    """``down(act(gate(x)) * up(x))`` (Shazeer 2020)."""

    intermediate_size: int
    activation: Activation = "silu"
    bias: bool = False

    def matrices(self, hidden_size: int) -> dict[str, Shape]:
        return {
            "gate_proj": (hidden_size, self.intermediate_size),
            "up_proj": (hidden_size, self.intermediate_size),
            "down_proj": (self.intermediate_size, hidden_size),
        }

    @property
    def input_groups(self) -> dict[str, tuple[str, ...]]:
        """See :attr:`AttentionSpec.input_groups`."""
        return {"gate_up": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}

    def vector_numbers(self, hidden_size: int) -> int:
        return 2 * self.intermediate_size + hidden_size if self.bias else 0


@dataclass(frozen=True, kw_only=True)
class ClampedSwiGLU:
    """``(u + 1) * g * sigmoid(alpha * g)``, where u is the up projection cut to ``limit`` on both
    sides and g the gate cut to it from above (gpt-oss, 2025)."""

    alpha: float = 1.702
    limit: float = 7.0


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """Which experts a token goes to, and what each of them counts.

    Every expert has a score, the softmax or sigmoid of a product in float32. Those with the
    largest are chosen, the first of equals. A softmax over the chosen logits alone (gpt-oss) is
    ``normalize``, since the sum over all cancels.
    """

    scoring: Literal["softmax", "sigmoid"] = "softmax"
    bias: bool = False  # of the product
    correction: bool = False  # a learned number is added to each score, for the choice alone
    groups: int = 1  # neighbouring experts, of which only the best groups_chosen are chosen from
    groups_chosen: int = 1
    group_score: Literal["max", "top2"] = "max"  # its best score, or the sum of its best two
    normalize: bool = False  # the weights of the chosen are divided by their sum
    normalize_eps: float = 0.0  # added to that sum
    scale: float = 1.0  # of the weights, at last


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """A mixture of experts (Shazeer et al. 2017): each token goes through ``experts_per_token`` of
    ``num_experts`` gated feed-forward networks, whose outputs are added up with the router's
    weights. ``shared`` is one more that every token goes through, with weight 1."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int  # of one expert
    activation: Activation | ClampedSwiGLU = "silu"
    bias: bool = False
    router: RouterSpec = RouterSpec()
    shared: GatedFFNSpec | None = None
    fused: bool = False  # all experts lie in two tensors, as gpt-oss stores them

    def __post_init__(self) -> None:
        r = self.router
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token: {self.experts_per_token} of {self.num_experts} experts"
            )
        if r.groups < 1 or self.num_experts % r.groups:
            raise ValueError(f"groups: {r.groups} do not divide {self.num_experts} experts")
        size = self.num_experts // r.groups
        if not 1 <= r.groups_chosen <= r.groups:
            raise ValueError(f"groups_chosen: {r.groups_chosen} of {r.groups} groups")
        if r.groups_chosen * size < self.experts_per_token:
            raise ValueError(
                f"groups_chosen: {r.groups_chosen} groups of {size} experts are fewer than the "
                f"{self.experts_per_token} of a token"
            )
        if r.group_score == "top2" and size < 2:
            raise ValueError(f"groups: {r.groups} of one expert have no best two")

    @property
    def chance(self) -> float:
        """That a token goes to a certain expert, if all get as many."""
        return self.experts_per_token / self.num_experts

    def matrices(self, hidden_size: int) -> dict[str, Shape]:
        """An expert's are ``experts.3.gate_proj``, as it is stored or, if ``fused``, a part of the
        tensor ``experts.gate_up_proj``."""
        inner = self.intermediate_size
        one = GatedFFNSpec(intermediate_size=inner).matrices(hidden_size)
        if self.fused:
            one = {"gate_up_proj": (hidden_size, 2 * inner), "down_proj": (inner, hidden_size)}
        found = {"router": (hidden_size, self.num_experts)}
        for i in range(self.num_experts):
            found |= {f"experts.{i}.{name}": shape for name, shape in one.items()}
        if self.shared is not None:
            shared = self.shared.matrices(hidden_size)
            found |= {f"shared.{name}": shape for name, shape in shared.items()}
        return found

    def vector_numbers(self, hidden_size: int) -> int:
        """In biases, those of all experts."""
        total = self.num_experts * (self.router.bias + self.router.correction)
        if self.bias:
            total += self.num_experts * (2 * self.intermediate_size + hidden_size)
        return total + (0 if self.shared is None else self.shared.vector_numbers(hidden_size))


FFNSpec = GatedFFNSpec | ExpertsSpec


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    mixer: MixerSpec
    ffn: FFNSpec
    post_norms: bool = False  # gemma: each sublayer's output is normed before it is added
    residual_scale: float = 1.0  # of what each sublayer adds

    def matrices(self, hidden_size: int) -> dict[str, Shape]:
        """Of every matrix, by its name in the layer (``mixer.q_proj``), in the decoder's order."""
        parts = (("mixer", self.mixer), ("ffn", self.ffn))
        return {
            f"{part}.{name}": shape
            for part, spec in parts
            for name, shape in spec.matrices(hidden_size).items()
        }

    @property
    def input_groups(self) -> dict[str, tuple[str, ...]]:
        """See :attr:`AttentionSpec.input_groups`: ``mixer.qkv`` and so on. Those of experts are not
        among them, for a token reads some only."""
        parts: list[tuple[str, dict[str, tuple[str, ...]]]] = [("mixer", self.mixer.input_groups)]
        if isinstance(self.ffn, GatedFFNSpec):
            parts.append(("ffn", self.ffn.input_groups))
        return {
            f"{part}.{group}": tuple(f"{part}.{name}" for name in names)
            for part, groups in parts
            for group, names in groups.items()
        }

    def chance(self, name: str) -> float:
        """That a token goes through the matrix ``name``, if all experts get as many tokens."""
        ffn = self.ffn
        return ffn.chance if isinstance(ffn, ExpertsSpec) and "ffn.experts." in name else 1.0

    def vector_numbers(self, hidden_size: int) -> int:
        """Numbers in norms, biases and sinks."""
        norms = hidden_size * (4 if self.post_norms else 2)
        return norms + sum(p.vector_numbers(hidden_size) for p in (self.mixer, self.ffn))


def all_of(
    kind: type[Part], parts: Iterable[object], refuse: Callable[[int], Exception]
) -> tuple[Part, ...]:
    """One part of each layer. Raises ``refuse(layer)`` at the first that is not of ``kind``."""
    found = []
    for layer, part in enumerate(parts):
        if not isinstance(part, kind):
            raise refuse(layer)
        found.append(part)
    return tuple(found)


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
    logit_scale: float = 1.0
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
