"""What each known shortcut would change, computed with the same functions as everything else.

A variant is a transformed :class:`ModelWork` (other matrices, other caches) and a way to emit
tokens (rows of a step, tokens accepted, a draft's own steps). Nothing here is measured: accuracy
is not predicted at all, and speed only by the roofline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from skimp.cache.spec import DEFAULT_RECENT, FORMAT_BITS, CacheSpec, vector_bytes
from skimp.cost.hardware import Hardware, StepTime, predict
from skimp.cost.memory import MemoryPlan, memory_plan
from skimp.cost.work import (
    MixerWork,
    ModelWork,
    StepCost,
    arithmetic,
    item_bytes,
    step_cost,
    uniform,
)
from skimp.formats.weight import WeightFormat
from skimp.model.spec import LatentAttentionSpec, ModelSpec

MLA_LATENT, MLA_ROPE = 512, 64
INT8 = WeightFormat(kind="int", bits=8)
INT4 = WeightFormat(kind="int", bits=4, group_size=128)
FP8 = WeightFormat(kind="float", bits=8, activations="fp8")


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a prediction has to be told. Acceptance is a property of model, draft and text."""

    kv_heads: int | None = None  # GQA; None picks a quarter of MHA's, half of GQA's
    window: int = 1024
    global_every: int = 4
    acceptance: float = 0.7  # probability that one drafted token is accepted
    draft_tokens: int = 4
    draft_cost: float = 0.1  # a draft step's time over a target step's
    block: int = 8
    block_steps: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.acceptance <= 1:
            raise ValueError(f"acceptance: between 0 and 1, not {self.acceptance}")
        if not 0 <= self.draft_cost < float("inf"):
            raise ValueError(f"draft_cost: not negative, not {self.draft_cost}")
        for name in ("window", "global_every", "draft_tokens", "block", "block_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: at least 1, not {getattr(self, name)}")
        if self.block_steps > self.block:
            raise ValueError(f"block_steps: {self.block_steps} is more than block {self.block}")

    @property
    def tokens_per_check(self) -> float:
        """Expected tokens of a speculative step (Leviathan et al. 2023, equation 1)."""
        a, n = self.acceptance, self.draft_tokens
        return float(n + 1) if a == 1 else (1 - a ** (n + 1)) / (1 - a)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A variant at one batch and context."""

    name: str
    detail: str
    cost: StepCost
    time: StepTime
    limit_s: float
    extra_s: float  # a draft's own steps
    tokens_per_step: float  # a sequence
    memory: MemoryPlan

    @property
    def step_s(self) -> float:
        return self.time.seconds + self.extra_s

    @property
    def tokens_per_s(self) -> float:
        return self.cost.sequences * self.tokens_per_step / self.step_s


@dataclass(frozen=True, kw_only=True)
class Inapplicable:
    """A shortcut this model cannot take, or gains nothing from."""

    name: str
    reason: str


def compare(
    spec: ModelSpec,
    work: ModelWork,
    hardware: Hardware,
    *,
    batch: int,
    context: int,
    assumptions: Assumptions,
) -> tuple[Outcome, list[Outcome | Inapplicable]]:
    """The model as it is, and each shortcut alone, generating at ``batch`` and ``context``."""

    def outcome(
        name: str,
        detail: str,
        work: ModelWork,
        *,
        rows: int = 1,
        tokens_per_step: float = 1.0,
        extra_s: float = 0.0,
    ) -> Outcome:
        # Rows beyond the first look ahead of the context that the question names.
        cost = step_cost(work, uniform(batch, context + rows - 1, tokens=rows, logits=rows))
        return Outcome(
            name=name,
            detail=detail,
            cost=cost,
            time=predict(cost, hardware),
            limit_s=hardware.limit_s(cost),
            extra_s=extra_s,
            tokens_per_step=tokens_per_step,
            memory=memory_plan(work, batch=batch, context=context),
        )

    base = outcome("as it is", f"{work.compute_dtype} weights and cache", work)
    found: list[Outcome | Inapplicable] = []

    def attempt(name: str, make: Callable[[], tuple[str, ModelWork]]) -> None:
        try:
            detail, changed = make()
        except _NoGain as reason:
            found.append(Inapplicable(name=name, reason=str(reason)))
        else:
            found.append(outcome(name, detail, changed))

    attempt("GQA", lambda: _fewer_heads(spec, work, assumptions.kv_heads))
    attempt("MLA", lambda: _latent(spec, work))
    attempt("local/global", lambda: _windows(work, assumptions.window, assumptions.global_every))
    known = hardware.matrix_tflops
    # Where the machine multiplies in 8 bits, activations are rounded too.
    int8 = replace(INT8, activations="int8") if "int8-a8" in known else INT8
    attempt("int8 weights", lambda: _weights(work, int8, head=True))
    attempt("int4 weights", lambda: _weights(work, INT4, head=False))
    if hardware.kind == "gpu" and arithmetic(FP8) in known:
        attempt("fp8 weights", lambda: _weights(work, FP8, head=True))
    else:
        found.append(Inapplicable(name="fp8 weights", reason=f"no fp8 products on {hardware.name}"))
    attempt("int8 cache", lambda: _cache_format(work, "int8"))
    attempt("int4 cache", lambda: _cache_format(work, "int4"))
    a = assumptions
    found.append(
        outcome(
            "speculation",
            f"{a.draft_tokens} drafted, {a.acceptance:.0%} accepted, draft step "
            f"{a.draft_cost:.0%} of a step",
            work,
            rows=a.draft_tokens + 1,
            tokens_per_step=a.tokens_per_check,
            extra_s=a.draft_tokens * a.draft_cost * base.time.seconds,
        )
    )
    found.append(
        outcome(
            "block diffusion",
            f"block {a.block} in {a.block_steps} steps",
            work,
            rows=a.block,
            tokens_per_step=a.block / a.block_steps,
        )
    )
    return base, found


class _NoGain(Exception):
    """Why a shortcut does not apply."""


def _fewer_heads(spec: ModelSpec, work: ModelWork, wanted: int | None) -> tuple[str, ModelWork]:
    mixers, matrices = list(work.mixers), list(work.matrices)
    text = ""
    for i, layer in enumerate(spec.layers):
        mixer = layer.mixer
        if isinstance(mixer, LatentAttentionSpec):
            raise _NoGain("a latent has no KV heads")
        now = mixer.num_kv_heads
        target = wanted
        if target is None:
            target = max(1, now // (4 if now == mixer.num_heads else 2))
        if target < 1 or mixer.num_heads % target:
            raise ValueError(f"kv_heads: {target} does not divide {mixer.num_heads} heads")
        if target >= now:
            raise _NoGain(f"already {now} KV head{'s' if now > 1 else ''}")
        text = f"{now} to {target} KV heads"
        mixers[i] = replace(work.mixers[i], cache=_with_heads(work.mixers[i].cache, target))
        names = {f"layers.{i}.mixer.k_proj", f"layers.{i}.mixer.v_proj"}
        matrices = [
            replace(m, out_features=target * mixer.head_dim) if m.name in names else m
            for m in matrices
        ]
    return text, replace(work, mixers=tuple(mixers), matrices=tuple(matrices))


def _with_heads(cache: CacheSpec, heads: int) -> CacheSpec:
    return replace(
        cache,
        bytes_per_token=round(cache.bytes_per_token * heads / cache.shape[0]),
        shape=(heads, *cache.shape[1:]),
        recent=None if cache.recent is None else _with_heads(cache.recent, heads),
    )


def latent_attention(work: ModelWork, index: int, heads: int, head_dim: int) -> ModelWork:
    """``work`` with layer ``index`` turned into MLA (DeepSeek-V2): a latent of 512 numbers and a
    rotary key of 64 a token, absorbed projections, no query compression."""
    mixer = LatentAttentionSpec(
        num_heads=heads,
        latent_dim=MLA_LATENT,
        rope_dim=MLA_ROPE,
        nope_dim=head_dim,
        value_dim=head_dim,
        rope=None,
        scale=1.0,
    )
    prefix = f"layers.{index}.mixer."
    queries = next(m for m in work.matrices if m.name == prefix + "q_proj")
    new = [
        replace(queries, name=prefix + name, in_features=n_in, out_features=n_out)
        for name, (n_in, n_out) in mixer.matrices(queries.in_features).items()
        if name != "o_proj"
    ]
    kept = [
        m
        for m in work.matrices
        if m.name not in {prefix + n for n in ("q_proj", "k_proj", "v_proj")}
    ]
    dtype = work.mixers[index].cache.dtype
    mixers = list(work.mixers)
    cache = CacheSpec(
        kind="latent",
        bytes_per_token=mixer.cached_dim * item_bytes(dtype),
        dtype=dtype,
        shape=(MLA_LATENT, MLA_ROPE),
    )
    mixers[index] = MixerWork.of(mixer, cache)
    return replace(work, matrices=tuple(kept[:-1] + new + kept[-1:]), mixers=tuple(mixers))


def _latent(spec: ModelSpec, work: ModelWork) -> tuple[str, ModelWork]:
    before = work.cache_bytes_per_token
    for i, layer in enumerate(spec.layers):
        mixer = layer.mixer
        if isinstance(mixer, LatentAttentionSpec):
            raise _NoGain("it has latent attention already")
        if mixer.window is None:
            work = latent_attention(work, i, mixer.num_heads, mixer.head_dim)
    if work.cache_bytes_per_token >= before:
        raise _NoGain(
            f"a latent of {MLA_LATENT}+{MLA_ROPE} is no smaller than this model's keys and values"
        )
    return f"latent {MLA_LATENT}+{MLA_ROPE} for {before / work.cache_bytes_per_token:.1f}x", work


def _windows(work: ModelWork, window: int, every: int) -> tuple[str, ModelWork]:
    if any(m.cache.kind == "latent" for m in work.mixers):
        raise _NoGain("no class has windows of latents")
    mixers = [
        replace(m, cache=replace(m.cache, horizon=window))
        if (i + 1) % every and m.cache.horizon is None
        else m
        for i, m in enumerate(work.mixers)
    ]
    if tuple(mixers) == work.mixers:
        raise _NoGain("every layer that could be local is")
    return f"{every - 1} of {every} layers see {window} tokens", replace(work, mixers=tuple(mixers))


def _weights(work: ModelWork, form: WeightFormat, *, head: bool) -> tuple[str, ModelWork]:
    matrices = []
    for m in work.matrices:
        stored = form.bits_per_weight(m.in_features)
        change = (head or not m.head) and stored < m.bits
        matrices.append(replace(m, bits=stored, format=form) if change else m)
    if tuple(matrices) == work.matrices:
        raise _NoGain("the weights are no larger now")
    scale = "per channel" if form.group_size is None else f"group {form.group_size}"
    kept = "" if head else ", output matrix kept"
    return f"{arithmetic(form)}, {scale}{kept}", replace(work, matrices=tuple(matrices))


def _cache_format(work: ModelWork, format: str) -> tuple[str, ModelWork]:
    """The cache that the engine would make of ``cache_dtype`` alone."""
    bits, recent = FORMAT_BITS[format], DEFAULT_RECENT[format]
    mixers = []
    for m in work.mixers:
        cache = m.cache
        if cache.kind == "kv" and cache.format is None:
            cache = cache.rounded(format, recent=recent, hadamard=format == "int4")
        elif cache.format is not None and FORMAT_BITS[cache.format] > bits:
            heads, head_dim = cache.shape
            smaller = 2 * heads * vector_bytes(head_dim, format)
            cache = replace(cache, bytes_per_token=smaller, format=format)
        mixers.append(replace(m, cache=cache))
    if tuple(mixers) == work.mixers:
        raise _NoGain("the cache is no larger now")
    kept = f", newest {recent} tokens kept" if recent else ""
    text = f"{bits} bits, a 16-bit scale a head and token{kept}"
    return text, replace(work, mixers=tuple(mixers))
