"""What the Llama-like families share: sizes, rope, layer patterns, tensor names, writing back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Final

from skimp.errors import ConfigError, SkimpWarning, shown
from skimp.model.families.reader import REQUIRED, ConfigReader
from skimp.model.spec import (
    Activation,
    AttentionSpec,
    ClampedSwiGLU,
    FFNSpec,
    GatedFFNSpec,
    LatentAttentionSpec,
    LayerSpec,
    MixerSpec,
    ModelSpec,
    RopeSpec,
    all_of,
)

MAX_LAYERS: Final = 10_000
MAX_EXPERTS: Final = 4096
ACTIVATIONS: Final[Mapping[str, Activation]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    # The same function: two older spellings of the tanh approximation.
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
ACTIVATION_NAMES: Final[Mapping[Activation, str]] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
}
DTYPES: Final = {name: name for name in ("float32", "bfloat16", "float16")} | {
    f"torch.{name}": name for name in ("float32", "bfloat16", "float16")
}
FULL: Final = "full_attention"
SLIDING: Final = "sliding_attention"


# ---- reading ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sizes:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int


def read_sizes(
    read: ConfigReader,
    *,
    max_positions: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    defaults: Mapping[str, int] | None = None,
) -> Sizes:
    """The sizes, checked against each other. Defaults are those of the transformers class;
    ``kv_heads`` None means one per head, ``head_dim`` None means hidden size / heads."""
    defaults = defaults or {}

    def size(name: str, most: int = 2**31 - 1) -> int:
        return read.integer(name, defaults.get(name, REQUIRED), most=most)

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    groups = read.optional_integer("num_key_value_heads", kv_heads, least=1) or heads
    if heads % groups:
        raise read.refuse(
            f"num_attention_heads={heads} is no multiple of num_key_value_heads={groups}"
        )
    dim = read.optional_integer("head_dim", head_dim, least=2)
    if dim is None:
        dim, remainder = divmod(hidden, heads)
        if remainder or not dim:
            raise read.refuse(f"hidden_size={hidden} is no multiple of num_attention_heads={heads}")
    if dim % 2:
        raise read.refuse(f"head_dim={dim} is odd, but rotary embedding turns pairs")
    return Sizes(
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        num_layers=size("num_hidden_layers", MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=dim,
        max_positions=read.integer("max_position_embeddings", max_positions),
    )


def read_windows(
    read: ConfigReader,
    num_layers: int,
    window: int | None,
    default: Callable[[int], bool],
) -> tuple[int | None, ...]:
    """Each layer's window; ``default(i)`` says whether layer i slides without ``layer_types``."""
    types = read.raw("layer_types")
    if types is None:
        types = [SLIDING if window and default(i) else FULL for i in range(num_layers)]
    if not isinstance(types, list):
        raise read.refuse(f"layer_types must be a list, got {shown(types)}")
    if len(types) != num_layers:
        raise read.refuse(
            f"layer_types has {len(types)} entries, but num_hidden_layers={num_layers}"
        )
    for i, kind in enumerate(types):
        if kind not in (FULL, SLIDING):
            raise read.refuse(f"layer_types[{i}]={shown(kind)} is neither {FULL} nor {SLIDING}")
        if kind == SLIDING and window is None:
            raise read.refuse(f"layer_types[{i}]={SLIDING!r}, but sliding_window is off")
    return tuple(window if kind == SLIDING else None for kind in types)


def read_experts(read: ConfigReader, name: str, default: int, *, least: int = 1) -> int:
    """The number of experts under either of its two names; ``name`` is the one to ask for."""
    other = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}[name]
    count, again = read.raw(name), read.raw(other)
    if count is not None and again not in (None, count):
        raise read.refuse(f"{name}={shown(count)} beside {other}={shown(again)}")
    found = name if count is not None or again is None else other
    return read.integer(found, default, least=least, most=MAX_EXPERTS)


def make_spec(
    read: ConfigReader,
    sizes: Sizes,
    mixers: Sequence[MixerSpec],
    *,
    norm_eps: float = 1e-6,
    activation: Activation,
    ffn_bias: bool = False,
    ffns: Sequence[FFNSpec] | None = None,
    tie_embeddings: bool = False,
    post_norms: bool = False,
    norm_plus_one: bool = False,
    embed_scale: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    residual_scale: float = 1.0,
    bos: int | None = None,
    eos: int | None = None,
    pad: int | None = None,
) -> ModelSpec:
    """The fields every family has, with the transformers class's defaults, and the rest. ``ffns``
    None: one gated feed-forward network alike in each layer."""
    names = read.raw("architectures")
    if names is not None and not (isinstance(names, list) and all(type(n) is str for n in names)):
        raise read.refuse(f"architectures must be a list of class names, got {shown(names)}")
    read.keep("architectures")
    if ffns is None:
        size = sizes.intermediate_size
        ffn = GatedFFNSpec(intermediate_size=size, activation=activation, bias=ffn_bias)
        ffns = [ffn] * len(mixers)
    return ModelSpec(
        family=read.family,
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        layers=tuple(
            LayerSpec(mixer=m, ffn=f, post_norms=post_norms, residual_scale=residual_scale)
            for m, f in zip(mixers, ffns, strict=True)
        ),
        norm_eps=read.number("rms_norm_eps", norm_eps),
        max_positions=sizes.max_positions,
        tie_embeddings=read.boolean("tie_word_embeddings", tie_embeddings),
        norm_plus_one=norm_plus_one,
        embed_scale=embed_scale,
        logit_softcap=logit_softcap,
        logit_scale=logit_scale,
        dtype=read_dtype(read),
        bos_token_id=read.token_id("bos_token_id", bos, sizes.vocab_size),
        eos_token_ids=read.token_ids("eos_token_id", eos, sizes.vocab_size),
        pad_token_id=read.token_id("pad_token_id", pad, sizes.vocab_size),
        config=read.rest(),
    )


def read_dtype(read: ConfigReader) -> str:
    """``dtype`` (transformers 5) or ``torch_dtype``; float32 if neither says."""
    found = {
        read.choice(name, "", DTYPES)
        for name in ("dtype", "torch_dtype")
        if read.has(name) and read.raw(name) != "auto"
    }
    read.raw("dtype"), read.raw("torch_dtype")
    if len(found) > 1:
        raise read.refuse(f"dtype and torch_dtype disagree: {', '.join(sorted(found))}")
    return found.pop() if found else "float32"


def softmax_mixers(spec: ModelSpec) -> tuple[AttentionSpec, ...]:
    """Each layer's mixer; ConfigError if one is of a kind that the class does not have."""
    mixers = (layer.mixer for layer in spec.layers)
    return all_of(AttentionSpec, mixers, lambda i: _has_no(spec, "latent attention", i))


def gated_ffns(spec: ModelSpec) -> tuple[GatedFFNSpec, ...]:
    """Each layer's feed-forward network; ConfigError if one is a mixture of experts."""
    ffns = (layer.ffn for layer in spec.layers)
    return all_of(GatedFFNSpec, ffns, lambda i: _has_no(spec, "mixture of experts", i))


def _has_no(spec: ModelSpec, part: str, layer: int) -> ConfigError:
    return ConfigError(f"model_type={spec.family!r} has no {part}, as in layer {layer}")


# ---- tensor names -----------------------------------------------------------------------------

LLAMA_NORMS: Final = {"mixer_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def ffn_tensor_names(ffn: FFNSpec) -> dict[str, str]:
    """Names in our ``ffn`` → those in the checkpoint's ``mlp``. A mixture's are those of Qwen and
    DeepSeek: each expert has its own tensors, and the router is called ``gate``."""
    if isinstance(ffn, GatedFFNSpec):
        kinds = ("weight", "bias") if ffn.bias else ("weight",)
        return {f"{p}_proj.{k}": f"{p}_proj.{k}" for p in ("gate", "up", "down") for k in kinds}
    names = {"router.weight": "gate.weight"}
    if ffn.router.bias:
        names["router.bias"] = "gate.bias"
    if ffn.router.correction:
        names["correction"] = "gate.e_score_correction_bias"
    one = GatedFFNSpec(intermediate_size=ffn.intermediate_size, bias=ffn.bias)
    parts = [(f"experts.{i}", f"experts.{i}", one) for i in range(ffn.num_experts)]
    if ffn.shared is not None:
        parts.append(("shared", "shared_experts", ffn.shared))
    for ours, theirs, part in parts:
        names |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in ffn_tensor_names(part).items()}
    return names


def llama_tensor_names(
    spec: ModelSpec,
    norms: Mapping[str, str] = LLAMA_NORMS,
    ffn_names: Callable[[FFNSpec], Mapping[str, str]] = ffn_tensor_names,
) -> Mapping[str, str]:
    """Our names → Llama's, for what the spec has; ``norms`` maps the norms of a layer."""
    names = {"embed_tokens.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    if not spec.tie_embeddings:
        names["lm_head.weight"] = "lm_head.weight"
    for i, layer in enumerate(spec.layers):
        matrices = _mixer_names(layer.mixer)
        matrices |= {ours: (theirs, False) for ours, theirs in norms.items()}
        if isinstance(layer.mixer, AttentionSpec) and layer.mixer.sinks:
            names[f"layers.{i}.mixer.sinks"] = f"model.layers.{i}.self_attn.sinks"
        for ours, (theirs, bias) in matrices.items():
            for kind in ("weight", "bias") if bias else ("weight",):
                names[f"layers.{i}.{ours}.{kind}"] = f"model.layers.{i}.{theirs}.{kind}"
        for ours, theirs in ffn_names(layer.ffn).items():
            names[f"layers.{i}.ffn.{ours}"] = f"model.layers.{i}.mlp.{theirs}"
    return names


def _mixer_names(mixer: MixerSpec) -> dict[str, tuple[str, bool]]:
    """Our name → theirs, and whether there is a bias."""
    if isinstance(mixer, LatentAttentionSpec):
        found = {
            "kv_a_proj": ("kv_a_proj_with_mqa", mixer.in_bias),
            "kv_a_norm": ("kv_a_layernorm", False),
            "kv_b_proj": ("kv_b_proj", False),
            "o_proj": ("o_proj", mixer.out_bias),
        }
        if mixer.query_latent_dim is None:
            found["q_proj"] = ("q_proj", False)
        else:
            found["q_a_proj"] = ("q_a_proj", mixer.in_bias)
            found["q_a_norm"] = ("q_a_layernorm", False)
            found["q_b_proj"] = ("q_b_proj", False)
    else:
        found = {f"{p}_proj": (f"{p}_proj", mixer.qkv_bias) for p in "qkv"}
        found["o_proj"] = ("o_proj", mixer.out_bias)
        if mixer.qk_norm:
            found |= {f"{p}_norm": (f"{p}_norm", False) for p in "qk"}
    return {f"mixer.{ours}": (f"self_attn.{name}", bias) for ours, (name, bias) in found.items()}


def stored_name(name: str, spec: ModelSpec) -> str | None:
    """Old exports keep RoPE's frequencies, which follow from the config."""
    return None if name.endswith("rotary_emb.inv_freq") else name


# ---- writing ----------------------------------------------------------------------------------


def base_config(spec: ModelSpec, architecture: str) -> dict[str, Any]:
    """The fields that families with heads of keys and values write the same way."""
    mixer = softmax_mixers(spec)[0]
    return decoder_config(spec, architecture) | {
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads,
        "head_dim": mixer.head_dim,
        **write_rope(mixer.rope),
    }


def decoder_config(spec: ModelSpec, architecture: str) -> dict[str, Any]:
    """The fields all families write the same way, after those kept from the source. A class with
    mixtures of experts adds what describes them."""
    dense = [layer.ffn for layer in spec.layers if isinstance(layer.ffn, GatedFFNSpec)]
    ffn = dense[0] if dense else spec.layers[0].ffn
    widths = {"intermediate_size": ffn.intermediate_size} if dense else {}
    eos = list(spec.eos_token_ids)
    # What the source says, unless a converter has moved the spec to another class since.
    kept = spec.config.get("architectures") or [""]
    ours = kept[0].startswith(architecture.removesuffix("ForCausalLM"))
    return {
        **spec.config,
        "architectures": kept if ours else [architecture],
        "model_type": spec.family,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        **widths,
        "num_hidden_layers": spec.num_layers,
        "hidden_act": "silu"
        if isinstance(ffn.activation, ClampedSwiGLU)
        else ACTIVATION_NAMES[ffn.activation],
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tie_embeddings,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": spec.pad_token_id,
        "torch_dtype": spec.dtype,
    }


def write_rope(rope: RopeSpec | None) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling``: the spelling transformers 4 and 5 both read."""
    if rope is None:
        return {}
    return {"rope_theta": rope.theta, "rope_scaling": write_scaling(rope)}


def write_scaling(rope: RopeSpec) -> dict[str, Any] | None:
    if rope.scaling is None:
        return None
    scaling = dict(rope.scaling)
    if scaling["rope_type"] == "dynamic":  # ours only: the class takes max_position_embeddings
        del scaling["original_max_position_embeddings"]
    if scaling.get("truncate") is True:
        del scaling["truncate"]  # the default
    if scaling["rope_type"] == "longrope":
        del scaling["factor"]  # ours only, likewise
        scaling |= {k: list(scaling[k]) for k in ("short_factor", "long_factor")}
    return scaling


def write_windows(spec: ModelSpec) -> dict[str, Any]:
    """``layer_types`` and ``sliding_window``; None for the window if no layer has one."""
    windows = [layer.mixer.window for layer in spec.layers]
    return {
        "layer_types": [SLIDING if w is not None else FULL for w in windows],
        "sliding_window": next((w for w in windows if w is not None), None),
    }


def checked(
    config: dict[str, Any], spec: ModelSpec, to_spec: Callable[[Mapping[str, Any]], ModelSpec]
) -> dict[str, Any]:
    """The config, if reading it back gives the spec; else the class cannot express the spec."""
    with warnings.catch_warnings():  # given when the source was read
        warnings.simplefilter("ignore", SkimpWarning)
        difference = first_difference(spec, to_spec(config), "")
    if difference is not None:
        raise ConfigError(f"model_type={spec.family!r} cannot express the spec: {difference}")
    return config


def first_difference(wanted: Any, got: Any, path: str) -> str | None:
    """Where two specs differ first, with both values; None if they are equal."""
    if wanted == got:
        return None
    if is_dataclass(wanted) and type(wanted) is type(got):
        for item in fields(wanted):
            if item.compare:
                inner = f"{path}.{item.name}" if path else item.name
                found = first_difference(getattr(wanted, item.name), getattr(got, item.name), inner)
                if found:
                    return found
        return None
    if isinstance(wanted, tuple) and isinstance(got, tuple) and len(wanted) == len(got):
        pairs = enumerate(zip(wanted, got))
        found_in = (first_difference(a, b, f"{path}[{i}]") for i, (a, b) in pairs)
        return next((found for found in found_in if found), None)
    return f"{path} is {shown(wanted)} but would be read back as {shown(got)}"
