"""Gemma 3 text models (2025): sandwich norms, norms on q and k, local layers between global ones.

Local layers have their own RoPE, and the embeddings are scaled by the root of the width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skimp.errors import shown
from skimp.model.families import common
from skimp.model.families.common import stored_name
from skimp.model.families.reader import ConfigReader
from skimp.model.families.rope_config import rope_from
from skimp.model.spec import AttentionSpec, ModelSpec, RopeSpec

__all__ = ["stored_name", "tensor_names", "to_config", "to_spec"]

DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
}
GLOBAL_THETA, LOCAL_THETA = 1_000_000.0, 10_000.0
NORMS = {
    "mixer_norm": "input_layernorm",
    "mixer_post_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    return read_text(config, {})


def read_text(config: Mapping[str, Any], defaults: Mapping[str, int]) -> ModelSpec:
    """``defaults`` stand in for missing sizes: multimodal configs leave out the class's own."""
    read = ConfigReader("gemma3_text", config)
    sizes = common.read_sizes(
        read, max_positions=131_072, kv_heads=4, head_dim=256, defaults=defaults
    )
    if read.raw("attn_logit_softcapping") is not None:
        raise read.refuse(
            f"attn_logit_softcapping={shown(read.raw('attn_logit_softcapping'))}: the class "
            "declares this field and does not apply it, so its meaning is open"
        )
    period = read.integer("sliding_window_pattern", 6)
    ropes = _ropes(read, sizes.head_dim, sizes.max_positions)
    return read_gemma(
        read,
        sizes,
        period=period,
        ropes=ropes,
        qk_norm=True,
        softcap=None,
        logit_softcap=read.optional_number("final_logit_softcapping"),
    )


def read_gemma(
    read: ConfigReader,
    sizes: common.Sizes,
    *,
    period: int,
    ropes: tuple[RopeSpec, RopeSpec],
    qk_norm: bool,
    softcap: float | None,
    logit_softcap: float | None,
) -> ModelSpec:
    """What Gemma 2 and 3 share. Every ``period``-th layer is global; ropes are (local, global)."""
    read.must_be("use_bidirectional_attention", False)
    window = read.optional_integer("sliding_window", 4096, least=1)
    if window is None and not read.has("layer_types"):
        raise read.refuse("sliding_window is off, but without layer_types most layers slide")
    windows = common.read_windows(read, sizes.num_layers, window, lambda i: (i + 1) % period != 0)
    bias = read.boolean("attention_bias", False)
    scale = read.number("query_pre_attn_scalar", 256) ** -0.5
    mixers = [
        AttentionSpec(
            num_heads=sizes.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            head_dim=sizes.head_dim,
            rope=ropes[layer_window is None],
            scale=scale,
            window=layer_window,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=qk_norm,
            softcap=softcap,
        )
        for layer_window in windows
    ]
    activation = read.choice("hidden_activation", "gelu_pytorch_tanh", common.ACTIVATIONS)
    if read.has("hidden_act") and read.choice("hidden_act", "", common.ACTIVATIONS) != activation:
        raise read.refuse(
            f"hidden_act={shown(read.raw('hidden_act'))} and hidden_activation disagree"
        )
    read.raw("hidden_act")
    return common.make_spec(
        read,
        sizes,
        mixers,
        activation=activation,
        tie_embeddings=True,
        post_norms=True,
        norm_plus_one=True,
        embed_scale=sizes.hidden_size**0.5,
        logit_softcap=logit_softcap,
        bos=2,
        eos=1,
        pad=0,
    )


def _ropes(read: ConfigReader, head_dim: int, max_positions: int) -> tuple[RopeSpec, RopeSpec]:
    """(local, global): from one dictionary a layer type, or the older fields beside each other."""
    scaling = read.mapping("rope_scaling") or {}
    nested = read.mapping("rope_parameters") or {}
    for kind in nested:
        if kind not in (common.FULL, common.SLIDING):
            raise read.refuse(f"rope_parameters.{kind}: this class wants one object a layer type")
    inner = {}
    for kind in (common.FULL, common.SLIDING):
        inner[kind] = nested.get(kind) or {}
        name = f"rope_parameters.{kind}"
        if not isinstance(inner[kind], dict):
            raise read.refuse(f"{name} must be an object, got {shown(inner[kind])}")
        if inner[kind].get("truncate") is False:
            raise read.refuse(f"{name}.truncate=False is ignored by this class")
    if scaling and inner[common.FULL]:
        extra = {k: v for k, v in scaling.items() if inner[common.FULL].get(k, v) != v}
        if extra:
            raise read.refuse("rope_scaling and rope_parameters.full_attention disagree")
    everywhere = rope_from(
        read,
        "rope_parameters.full_attention" if inner[common.FULL] else "rope_scaling",
        {**inner[common.FULL], **scaling},
        read.raw("rope_theta"),
        head_dim,
        max_positions,
        GLOBAL_THETA,
    )
    local = rope_from(
        read,
        "rope_parameters.sliding_attention",
        inner[common.SLIDING],
        read.raw("rope_local_base_freq"),
        head_dim,
        max_positions,
        LOCAL_THETA,
    )
    read.raw("original_max_position_embeddings")
    return local, everywhere


def tensor_names(spec: ModelSpec) -> Mapping[str, str]:
    return common.llama_tensor_names(spec, NORMS)


def write_gemma(spec: ModelSpec, architecture: str) -> dict[str, Any]:
    """What Gemma 2 and 3 share, the rope of global layers included."""
    first = common.softmax_mixers(spec)[0]
    config = common.base_config(spec, architecture) | common.write_windows(spec)
    config["hidden_activation"] = config.pop("hidden_act")
    if config["sliding_window"] is None:
        del config["sliding_window"]
    scalar = first.scale**-2
    return config | {
        "attention_bias": first.qkv_bias,
        # The class wants an integer; the power back and forth leaves a rounding error.
        "query_pre_attn_scalar": round(scalar) if round(scalar) ** -0.5 == first.scale else scalar,
        "final_logit_softcapping": spec.logit_softcap,
    }


def to_config(spec: ModelSpec) -> dict[str, Any]:
    config = write_gemma(spec, "Gemma3ForCausalLM")
    mixers = [layer.mixer for layer in spec.layers]
    everywhere = next((m.rope for m in mixers if m.window is None and m.rope), None)
    local = next((m.rope for m in mixers if m.window is not None and m.rope), None)
    for name in ("rope_theta", "rope_scaling"):
        config.pop(name, None)  # those of the first layer, whichever kind it is
    if local is not None and local.scaling is not None:
        # Only transformers 5 has a place for this.
        config["rope_parameters"] = {
            kind: {"rope_theta": rope.theta, **(common.write_scaling(rope) or {})}
            for kind, rope in ((common.SLIDING, local), (common.FULL, everywhere))
            if rope is not None
        }
    else:
        config |= common.write_rope(everywhere)
        if local is not None:
            config["rope_local_base_freq"] = local.theta
    return common.checked(config, spec, to_spec)
