"""What a step of a model touches and computes: bytes and operations, and nothing about time.

One function, :func:`step_cost`, serves prefill, generation and everything between: a step is a
list of :class:`SequenceStep`, each saying how many tokens the sequence holds once the step is done
and how many of them are new.

Rules of the count:

* a matrix is read once a step, whatever the number of rows; one of E experts, k of which a row
  goes to, only if some row hits it: E (1 - (1 - k/E)^rows) of them are read, as expected if rows
  choose evenly and apart from each other. Rows of one text are more alike, so they read less;
* the embedding table is read one row a token, the output matrix (tied or not) whole, and only if
  some row wants logits;
* rows of one sequence share one read of its past (what blocked attention does), new keys and
  values are written once and are part of the past that is read.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from skimp.cache.spec import CacheSpec
from skimp.formats.weight import WeightFormat
from skimp.model.spec import LatentAttentionSpec, MixerSpec, ModelSpec

Kind = Literal["matmul", "attention"]
TERMS = {
    "mixer": "attention projections",
    "ffn": "feed-forward",
    "ffn.router": "router",
    "ffn.experts": "experts",
}
EXPERT = re.compile(r"(\.experts)\.\d+\.")

_ITEM_BYTES = (
    ("float32", 4),
    ("bfloat16", 2),
    ("float16", 2),
    ("fp8", 1),
    ("int8", 1),
)


def arithmetic(form: WeightFormat) -> str:
    """How products with matrices of ``form`` are computed, as a machine lists their rates:
    ``int4``, ``int8`` and ``fp8`` widen the weights, ``int8-a8`` and the like round the inputs
    too. Group sizes and zero points make no difference worth a rate of their own."""
    text = "fp8" if form.kind == "float" else f"int{form.bits}"
    return text + {None: "", "int8": "-a8", "fp8": "-afp8"}[form.activations]


def item_bytes(dtype: str) -> int:
    """Bytes of one number of ``dtype``. Raises ValueError on a name it does not know."""
    for name, size in _ITEM_BYTES:
        if name == dtype:
            return size
    known = ", ".join(name for name, _ in _ITEM_BYTES)
    raise ValueError(f"dtype: {dtype!r} is not one of {known}")


@dataclass(frozen=True, kw_only=True)
class MatrixWork:
    """One weight matrix, or the ``copies`` of it that a layer's experts have alike, each of which a
    row goes through with ``chance``. ``bits`` are those read per weight, scales and zero points
    included; ``format`` is None for a dense matrix."""

    name: str
    term: str  # the line it adds to in a breakdown
    in_features: int
    out_features: int
    bits: float
    head: bool = False  # multiplied only by the rows whose logits are wanted
    format: WeightFormat | None = None
    copies: int = 1
    chance: float = 1.0

    @property
    def arithmetic(self) -> str | None:
        """What its products are computed in; None is the model's own dtype."""
        return None if self.format is None else arithmetic(self.format)

    @property
    def weights(self) -> int:
        return self.copies * self.in_features * self.out_features

    @property
    def bytes(self) -> float:
        return self.weights * self.bits / 8

    def share_read(self, rows: int) -> float:
        """Of the copies, by a step of so many rows, as expected."""
        return 1 - (1 - self.chance) ** rows

    def bytes_read(self, rows: int) -> float:
        return self.bytes * self.share_read(rows)

    @property
    def used(self) -> float:
        """Copies that a row goes through."""
        return self.copies * self.chance


@dataclass(frozen=True, kw_only=True)
class ExpandedWork:
    """The other form of latent attention: operations per (query, key) pair, and per token of the
    past whose keys and values are made anew (a new row's are among its matrices')."""

    flops_per_pair: int
    flops_per_made_token: int


@dataclass(frozen=True, kw_only=True)
class MixerWork:
    """One layer's mixing of positions: its cache, and operations per (query, key) pair; where there
    is another form, a backend takes the cheaper of the two."""

    cache: CacheSpec
    flops_per_pair: int
    flops_per_token: int = 0  # of a recurrent state
    expanded: ExpandedWork | None = None
    row_numbers: int = 0  # of a step's row, besides what its matrices read and make

    @classmethod
    def of(cls, mixer: MixerSpec, cache: CacheSpec) -> MixerWork:
        if not isinstance(mixer, LatentAttentionSpec):
            return cls(cache=cache, flops_per_pair=mixer.flops_per_pair)
        return cls(
            cache=cache,
            flops_per_pair=mixer.flops_per_pair,
            expanded=ExpandedWork(
                flops_per_pair=mixer.expanded_flops_per_pair,
                flops_per_made_token=mixer.flops_per_made_token,
            ),
            # Queries brought to the latent, and what is mixed there.
            row_numbers=mixer.num_heads * (mixer.cached_dim + mixer.latent_dim),
        )

    def flops(self, step: SequenceStep) -> int:
        """Of one sequence's part of a step."""
        pairs = _pairs(step, self.cache.horizon)
        mixing = self.flops_per_pair * pairs
        if self.expanded is not None:
            made = self.expanded.flops_per_made_token * (step.context - step.tokens)
            mixing = min(mixing, self.expanded.flops_per_pair * pairs + made)
        return mixing + self.flops_per_token * step.tokens


@dataclass(frozen=True, kw_only=True)
class ModelWork:
    """A model as the cost functions see it. Shortcuts are transformations of this object."""

    name: str
    matrices: tuple[MatrixWork, ...]
    mixers: tuple[MixerWork, ...]
    embedding_rows: int
    embedding_row_bytes: float
    tied: bool  # the embedding table is the output matrix and is stored once
    vector_bytes: int  # norms and biases, read every step
    activation_bytes: int  # per activation number
    compute_dtype: str
    max_positions: int

    @property
    def resident_weight_bytes(self) -> float:
        """Bytes of the weights in memory: everything once, the embedding table included."""
        table = 0.0 if self.tied else self.embedding_rows * self.embedding_row_bytes
        return sum(m.bytes for m in self.matrices) + table + self.vector_bytes

    @property
    def cache_bytes_per_token(self) -> int:
        """What one more token adds to the cache while no window is full; what is kept of the
        newest tokens besides is a fixed amount, and counted by :meth:`cache_bytes`."""
        return sum(m.cache.bytes_per_token for m in self.mixers)

    def cache_bytes(self, context: int, *, page_tokens: int = 1) -> int:
        """Cache bytes that a sequence of ``context`` tokens holds, in whole pages."""
        return sum(_held_bytes(mixer.cache, context, page_tokens) for mixer in self.mixers)


@dataclass(frozen=True, kw_only=True)
class SequenceStep:
    """One sequence's part in a step.

    ``context`` counts the tokens it holds when the step is done, the ``tokens`` new ones included
    (the convention of :meth:`CacheSpec.bytes_read`). ``logits`` rows go through the output matrix:
    1 to generate, 0 in the middle of a prompt, ``tokens`` to check a draft.
    """

    context: int
    tokens: int = 1
    logits: int = 1

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens: a step of a sequence needs at least 1, not {self.tokens}")
        if self.context < self.tokens:
            raise ValueError(f"context: {self.context} is less than its {self.tokens} new tokens")
        if not 0 <= self.logits <= self.tokens:
            raise ValueError(f"logits: {self.logits} of {self.tokens} rows")


def uniform(batch: int, context: int, *, tokens: int = 1, logits: int = 1) -> list[SequenceStep]:
    """``batch`` sequences alike."""
    if batch < 1:
        raise ValueError(f"batch: at least 1, not {batch}")
    return [SequenceStep(context=context, tokens=tokens, logits=logits)] * batch


@dataclass(frozen=True, kw_only=True)
class Term:
    """One line of a step's bill. Bytes and floating-point operations (a multiply-add is two).

    ``arithmetic`` names the rate of its products where that is not the model's own dtype.
    """

    name: str
    kind: Kind
    weight_bytes: float = 0.0
    cache_read_bytes: float = 0.0
    cache_write_bytes: float = 0.0
    activation_bytes: float = 0.0
    flops: float = 0.0
    rows: int = 0
    arithmetic: str | None = None


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Bytes and operations of one step. All of it is the sum of ``terms``."""

    terms: tuple[Term, ...]
    sequences: int
    rows: int
    logit_rows: int
    layers: int
    vocab_size: int
    compute_dtype: str

    @property
    def weight_bytes(self) -> float:
        return sum(t.weight_bytes for t in self.terms)

    @property
    def cache_read_bytes(self) -> float:
        return sum(t.cache_read_bytes for t in self.terms)

    @property
    def cache_write_bytes(self) -> float:
        return sum(t.cache_write_bytes for t in self.terms)

    @property
    def activation_bytes(self) -> float:
        return sum(t.activation_bytes for t in self.terms)

    @property
    def bytes_read(self) -> float:
        """Weights and cache: the numerator of the fraction, and of every "limit" we quote."""
        return self.weight_bytes + self.cache_read_bytes

    @property
    def matmul_flops(self) -> float:
        return sum(t.flops for t in self.terms if t.kind == "matmul")

    @property
    def attention_flops(self) -> float:
        return sum(t.flops for t in self.terms if t.kind == "attention")

    @property
    def flops(self) -> float:
        return self.matmul_flops + self.attention_flops


def model_work(
    spec: ModelSpec,
    caches: Sequence[CacheSpec],
    *,
    dtype: str | None = None,
    bits: Mapping[str, float] | None = None,
) -> ModelWork:
    """The work of a model, from its spec and its layers' own cache specs, in order.

    ``dtype`` (the checkpoint's by default) is that of dense weights and arithmetic; matrices in
    ``spec.formats`` count their formats' bits. ``bits`` overrides the bits per weight of matrices
    whose name matches a shell pattern, such as ``{"layers.*": 4.125, "lm_head": 16}``; the first
    match counts, and a pattern that matches nothing is refused. Matrices are named
    ``layers.<i>.<name of LayerSpec.matrices>`` and ``lm_head``; ``embed_tokens`` sets the bits of
    an untied table. Experts' matrices that are alike are one, called ``layers.<i>.ffn.experts.*``
    and so on.
    """
    dtype = spec.dtype if dtype is None else dtype
    dense_bits = 8.0 * item_bytes(dtype)
    overrides = dict(bits or {})
    used: set[str] = set()

    def bits_of(name: str, in_features: int) -> float:
        for pattern, value in overrides.items():
            if fnmatch.fnmatchcase(name, pattern):
                if value <= 0:
                    raise ValueError(f"bits: {pattern!r} is given {value} bits")
                used.add(pattern)
                return float(value)
        form = format_of(name)
        return dense_bits if form is None else form.bits_per_weight(in_features)

    def format_of(name: str) -> WeightFormat | None:
        tied = name == "lm_head" and spec.tie_embeddings
        return spec.formats.get("embed_tokens" if tied else name)

    if len(caches) != spec.num_layers:
        raise ValueError(f"caches: {len(caches)} cache specs for {spec.num_layers} layers")

    matrices: list[MatrixWork] = []
    vectors = spec.hidden_size  # the final norm
    for i, layer in enumerate(spec.layers):
        found: Counter[MatrixWork] = Counter()
        for name, (n_in, n_out) in layer.matrices(spec.hidden_size).items():
            full = f"layers.{i}.{name}"
            common = EXPERT.sub(r"\1.*.", full)
            matrix = MatrixWork(
                name=common,
                term=_term(name),
                in_features=n_in,
                out_features=n_out,
                bits=bits_of(full, n_in),
                format=format_of(full),
                chance=layer.chance(name),
            )
            found[matrix] += 1
        matrices += [replace(matrix, copies=count) for matrix, count in found.items()]
        vectors += layer.vector_numbers(spec.hidden_size)
    head_bits = bits_of("lm_head", spec.hidden_size)
    matrices.append(
        MatrixWork(
            name="lm_head",
            term="output matrix",
            in_features=spec.hidden_size,
            out_features=spec.vocab_size,
            bits=head_bits,
            head=True,
            format=format_of("lm_head"),
        )
    )
    table_bits = head_bits if spec.tie_embeddings else bits_of("embed_tokens", spec.hidden_size)
    unused = [pattern for pattern in overrides if pattern not in used]
    if unused:
        raise ValueError(f"bits: {unused[0]!r} matches no matrix of this model")
    return ModelWork(
        name=spec.family,
        matrices=tuple(matrices),
        mixers=tuple(MixerWork.of(layer.mixer, cache) for layer, cache in zip(spec.layers, caches)),
        embedding_rows=spec.vocab_size,
        embedding_row_bytes=spec.hidden_size * table_bits / 8,
        tied=spec.tie_embeddings,
        vector_bytes=vectors * 4,  # norms are kept in float32
        activation_bytes=item_bytes(dtype),
        compute_dtype=dtype,
        max_positions=spec.max_positions,
    )


def _term(name: str) -> str:
    """Of a matrix, by the longest part of its name in the layer that has one."""
    parts = name.split(".")
    return TERMS.get(".".join(parts[:2])) or TERMS[parts[0]]


def step_cost(work: ModelWork, batch: Iterable[SequenceStep]) -> StepCost:
    """Bytes and operations of one step over ``batch``."""
    steps = list(batch)
    if not steps:
        raise ValueError("batch: a step needs at least one sequence")
    counts: dict[SequenceStep, int] = {}
    for step in steps:
        counts[step] = counts.get(step, 0) + 1
    rows = sum(s.tokens for s in steps)
    logit_rows = sum(s.logits for s in steps)

    by_term: dict[tuple[str, str | None], list[MatrixWork]] = {}
    for matrix in work.matrices:
        if not matrix.head or logit_rows:
            by_term.setdefault((matrix.term, matrix.arithmetic), []).append(matrix)
    terms = [
        Term(
            name="embedding, norms",
            kind="matmul",
            weight_bytes=rows * work.embedding_row_bytes + work.vector_bytes,
            rows=rows,
        )
    ]
    names = [term for term, _ in by_term]
    for (term, how), group in by_term.items():
        name = f"{term}, {how or work.compute_dtype}" if names.count(term) > 1 else term
        n = logit_rows if group[0].head else rows
        io = sum(m.used * (m.in_features + m.out_features) for m in group)
        weight_bytes = sum(m.bytes_read(n) for m in group)
        # What a matrix that is read multiplies.
        own = n * sum(m.used for m in group) / sum(m.copies * m.share_read(n) for m in group)
        terms.append(
            Term(
                name=name,
                kind="matmul",
                weight_bytes=weight_bytes,
                activation_bytes=float(n * io * work.activation_bytes),
                flops=2.0 * n * sum(m.weights * m.chance for m in group),
                rows=round(own),
                arithmetic=how,
            )
        )
    by_mixer: dict[MixerWork, int] = {}
    for mixer in work.mixers:
        by_mixer[mixer] = by_mixer.get(mixer, 0) + 1
    read = {"attention, whole past": 0.0, "attention, window": 0.0, "state": 0.0}
    wrote = dict.fromkeys(read, 0.0)
    flops = dict.fromkeys(read, 0.0)
    for mixer, layers in by_mixer.items():
        cache = mixer.cache
        if cache.bytes_per_token == 0:
            name = "state"
        else:
            name = "attention, whole past" if cache.horizon is None else "attention, window"
        for step, count in counts.items():
            n = layers * count
            read[name] += n * _cache_read(cache, step)
            wrote[name] += n * _cache_written(cache, step)
            flops[name] += n * mixer.flops(step)
    terms += [
        Term(
            name=name,
            kind="attention",
            cache_read_bytes=read[name],
            cache_write_bytes=wrote[name],
            flops=flops[name],
            rows=rows,
        )
        for name in read
        if read[name] or flops[name]
    ]
    return StepCost(
        terms=tuple(terms),
        sequences=len(steps),
        rows=rows,
        logit_rows=logit_rows,
        layers=len(work.mixers),
        vocab_size=work.embedding_rows,
        compute_dtype=work.compute_dtype,
    )


def _held_bytes(cache: CacheSpec, context: int, page_tokens: int) -> int:
    """What a layer holds of a sequence, in whole pages."""
    held = context
    if cache.horizon is not None and context > cache.horizon:
        # A window that slides over page borders touches one page more than it fills.
        held = min(context, cache.horizon + (page_tokens if page_tokens > 1 else 0))
    pages = -(-held // page_tokens)
    newest = 0 if cache.recent is None else _held_bytes(cache.recent, context, page_tokens)
    return pages * page_tokens * cache.bytes_per_token + cache.bytes_per_sequence + newest


def _cache_read(cache: CacheSpec, step: SequenceStep) -> float:
    """Bytes of the union of what the step's rows see: the first of them reaches furthest back."""
    if cache.horizon is None:
        tokens = step.context
    else:
        tokens = min(step.context, cache.horizon + step.tokens - 1)
    newest = 0.0
    if cache.recent is not None:  # the last row sees most of the rounded past
        tokens -= cache.recent.tokens_read(step.context)
        newest = _cache_read(cache.recent, step)
    return tokens * cache.bytes_per_token + newest + cache.bytes_per_sequence


def _cache_written(cache: CacheSpec, step: SequenceStep) -> float:
    newest = 0.0 if cache.recent is None else _cache_written(cache.recent, step)
    return step.tokens * cache.bytes_per_token + newest + cache.bytes_per_sequence


def _pairs(step: SequenceStep, horizon: int | None) -> int:
    """(query, key) pairs under the causal mask: query at position p sees p + 1 keys, or horizon."""
    first = step.context - step.tokens + 1  # keys that the first new row sees, unwindowed
    if horizon is None or step.context <= horizon:
        return (first + step.context) * step.tokens // 2
    growing = max(0, horizon - first + 1)  # rows whose past is still shorter than the window
    return (first + first + growing - 1) * growing // 2 + (step.tokens - growing) * horizon
