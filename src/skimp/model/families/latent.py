"""What the families with latent attention (MLA) share: its fields, read and written."""

from __future__ import annotations

from typing import Any, Final

from skimp.errors import ConfigError
from skimp.model.families import common
from skimp.model.families.reader import ConfigReader
from skimp.model.families.rope_config import read_rope
from skimp.model.rope import yarn_softmax_factor
from skimp.model.spec import LatentAttentionSpec, ModelSpec, RopeSpec

LATENT_EPS: Final = 1e-6  # of the latents' norms, whatever rms_norm_eps says


def read_sizes(
    read: ConfigReader, *, max_positions: int, rope_dim: int | None = None
) -> common.Sizes:
    """The sizes, with the rotated part of a head as ``head_dim``, as these classes have it.
    ``rope_dim`` is the class's default, None if the class has none worth assuming."""
    dim = read.integer("qk_rope_head_dim", 64 if rope_dim is None else rope_dim, least=2)
    sizes = common.read_sizes(read, max_positions=max_positions, head_dim=dim)
    if sizes.head_dim != dim:
        raise read.refuse(f"head_dim={sizes.head_dim} beside qk_rope_head_dim={dim}")
    if sizes.num_kv_heads != sizes.num_heads:
        raise read.refuse(
            f"num_key_value_heads={sizes.num_kv_heads}, but every one of the {sizes.num_heads} "
            "heads has a key and a value of its own, made of the latent"
        )
    return sizes


def read_mixer(
    read: ConfigReader,
    sizes: common.Sizes,
    *,
    interleaved: bool,
    latent_dim: int = 512,
    query_latent_dim: int | None = 1536,
    nope_dim: int = 128,
    value_dim: int = 128,
) -> LatentAttentionSpec:
    """The keywords are the class's defaults."""
    nope = read.integer("qk_nope_head_dim", nope_dim)
    whole = nope + sizes.head_dim
    if read.optional_integer("qk_head_dim", whole, least=1) != whole:
        raise read.refuse(f"qk_head_dim is not qk_nope_head_dim + qk_rope_head_dim = {whole}")
    rope = read_rope(
        read, head_dim=sizes.head_dim, max_positions=sizes.max_positions, interleaved=interleaved
    )
    bias = read.boolean("attention_bias", False)
    return LatentAttentionSpec(
        num_heads=sizes.num_heads,
        latent_dim=read.integer("kv_lora_rank", latent_dim),
        rope_dim=sizes.head_dim,
        nope_dim=nope,
        value_dim=read.optional_integer("v_head_dim", value_dim, least=1) or value_dim,
        rope=rope,
        scale=whole**-0.5 * yarn_softmax_factor(rope.scaling),
        query_latent_dim=read.optional_integer("q_lora_rank", query_latent_dim, least=1),
        latent_eps=LATENT_EPS,
        in_bias=bias,
        out_bias=bias,
    )


def only_mixer(spec: ModelSpec) -> LatentAttentionSpec:
    """The one mixer of all layers; ConfigError if there are others."""
    mixer = spec.layers[0].mixer
    if not isinstance(mixer, LatentAttentionSpec):
        raise ConfigError(f"model_type={spec.family!r} has latent attention only")
    return mixer


def write(spec: ModelSpec, architecture: str) -> dict[str, Any]:
    """The fields of the shape, of attention and of RoPE."""
    mixer = only_mixer(spec)
    rope = mixer.rope
    if rope is None:
        raise ConfigError(f"model_type={spec.family!r} has rotary positions, the spec has none")
    config = common.decoder_config(spec, architecture)
    for name in ("num_key_value_heads", "head_dim", "qk_head_dim"):
        config.pop(name, None)
    return config | {
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_heads,
        "kv_lora_rank": mixer.latent_dim,
        "q_lora_rank": mixer.query_latent_dim,
        "qk_rope_head_dim": mixer.rope_dim,
        "qk_nope_head_dim": mixer.nope_dim,
        "v_head_dim": mixer.value_dim,
        "attention_bias": mixer.in_bias,
        **common.write_rope(rope),
    }


def interleaved(spec: ModelSpec) -> bool:
    rope: RopeSpec | None = only_mixer(spec).rope
    return rope is not None and rope.interleaved
