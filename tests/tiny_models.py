"""Small random models and requests that engine tests share."""

from __future__ import annotations

import dataclasses
import random

import torch

from skimp.decoding.params import SamplingParams
from skimp.model.decoder import Decoder
from skimp.model.draft_head import DraftHead, HeadSpec
from skimp.model.loading import random_decoder
from skimp.model.spec import (
    AttentionSpec,
    GatedFFNSpec,
    LatentAttentionSpec,
    LayerSpec,
    ModelSpec,
    RopeSpec,
)

VOCAB = 320


def tiny_spec(windows: tuple[int | None, ...] = (None, 24, None, 100)) -> ModelSpec:
    """A four-layer decoder with full and windowed layers, GQA, QK-norm and tied embeddings."""
    attention = AttentionSpec(
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rope=RopeSpec(theta=10_000.0, rotary_dim=16),
        scale=0.25,
        qk_norm=True,
    )
    layers = tuple(
        LayerSpec(
            mixer=dataclasses.replace(attention, window=window),
            ffn=GatedFFNSpec(intermediate_size=96),
        )
        for window in windows
    )
    return ModelSpec(
        family="qwen3",
        vocab_size=VOCAB,
        hidden_size=64,
        layers=layers,
        norm_eps=1e-6,
        max_positions=1024,
        tie_embeddings=True,
        dtype="float32",
        eos_token_ids=(0,),
    )


def latent_mixer(query_latent_dim: int | None = 20) -> LatentAttentionSpec:
    return LatentAttentionSpec(
        num_heads=4,
        latent_dim=24,
        rope_dim=8,
        nope_dim=12,
        value_dim=16,
        rope=RopeSpec(theta=10_000.0, rotary_dim=8, interleaved=True),
        scale=0.25,
        query_latent_dim=query_latent_dim,
    )


def mixed_spec() -> ModelSpec:
    """The whole past, windows and latents in turn."""
    spec = tiny_spec()
    layers = list(spec.layers)
    for index in (1, 3):
        layers.insert(index, dataclasses.replace(layers[0], mixer=latent_mixer()))
    return dataclasses.replace(spec, layers=tuple(layers))


def with_latents(spec: ModelSpec, query_latent_dim: int | None) -> ModelSpec:
    """All layers with latents in place of heads."""
    mixer = latent_mixer(query_latent_dim)
    layers = tuple(dataclasses.replace(layer, mixer=mixer) for layer in spec.layers)
    return dataclasses.replace(spec, layers=layers)


def tiny_decoder(spec: ModelSpec | None = None, seed: int = 0, dtype: str = "float32") -> Decoder:
    decoder = random_decoder(spec or tiny_spec(), seed=seed, dtype=dtype)
    for parameter in decoder.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(4.0)  # logits with some contrast
    return decoder


def tiny_head(
    spec: ModelSpec | None = None, *, words: int | None = None, seed: int = 7
) -> DraftHead:
    """A random draft head that guesses ``words`` of the model's tokens, or all."""
    spec = spec or tiny_spec()
    draw = torch.Generator().manual_seed(seed)
    head = DraftHead(
        HeadSpec(
            hidden_size=spec.hidden_size,
            vocab_size=spec.vocab_size,
            draft_vocab_size=words or spec.vocab_size,
            taps=(1, spec.num_layers // 2, spec.num_layers),
            mixer=AttentionSpec(
                num_heads=4,
                num_kv_heads=2,
                head_dim=16,
                rope=RopeSpec(theta=10_000.0, rotary_dim=16),
                scale=0.25,
            ),
            ffn=GatedFFNSpec(intermediate_size=96),
            norm_eps=1e-6,
            max_positions=spec.max_positions,
            dtype="float32",
        )
    )
    with torch.no_grad():
        for parameter in head.parameters():
            noise = torch.empty_like(parameter).normal_(generator=draw)
            parameter.copy_(noise * 0.15 if parameter.dim() == 2 else 1.0 + 0.1 * noise)
    if words is not None:
        some = torch.randperm(spec.vocab_size, generator=draw)[:words]
        head.token_ids.copy_(some.sort().values)
    return head


def random_requests(
    count: int, seed: int, *, max_prompt: int = 800, max_output: int = 24
) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of 1 to ``max_prompt`` tokens, a third with shared prefixes; sampled in all ways."""
    rng = random.Random(seed)
    stems = [[rng.randrange(1, VOCAB) for _ in range(max_prompt)] for _ in range(4)]
    requests = []
    for index in range(count):
        length = rng.randint(1, max_prompt)
        prompt = [rng.randrange(1, VOCAB) for _ in range(length)]
        if rng.random() < 0.35:
            shared = rng.randint(0, length)
            prompt[:shared] = rng.choice(stems)[:shared]
        params = SamplingParams(
            max_tokens=rng.randint(1, max_output),
            temperature=rng.choice([0.0, 0.7, 1.0, 1.3]),
            top_k=rng.choice([0, 0, 5, 50]),
            top_p=rng.choice([1.0, 1.0, 0.9]),
            min_p=rng.choice([0.0, 0.0, 0.05]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
            presence_penalty=rng.choice([0.0, 0.0, 0.5]),
            seed=index,
        )
        requests.append((prompt, params))
    return requests
