"""MiniCPM3 (OpenBMB 2024): dense layers with latent attention, scaled residuals and logits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from skimp.model.families import common, latent
from skimp.model.families.common import llama_tensor_names as tensor_names
from skimp.model.families.common import stored_name
from skimp.model.families.reader import ConfigReader
from skimp.model.spec import ModelSpec

__all__ = ["stored_name", "tensor_names", "to_config", "to_spec"]


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    read = ConfigReader("minicpm3", config)
    sizes = latent.read_sizes(read, max_positions=32_768, rope_dim=32)
    mixer = latent.read_mixer(
        read,
        sizes,
        interleaved=False,
        latent_dim=256,
        query_latent_dim=768,
        nope_dim=64,
        value_dim=sizes.hidden_size // sizes.num_heads,
    )
    root = math.sqrt(sizes.num_layers)
    base = read.optional_integer("dim_model_base", 256, least=1) or sizes.hidden_size
    return common.make_spec(
        read,
        sizes,
        [mixer] * sizes.num_layers,
        norm_eps=1e-5,
        activation=read.choice("hidden_act", "silu", common.ACTIVATIONS),
        ffn_bias=read.boolean("mlp_bias", False),
        tie_embeddings=True,
        embed_scale=read.number("scale_emb", 12),
        residual_scale=(read.optional_number("scale_depth", 1.4) or root) / root,
        logit_scale=base / sizes.hidden_size,
        bos=1,
        eos=2,
    )


def to_config(spec: ModelSpec) -> dict[str, Any]:
    config = latent.write(spec, "MiniCPM3ForCausalLM")
    config |= {
        "mlp_bias": spec.layers[0].ffn.bias,
        "scale_emb": spec.embed_scale,
        "scale_depth": spec.layers[0].residual_scale * math.sqrt(spec.num_layers),
        "dim_model_base": round(spec.logit_scale * spec.hidden_size),
    }
    return common.checked(config, spec, to_spec)
