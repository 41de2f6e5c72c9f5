"""Small random draft heads for the tiny models."""

from __future__ import annotations

from typing import Any

import torch

from skimp.draft.files import empty_head
from skimp.model.draft_head import DraftHead, HeadSpec
from skimp.model.loading import assign
from skimp.model.spec import AttentionSpec, GatedFFNSpec, ModelSpec, RopeSpec


def tiny_head_spec(target: ModelSpec, **changes: Any) -> HeadSpec:
    fields: dict[str, Any] = {
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
        "draft_vocab_size": 48,
        "taps": (0, 2, 3),
        "mixer": AttentionSpec(
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            rope=RopeSpec(theta=10_000.0, rotary_dim=16),
            scale=0.25,
        ),
        "ffn": GatedFFNSpec(intermediate_size=80),
        "norm_eps": 1e-6,
        "max_positions": 1024,
        "dtype": "float32",
    }
    return HeadSpec(**{**fields, **changes})


def tiny_head(target: ModelSpec, seed: int = 0, **changes: Any) -> DraftHead:
    """With words of the target drawn at random, ascending."""
    spec = tiny_head_spec(target, **changes)
    head = empty_head(spec)
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, spec.dtype)
    for name, parameter in list(head.named_parameters()):
        tensor = torch.empty(parameter.shape).normal_(0.0, 0.1, generator=generator)
        if parameter.dim() == 1:
            tensor = 1 + tensor
        assign(head, name, tensor.to(dtype))
    drawn = torch.randperm(spec.vocab_size, generator=generator)[: spec.draft_vocab_size]
    head.token_ids = drawn.sort().values
    return head
