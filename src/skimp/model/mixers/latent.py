"""Multi-head latent attention (MLA, DeepSeek-V2, 2024): one latent a token in place of heads.

A token is remembered as a normed latent c and one rotated key r that all heads share. Head h has
the key (U_h c, r) and the value V_h c. Backends attend in either of two exact ways: *expanded*,
keys and values made of every latent that is seen, for many rows; *absorbed*, for few, where the
query U_h^T q meets the latents themselves, which are values too, and V_h comes after the mixing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from skimp.cache.spec import CacheSpec
from skimp.kernels.ops import LatentParams, LayerCache, Ops, StepInputs
from skimp.model.layers import Linear, RMSNorm
from skimp.model.spec import LatentAttentionSpec


def cache_spec(spec: LatentAttentionSpec, dtype: torch.dtype) -> CacheSpec:
    """The latent and the rotated key of one token, in ``dtype``."""
    return CacheSpec(
        kind="latent",
        bytes_per_token=spec.cached_dim * dtype.itemsize,
        dtype=str(dtype).removeprefix("torch."),
        shape=(spec.latent_dim, spec.rope_dim),
    )


class LatentAttention(nn.Module):
    def __init__(self, spec: LatentAttentionSpec, hidden_size: int) -> None:
        super().__init__()
        self.spec = spec
        shapes = spec.matrices(hidden_size)

        def linear(name: str, bias: bool = False) -> Linear:
            return Linear(*shapes[name], bias=bias)

        self.q_a_norm: RMSNorm | None = None
        if spec.query_latent_dim is None:
            self.q_proj = linear("q_proj")
        else:
            self.q_a_proj = linear("q_a_proj", spec.in_bias)
            self.q_a_norm = RMSNorm(spec.query_latent_dim, eps=spec.latent_eps)
            self.q_b_proj = linear("q_b_proj")
        self.kv_a_proj = linear("kv_a_proj", spec.in_bias)
        self.kv_a_norm = RMSNorm(spec.latent_dim, eps=spec.latent_eps)
        self.kv_b_proj = linear("kv_b_proj")
        self.o_proj = linear("o_proj", spec.out_bias)

    def bind(self, ops: Ops, rope: tuple[Tensor, Tensor] | None, cache: LayerCache | None) -> None:
        """Hand the weights to a backend and fix where this layer's cache lies."""
        first = self.q_proj if self.q_a_norm is None else self.q_a_proj
        self._down: Any = ops.pack((first, self.kv_a_proj))
        self._queries: Any = None if self.q_a_norm is None else ops.pack((self.q_b_proj,))
        self._heads: Any = ops.pack_latent(self.kv_b_proj, self.spec)
        self._out: Any = ops.pack((self.o_proj,))
        self._params = LatentParams(
            spec=self.spec, latent_norm=self.kv_a_norm, rope=rope, cache=cache
        )

    def mix(self, x_RD: Tensor, norm: RMSNorm, ops: Ops, step: StepInputs) -> Tensor:
        """[R, out_dim]: what enters the output projection."""
        down = ops.matmul(x_RD, self._down, norm=norm)
        queries, latents = down.split(
            (down.shape[1] - self.spec.cached_dim, self.spec.cached_dim), dim=1
        )
        if self.q_a_norm is not None:
            queries = ops.matmul(queries, self._queries, norm=self.q_a_norm)
        return ops.latent_attention(queries, latents, self._heads, self._params, step)

    @property
    def out(self) -> Any:
        """The output projection as the backend holds it."""
        return self._out
