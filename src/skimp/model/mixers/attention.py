"""Softmax attention with any number of KV heads, over the whole past or a window of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from skimp.cache.spec import CacheSpec
from skimp.kernels.ops import AttentionParams, LayerCache, Ops, StepInputs
from skimp.model.layers import Linear, RMSNorm
from skimp.model.spec import AttentionSpec


def cache_spec(spec: AttentionSpec, dtype: torch.dtype) -> CacheSpec:
    """Keys and values of one token, in ``dtype``."""
    return CacheSpec(
        kind="kv",
        bytes_per_token=2 * spec.kv_dim * dtype.itemsize,
        horizon=spec.window,
        dtype=str(dtype).removeprefix("torch."),
        shape=(spec.num_kv_heads, spec.head_dim),
    )


class Attention(nn.Module):
    def __init__(
        self, spec: AttentionSpec, hidden_size: int, *, norm_eps: float, norm_plus_one: bool
    ) -> None:
        super().__init__()
        self.spec = spec
        self.norm_eps = norm_eps
        bias = spec.qkv_bias
        self.q_proj = Linear(hidden_size, spec.q_dim, bias=bias)
        self.k_proj = Linear(hidden_size, spec.kv_dim, bias=bias)
        self.v_proj = Linear(hidden_size, spec.kv_dim, bias=bias)
        self.o_proj = Linear(spec.q_dim, hidden_size, bias=spec.out_bias)
        self.q_norm = self.k_norm = None
        if spec.qk_norm:
            self.q_norm = RMSNorm(spec.head_dim, eps=norm_eps, plus_one=norm_plus_one)
            self.k_norm = RMSNorm(spec.head_dim, eps=norm_eps, plus_one=norm_plus_one)
        self.sinks = nn.Parameter(torch.empty(spec.num_heads)) if spec.sinks else None

    def bind(self, ops: Ops, rope: tuple[Tensor, Tensor] | None, cache: LayerCache | None) -> None:
        """Hand the weights to a backend and fix where this layer's cache lies."""
        self._qkv: Any = ops.pack((self.q_proj, self.k_proj, self.v_proj))
        self._out: Any = ops.pack((self.o_proj,))
        self._params = AttentionParams(
            spec=self.spec,
            norm_eps=self.norm_eps,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            sinks=None if self.sinks is None else self.sinks.float(),
            rope=rope,
            cache=cache,
        )

    def mix(self, x_RD: Tensor, norm: RMSNorm, ops: Ops, step: StepInputs) -> Tensor:
        """[R, q_dim]: what enters the output projection."""
        qkv = ops.matmul(x_RD, self._qkv, norm=norm)
        return ops.attention(qkv, self._params, step)

    @property
    def out(self) -> Any:
        """The output projection as the backend holds it."""
        return self._out
