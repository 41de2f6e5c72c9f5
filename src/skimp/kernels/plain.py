"""The plain backend: every kernel in PyTorch, on any device, as the reference for the others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from skimp.cache.formats import hadamard
from skimp.formats.weight import QuantizedWeight
from skimp.kernels import cache_rows, latent
from skimp.kernels.cache_rows import CachedRows
from skimp.kernels.experts import route
from skimp.kernels.latent import LatentHeads
from skimp.kernels.lowbit import lowbit_linear
from skimp.kernels.ops import (
    AttentionParams,
    ExpertParams,
    LatentParams,
    LayerCache,
    PackLayout,
    StepInputs,
)
from skimp.kernels.whole import attend_whole
from skimp.model.layers import FusedExperts, Linear, RMSNorm, stacked_bias
from skimp.model.spec import (
    Activation,
    ClampedSwiGLU,
    ExpertsSpec,
    LatentAttentionSpec,
    RopeSpec,
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
KEY_BLOCK = 64  # keys per block where the order of summation must not depend on the step


@dataclass
class PlainMatrix:
    """Several Linears that share their input; a serving copy is fused, a training one is not."""

    linears: tuple[Linear, ...]
    dtype: torch.dtype  # of the rows it multiplies
    fused: Tensor | None = None  # [sum of out_features, in_features], or oneDNN's own layout
    bias: Tensor | None = None
    onednn: bool = False
    parts: tuple[Tensor | QuantizedWeight, ...] = ()  # a serving copy with low-bit matrices in it


@dataclass
class PlainExperts:
    """``each``: an expert's gate and up, and down. None for fused ones that are trained, whose
    matrices are taken out of ``fused`` at each use."""

    spec: ExpertsSpec
    router: PlainMatrix
    correction: Tensor | None
    each: list[tuple[PlainMatrix, PlainMatrix]] | None
    fused: FusedExperts | None = None


def gated(y: Tensor, activation: Activation | ClampedSwiGLU) -> Tensor:
    """What enters the last product of a feed-forward network, of gate and up side by side."""
    gate, up = y.chunk(2, dim=-1)
    if isinstance(activation, ClampedSwiGLU):
        gate = gate.clamp(max=activation.limit)
        up = up.clamp(-activation.limit, activation.limit)
        return (up + 1) * gate * torch.sigmoid(activation.alpha * gate)
    return ACTIVATIONS[activation](gate) * up


def rms_norm(x: Tensor, norm: RMSNorm) -> Tensor:
    """Float32 in, float32 out; the mean is over the last axis."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.factor()


def apply_rope(x_RHK: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate the first ``2 * cos.shape[-1]`` dims of each head; cos and sin are [R, dims / 2]."""
    dims = 2 * cos.shape[-1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    rotated, rest = x_RHK[..., :dims], x_RHK[..., dims:]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = rotated.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


class PlainOps:
    """``serving`` fuses and takes over the weights (no autograd); ``deterministic`` makes a row's
    result independent of the other rows by giving every product a fixed shape, slowly. ``dtype``
    is that of rows before low-bit matrices (dense ones multiply in their own): float32 if None."""

    def __init__(
        self,
        *,
        serving: bool = False,
        deterministic: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.serving = serving
        self.deterministic = deterministic
        self.dtype = dtype or torch.float32

    # ---- matrices -------------------------------------------------------------------------

    def pack(self, linears: Sequence[Linear], layout: PackLayout = "stack") -> PlainMatrix:
        low_bits = any(linear.quantized is not None for linear in linears)
        matrix = PlainMatrix(tuple(linears), self.dtype if low_bits else _weight(linears[0]).dtype)
        if not self.serving:
            return matrix
        matrix.bias = stacked_bias(linears)
        if low_bits:
            matrix.parts = tuple(linear.take() for linear in linears)
            return matrix
        with torch.no_grad():
            weights = [_weight(linear).detach() for linear in linears]
            self._hold(matrix, torch.cat(weights) if len(weights) > 1 else weights[0], layout)
        if layout != "table":
            for linear in linears:
                linear.weight = None
        return matrix

    def _hold(self, matrix: PlainMatrix, weight: Tensor, layout: PackLayout = "stack") -> None:
        """Make ``weight`` [N, K] the serving copy."""
        if self._prepacks(weight, layout):
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
            matrix.onednn = True
        matrix.fused = weight

    def _prepacks(self, weight: Tensor, layout: PackLayout) -> bool:
        # float32 products stay with F.linear, which already reads row-major weights at full rate.
        return (
            weight.device.type == "cpu"
            and weight.dtype == torch.bfloat16
            and layout != "table"
            and not self.deterministic
            and torch.backends.mkldnn.is_available()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )

    def _product(self, x: Tensor, matrix: PlainMatrix) -> Tensor:
        if matrix.parts:
            y = _beside([self._one(x, weight, None) for weight in matrix.parts])
            return y if matrix.bias is None else y + matrix.bias.to(y.dtype)
        if matrix.fused is None:
            return _beside([self._one(x, _held(m), m.bias) for m in matrix.linears])
        if matrix.onednn:
            z: Tensor = torch.ops.mkldnn._linear_pointwise(
                x, matrix.fused, matrix.bias, "none", [], ""
            )
            return z
        if self.deterministic:
            rows = [F.linear(row, matrix.fused, matrix.bias) for row in x.split(1)]
            return torch.cat(rows) if rows else F.linear(x, matrix.fused, matrix.bias)
        return F.linear(x, matrix.fused, matrix.bias)

    def _one(self, x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None) -> Tensor:
        if isinstance(weight, QuantizedWeight):
            y = lowbit_linear(x, weight, split_rows=self.deterministic)
            return y if bias is None else y + bias.to(y.dtype)
        return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)

    def _gated(self, y: Tensor, activation: Activation | ClampedSwiGLU) -> Tensor:
        return _below([gated(part, activation) for part in self._apart(y)])

    def _apart(self, x: Tensor) -> tuple[Tensor, ...]:
        """Row by row if deterministic: exponentials of the last few numbers of a tensor are
        computed otherwise than those of whole vectors, and differ in a bit."""
        return x.split(1) if self.deterministic and len(x) else (x,)

    def embed(self, step: StepInputs, table: PlainMatrix, scale: float) -> Tensor:
        weight: Tensor | QuantizedWeight
        if table.fused is not None:
            weight = table.fused
        else:
            weight = table.parts[0] if table.parts else _held(table.linears[0])
        if isinstance(weight, QuantizedWeight):
            x = weight.rows(step.token_ids.to(torch.int64)).dequantize()
        else:
            x = F.embedding(step.token_ids, weight).float()
        return x * scale if scale != 1.0 else x

    def matmul(
        self,
        x: Tensor,
        matrix: PlainMatrix,
        *,
        norm: RMSNorm | None = None,
        activation: Activation | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        if norm is not None:
            x = rms_norm(x, norm)
        y = self._product(x.to(matrix.dtype), matrix)
        if activation is not None:
            y = gated(y, activation)
        return y if residual is None else residual + y.float()

    def add_norm(self, x: Tensor, y: Tensor, norm: RMSNorm) -> Tensor:
        return x + rms_norm(y, norm)

    def add_scaled(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        return x + scale * y.float()

    def logits(
        self,
        x: Tensor,
        matrix: PlainMatrix,
        norm: RMSNorm,
        softcap: float | None,
        step: StepInputs,
        *,
        scale: float = 1.0,
    ) -> Tensor:
        rows = x.index_select(0, step.logit_rows.to(torch.int64))
        y = self.matmul(rows, matrix, norm=norm).float()
        if scale != 1.0:
            y = y * scale
        return y if softcap is None else softcap * torch.tanh(y / softcap)

    # ---- experts --------------------------------------------------------------------------

    def pack_experts(self, params: ExpertParams) -> PlainExperts:
        experts, router = params.experts, params.router
        held = PlainMatrix((router,), torch.float32)
        if self.serving:
            weight = router.take()
            held.bias = None if router.bias is None else router.bias.detach().float()
            if isinstance(weight, QuantizedWeight):
                held.parts = (weight,)
            else:
                held.fused = weight.float()
        packed = PlainExperts(params.spec, held, params.correction, None)
        if not isinstance(experts, FusedExperts):
            packed.each = [
                (self.pack((gate, up), "gated"), self.pack((down,))) for gate, up, down in experts
            ]
        elif not self.serving:
            packed.fused = experts
        else:
            with torch.no_grad():
                packed.each = [
                    (self._held_copy(*experts.gate_up(i)), self._held_copy(*experts.down(i)))
                    for i in range(params.spec.num_experts)
                ]
            experts.release()
        return packed

    def _held_copy(self, weight: Tensor, bias: Tensor | None) -> PlainMatrix:
        matrix = PlainMatrix((), weight.dtype, bias=bias)
        self._hold(matrix, weight.contiguous())
        return matrix

    def experts(self, x: Tensor, experts: PlainExperts, norm: RMSNorm) -> Tensor:
        rows, spec = rms_norm(x, norm), experts.spec
        logits = self._router_logits(rows, experts.router)
        routed = [route(part, spec, experts.correction) for part in self._apart(logits)]
        chosen, weights = (_below(parts) for parts in zip(*routed))
        out = torch.zeros_like(rows)
        for index in chosen.unique().tolist():  # ascending: the order of a row's sum
            at, place = (chosen == index).nonzero(as_tuple=True)
            y = self._expert(rows[at], experts, index)
            out.index_add_(0, at, weights[at, place, None] * y.float())
        return out

    def _router_logits(self, rows: Tensor, router: PlainMatrix) -> Tensor:
        """In float32 whatever the weights' dtype: small differences choose."""
        if self.serving or router.linears[0].quantized is not None:
            return self._product(rows, router)
        bias = router.linears[0].bias
        weight = _weight(router.linears[0]).float()
        return F.linear(rows, weight, None if bias is None else bias.float())

    def _expert(self, rows: Tensor, experts: PlainExperts, index: int) -> Tensor:
        activation = experts.spec.activation
        if experts.each is None:
            assert experts.fused is not None
            y = self._one(rows, *experts.fused.gate_up(index))
            return self._one(self._gated(y, activation), *experts.fused.down(index))
        first, last = experts.each[index]
        y = self._product(rows.to(first.dtype), first)
        return self._product(self._gated(y, activation).to(last.dtype), last)

    # ---- attention ------------------------------------------------------------------------

    def attention(self, qkv: Tensor, params: AttentionParams, step: StepInputs) -> Tensor:
        spec = params.spec
        dtype = qkv.dtype
        q, k, v = qkv.float().split((spec.q_dim, spec.kv_dim, spec.kv_dim), dim=-1)
        q = q.unflatten(-1, (spec.num_heads, spec.head_dim))
        k = k.unflatten(-1, (spec.num_kv_heads, spec.head_dim))
        v = v.unflatten(-1, (spec.num_kv_heads, spec.head_dim))
        if params.q_norm is not None and params.k_norm is not None:
            q, k = rms_norm(q, params.q_norm), rms_norm(k, params.k_norm)
        q, k = _rotated((q, k), spec.rope, params.rope, step)
        turned = False
        if step.arena is not None:
            assert params.cache is not None, "the decoder was bound without a cache"
            turned = params.cache.spec.hadamard
            if turned:
                q, k, v = hadamard(q), hadamard(k), hadamard(v)
            cache_rows.write((k, v), params.cache, step)
        k, v = k.to(dtype), v.to(dtype)
        plain = spec.softcap is None and params.sinks is None
        if plain and (starts := self._whole_starts(step)) is not None:
            whole = attend_whole(q.to(dtype), k, v, starts, scale=spec.scale, window=spec.window)
            return whole.flatten(1)
        out = torch.empty_like(q)
        for rows, seen in _sequences(k, v, params.cache, step):
            out[rows] = self._attend(q[rows], seen, rows, params, step)
        return (hadamard(out) if turned else out).flatten(1).to(dtype)

    def pack_latent(self, linear: Linear, spec: LatentAttentionSpec) -> LatentHeads | Linear:
        # While it may train, a matrix is taken apart where it is used, so that gradients reach it.
        return _latent_heads(linear.take(), spec) if self.serving else linear

    def latent_attention(
        self,
        queries: Tensor,
        latents: Tensor,
        heads: LatentHeads | Linear,
        params: LatentParams,
        step: StepInputs,
    ) -> Tensor:
        spec, dtype = params.spec, queries.dtype
        if isinstance(heads, Linear):
            heads = _latent_heads(_held(heads), spec)
        q = queries.float().unflatten(-1, (spec.num_heads, -1))
        nope, rotated = q.split((spec.nope_dim, spec.rope_dim), dim=-1)
        c, key = latents.float().split((spec.latent_dim, spec.rope_dim), dim=-1)
        c, key = rms_norm(c, params.latent_norm), key[:, None]
        rotated, key = _rotated((rotated, key), spec.rope, params.rope, step)
        cached = torch.cat((c[:, None], key), dim=-1)
        if step.arena is not None:
            assert params.cache is not None, "the decoder was bound without a cache"
            cache_rows.write((cached,), params.cache, step)
        cached = cached.to(dtype)
        if (starts := self._whole_starts(step)) is not None:
            query = torch.cat((nope, rotated), dim=-1).to(dtype)
            keys, values = latent.made_heads(cached[:, 0], heads, spec)
            mixed = attend_whole(query, keys, values, starts, scale=spec.scale, window=None)
            return mixed.flatten(1)
        out = q.new_empty(q.shape[0], spec.num_heads, spec.value_dim)
        for rows, seen in _sequences(cached, cached, params.cache, step):
            mask = seen.positions < step.kv_end[rows, None]
            part = nope[rows], rotated[rows], seen.keys[:, 0].float(), mask
            if self.deterministic:
                out[rows] = _latent_by_rows(*part, heads, spec)
            elif latent.expands(part[0].shape[0], spec):
                out[rows] = latent.expanded(*part, heads, spec)
            else:
                out[rows] = latent.absorbed(*part, heads, spec)
        return out.flatten(1).to(dtype)

    def _whole_starts(self, step: StepInputs) -> tuple[int, ...] | None:
        """``seq_starts`` of a step that PyTorch's own attention can compute: nothing cached, and
        each sequence whole and causal; None if it is not so. ``bounds.whole`` spares looking."""
        if self.deterministic or step.arena is not None:
            return None
        if step.bounds is not None and step.bounds.whole:
            return step.bounds.whole
        starts = step.seq_starts.to(torch.int64)
        count = starts.diff()
        own = torch.arange(len(step.positions), device=starts.device)
        own -= starts[:-1].repeat_interleave(count)
        whole = (step.positions == own).all() & (step.kv_end == own + 1).all()
        return tuple(starts.tolist()) if bool(whole) else None

    def _attend(
        self,
        q_RHK: Tensor,
        seen: CachedRows,
        rows: slice,
        params: AttentionParams,
        step: StepInputs,
    ) -> Tensor:
        """One sequence: R rows over T keys of G key-value heads; float32 [R, H, K]."""
        spec = params.spec
        mask = seen.positions < step.kv_end[rows, None]
        positions = step.positions[rows, None]
        if spec.window is not None:
            mask &= seen.positions > positions - spec.window
        if seen.recent is not None:
            assert params.cache is not None and params.cache.recent is not None
            horizon = params.cache.recent.spec.horizon
            assert horizon is not None
            mask &= (seen.positions > positions - horizon) == seen.recent
        group = spec.num_heads // spec.num_kv_heads
        keys = seen.keys.float().repeat_interleave(group, dim=1)
        values = seen.values.float().repeat_interleave(group, dim=1)
        sinks = params.sinks
        if self.deterministic:
            outs = [
                _row_by_blocks(q, keys, values, mask[i], spec.scale, spec.softcap, sinks)
                for i, q in enumerate(q_RHK)
            ]
            return torch.stack(outs)
        scores = torch.einsum("rhk,thk->hrt", q_RHK, keys) * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        scores = scores.masked_fill(~mask, -math.inf)
        if sinks is not None:
            sink = sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
            weights = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        return torch.einsum("hrt,thk->rhk", weights, values)


def _beside(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _below(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def _rotated(
    parts: tuple[Tensor, ...],
    rope: RopeSpec | None,
    tables: tuple[Tensor, Tensor] | None,
    step: StepInputs,
) -> tuple[Tensor, ...]:
    """Queries and keys [R, H, K] at the step's positions."""
    if rope is None or tables is None:
        return parts
    positions = step.positions.to(torch.int64)
    cos, sin = tables[0][positions], tables[1][positions]
    return tuple(apply_rope(x, cos, sin, interleaved=rope.interleaved) for x in parts)


def _held(linear: Linear) -> Tensor | QuantizedWeight:
    return _weight(linear) if linear.quantized is None else linear.quantized


def _weight(linear: Linear) -> Tensor:
    assert linear.weight is not None, "a backend has taken this weight"
    return linear.weight


def _sequences(
    k_RGK: Tensor, v_RGK: Tensor, cache: LayerCache | None, step: StepInputs
) -> Iterator[tuple[slice, CachedRows]]:
    """For each sequence of the step: its rows, and the keys and values that they may see."""
    starts = step.seq_starts.tolist()
    for first, last in itertools.pairwise(starts):
        rows = slice(first, last)
        if step.arena is None:
            seen = CachedRows(keys=k_RGK[rows], values=v_RGK[rows], positions=step.positions[rows])
            yield rows, seen
            continue
        assert cache is not None
        yield rows, cache_rows.read(cache, step, rows, KEY_BLOCK)


def _latent_heads(held: Tensor | QuantizedWeight, spec: LatentAttentionSpec) -> LatentHeads:
    weight = held.dequantize() if isinstance(held, QuantizedWeight) else held
    return latent.split_heads(weight, spec)


def _latent_by_rows(
    nope_RHN: Tensor,
    rotated_RHP: Tensor,
    cached_TC: Tensor,
    mask_RT: Tensor,
    heads: LatentHeads,
    spec: LatentAttentionSpec,
) -> Tensor:
    """Absorbed, each row by itself: its bits do not depend on the rows beside it."""
    keys = cached_TC[:, None].expand(-1, spec.num_heads, -1)
    values = keys[..., : spec.latent_dim]
    rows = []
    for nope, rotated, mask in zip(nope_RHN, rotated_RHP, mask_RT):
        query = torch.cat((latent.to_latent(nope[None], heads)[0], rotated), dim=-1)
        mixed = _row_by_blocks(query, keys, values, mask, spec.scale, None, None)
        rows.append(latent.from_latent(mixed[None], heads)[0])
    return torch.stack(rows)


def _row_by_blocks(
    q_HK: Tensor,
    keys_THK: Tensor,
    values_THK: Tensor,
    mask_T: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Online softmax (Milakov & Gimelshein 2018) over key blocks of one fixed shape."""
    heads = q_HK.shape[0]
    peak = torch.full((heads,), -math.inf) if sinks is None else sinks.float().clone()
    total = torch.zeros(heads) if sinks is None else torch.ones(heads)
    acc = torch.zeros(heads, values_THK.shape[-1])
    for start in range(0, keys_THK.shape[0], KEY_BLOCK):
        mask = mask_T[start : start + KEY_BLOCK]
        if not mask.any():
            continue
        pad = KEY_BLOCK - mask.shape[0]
        mask = F.pad(mask, (0, pad))
        keys = F.pad(keys_THK[start : start + KEY_BLOCK], (0, 0, 0, 0, 0, pad))
        values = F.pad(values_THK[start : start + KEY_BLOCK], (0, 0, 0, 0, 0, pad))
        scores = torch.einsum("hk,thk->ht", q_HK, keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~mask, -math.inf)
        new_peak = torch.maximum(peak, scores.amax(-1))
        shrink = torch.exp(peak - new_peak)
        weights = torch.exp(scores - new_peak[:, None])
        total = total * shrink + weights.sum(-1)
        acc = acc * shrink[:, None] + torch.einsum("ht,thk->hk", weights, values)
        peak = new_peak
    return acc / total[:, None]
