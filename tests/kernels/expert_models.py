"""Small mixtures of experts of every kind, that tests of several backends share."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from skimp.model.ffn import Experts
from skimp.model.layers import RMSNorm
from skimp.model.spec import ClampedSwiGLU, ExpertsSpec, GatedFFNSpec, RouterSpec

HIDDEN = 40
QWEN = ExpertsSpec(
    num_experts=6, experts_per_token=2, intermediate_size=24, router=RouterSpec(normalize=True)
)
GPT_OSS = ExpertsSpec(
    num_experts=5,
    experts_per_token=3,
    intermediate_size=40,
    activation=ClampedSwiGLU(alpha=1.3, limit=0.8),
    bias=True,
    router=RouterSpec(bias=True, normalize=True),
    fused=True,
)
DEEPSEEK_V2 = ExpertsSpec(
    num_experts=12,
    experts_per_token=3,
    intermediate_size=20,
    router=RouterSpec(groups=4, groups_chosen=2, scale=16.0),
    shared=GatedFFNSpec(intermediate_size=36),
)
DEEPSEEK_V3 = ExpertsSpec(
    num_experts=16,
    experts_per_token=4,
    intermediate_size=16,
    router=RouterSpec(
        scoring="sigmoid",
        correction=True,
        groups=4,
        groups_chosen=2,
        group_score="top2",
        normalize=True,
        normalize_eps=1e-20,
        scale=2.5,
    ),
)
BIASED = replace(QWEN, bias=True, activation="gelu_tanh", num_experts=3, experts_per_token=3)
SPECS = {
    "qwen": QWEN,
    "gpt-oss": GPT_OSS,
    "deepseek-v2": DEEPSEEK_V2,
    "deepseek-v3": DEEPSEEK_V3,
    "all-biased": BIASED,
}


def make(spec: ExpertsSpec, dtype: torch.dtype = torch.float32) -> tuple[Experts, RMSNorm]:
    """The same weights at every call."""
    torch.manual_seed(2)
    layer, norm = Experts(spec, HIDDEN), RMSNorm(HIDDEN, eps=1e-5)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.normal_(0.0, 0.3 if parameter.dim() > 1 else 0.5)
            if name != "correction":
                parameter.data = parameter.data.to(dtype)
        norm.weight.normal_(1.0, 0.2)
    return layer, norm


def rows(count: int) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(count))
