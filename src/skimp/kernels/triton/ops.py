"""The Triton backend: the kernels of this package behind the interface that mixers call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from skimp.kernels.ops import (
    AttentionParams,
    ExpertParams,
    LatentParams,
    LayerCache,
    PackLayout,
    StepInputs,
)
from skimp.kernels.triton import linear as layers
from skimp.kernels.triton import rows
from skimp.kernels.triton.attention import AttentionPlan, paged_attention, plan_attention
from skimp.kernels.triton.experts import PackedExperts, mix_experts, pack_experts
from skimp.kernels.triton.latent import LatentPlan, latent_attention, plan_latent_attention
from skimp.kernels.triton.launch import use_pdl
from skimp.kernels.triton.linear import Matrix
from skimp.model.layers import Linear, RMSNorm, stacked_bias
from skimp.model.spec import Activation, LatentAttentionSpec, ModelSpec

PLANS_KEPT = 64
Plan = TypeVar("Plan", AttentionPlan, LatentPlan)


def lacks(spec: ModelSpec) -> str | None:
    """What of a model these kernels do not compute, in words; None if they serve all of it."""
    if any(".ffn.experts." in name for name in spec.formats):
        return "experts in low-bit formats"
    return None


class TritonOps:
    """``dtype`` is that of the rows before matrices, the residual stream is float32;
    ``deterministic`` gives a row the same bits whatever else is in its step."""

    def __init__(self, *, dtype: torch.dtype, deterministic: bool = False) -> None:
        self.dtype = dtype
        self.deterministic = deterministic
        self._factors: weakref.WeakKeyDictionary[RMSNorm, Tensor] = weakref.WeakKeyDictionary()
        self._kept: dict[tuple[object, ...], Any] = {}
        self._passing: dict[tuple[object, ...], Any] = {}

    def pack(self, linears: Sequence[Linear], layout: PackLayout = "stack") -> Matrix:
        bias = stacked_bias(linears)
        weights = [linear.take() for linear in linears]
        return layers.pack_matrix(weights, bias, gated=layout == "gated", dtype=self.dtype)

    def embed(self, step: StepInputs, table: Matrix, scale: float) -> Tensor:
        return layers.embed(step.token_ids, table, scale)

    def matmul(
        self,
        x: Tensor,
        matrix: Matrix,
        *,
        norm: RMSNorm | None = None,
        activation: Activation | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        return self._linear(x, matrix, norm, activation=activation, residual=residual)

    def _linear(
        self,
        x: Tensor,
        matrix: Matrix,
        norm: RMSNorm | None,
        *,
        activation: Activation | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        if norm is not None and x.dtype != torch.float32:
            x = x.float()
        return layers.linear(
            x,
            matrix,
            norm_factor=None if norm is None else self._factor(norm),
            eps=0.0 if norm is None else norm.eps,
            activation=activation,
            residual=residual,
            out_dtype=out_dtype,
            deterministic=self.deterministic,
            pdl=use_pdl(x.device),
        )

    def pack_experts(self, params: ExpertParams) -> PackedExperts:
        return pack_experts(params, self.dtype)

    def experts(self, x: Tensor, experts: PackedExperts, norm: RMSNorm) -> Tensor:
        return mix_experts(
            x,
            experts,
            self._factor(norm),
            norm.eps,
            deterministic=self.deterministic,
            pdl=use_pdl(x.device),
        )

    def add_norm(self, x: Tensor, y: Tensor, norm: RMSNorm) -> Tensor:
        return rows.add_norm(x, y, self._factor(norm), norm.eps)

    def add_scaled(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        return torch.add(x, y, alpha=scale)

    def pack_latent(self, linear: Linear, spec: LatentAttentionSpec) -> Tensor:
        held = linear.take()
        weight = held if isinstance(held, Tensor) else held.dequantize()
        return weight.to(self.dtype).unflatten(0, (spec.num_heads, -1)).contiguous()

    def latent_attention(
        self,
        queries: Tensor,
        latents: Tensor,
        heads: Tensor,
        params: LatentParams,
        step: StepInputs,
    ) -> Tensor:
        plan = self._latent_plan(params, step, queries)
        return latent_attention(queries, latents, heads, params, step, plan=plan)

    def attention(self, qkv: Tensor, params: AttentionParams, step: StepInputs) -> Tensor:
        plan = self._plan(params, step, qkv)
        return paged_attention(qkv, params, step, plan=plan)

    def logits(
        self,
        x: Tensor,
        matrix: Matrix,
        norm: RMSNorm,
        softcap: float | None,
        step: StepInputs,
        *,
        scale: float = 1.0,
    ) -> Tensor:
        if step.logit_rows.shape[0] != x.shape[0]:  # distinct and in order: else they are all rows
            x = x.index_select(0, step.logit_rows)
        y = self._linear(x, matrix, norm, out_dtype=torch.float32)
        if scale != 1.0:
            y = y * scale
        return y if softcap is None else softcap * torch.tanh(y / softcap)

    def _factor(self, norm: RMSNorm) -> Tensor:
        factor = self._factors.get(norm)
        if factor is None:
            factor = self._factors[norm] = norm.factor().detach().contiguous()
        return factor

    def _plan(self, params: AttentionParams, step: StepInputs, qkv: Tensor) -> AttentionPlan:
        assert params.cache is not None
        low_bit = params.cache.spec.format is not None

        def make(shape: dict[str, Any]) -> AttentionPlan:
            if low_bit:
                shape["whole"] = ()
            return plan_attention(params.spec, low_bit=low_bit, **shape)

        return self._planned((params.spec, low_bit), params.cache, step, qkv, make)

    def _latent_plan(self, params: LatentParams, step: StepInputs, queries: Tensor) -> LatentPlan:
        assert params.cache is not None

        def make(shape: dict[str, Any]) -> LatentPlan:
            return plan_latent_attention(params.spec, **shape)

        return self._planned((params.spec,), params.cache, step, queries, make)

    def _planned(
        self,
        kind: tuple[object, ...],
        cache: LayerCache,
        step: StepInputs,
        x: Tensor,
        make: Callable[[dict[str, Any]], Plan],
    ) -> Plan:
        """The plan of a kind of layer for steps of this shape, made once; those of graphs stay."""
        assert step.bounds is not None
        key = (*kind, x.shape[0], step.seq_starts.shape[0], step.bounds)
        plans: dict[tuple[object, ...], Any] = self._kept if step.bounds.captured else self._passing
        plan: Plan | None = plans.get(key)
        if plan is None:
            if len(self._passing) >= PLANS_KEPT:
                self._passing.clear()
            shape = {
                "num_seqs": step.seq_starts.shape[0] - 1,
                "rows": x.shape[0],
                "most_rows": step.bounds.rows,
                "context": step.bounds.context,
                "device": x.device,
                "dtype": getattr(torch, cache.spec.dtype),
                "deterministic": self.deterministic,
                "whole": step.bounds.whole,
            }
            plan = plans[key] = make(shape)
        return plan
