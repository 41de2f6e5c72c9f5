"""Captures a forward as a program of native ops; one call runs it for any number of rows."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from skimp.kernels.native import matrix as packed
from skimp.kernels.native import structs
from skimp.kernels.native.arguments import (
    address_of,
    angles_of,
    check_ints,
    check_rows,
    factor_of,
    pages_of,
)
from skimp.kernels.native.experts import PackedExperts, pack_experts
from skimp.kernels.native.latent import (
    EXPAND_ROWS,
    PackedLatent,
    groups_of_heads,
    pack_latent,
)
from skimp.kernels.native.library import library
from skimp.kernels.native.matrix import PackedMatrix, PackedStack
from skimp.kernels.native.memory import PanelMemory
from skimp.kernels.native.workspace import Workspace
from skimp.kernels.ops import (
    AttentionParams,
    ExpertParams,
    LatentParams,
    LayerCache,
    PackLayout,
    StepInputs,
)
from skimp.model.layers import Linear, RMSNorm
from skimp.model.spec import Activation, ClampedSwiGLU, LatentAttentionSpec, ModelSpec


class Program:
    """Ops in order, with everything they point to. Run it from any thread, one at a time."""

    def __init__(self, *, max_rows: int, max_seqs: int, max_logits: int) -> None:
        self.max_rows, self.max_seqs, self.max_logits = max_rows, max_seqs, max_logits
        self.workspace = Workspace()
        self.ops: list[ctypes.Structure] = []
        self._alive: list[Any] = []
        self._scratch: Tensor | None = None
        self._scratch_users: list[structs.MatmulOp] = []
        self._pointers: ctypes.Array[ctypes.c_void_p] | None = None
        self._address = 0
        self._run = library().run

    def append(self, op: ctypes.Structure, *alive: Any) -> None:
        assert self._pointers is None, "the program is already finished"
        self.ops.append(op)
        self._alive.extend(alive)

    def finish(self) -> None:
        """Fix the array of pointers; called once, at the end of the capture."""
        self._pointers = (ctypes.c_void_p * len(self.ops))(*map(ctypes.addressof, self.ops))
        self._address = ctypes.addressof(self._pointers)

    def run(
        self,
        rows: int,
        num_seqs: int = 1,
        num_logits: int = 0,
        threads: int = 0,
        deterministic: bool = False,
    ) -> None:
        """Run over the first ``rows`` rows of the input buffers, on ``threads`` (0: default).

        ``deterministic`` makes bfloat16 results of a row independent of the number of rows;
        float32 ones always are.
        """
        if not (
            0 <= rows <= self.max_rows
            and 0 <= num_seqs <= self.max_seqs
            and 0 <= num_logits <= self.max_logits
        ):
            raise ValueError(
                f"a step of {rows} rows, {num_seqs} sequences and {num_logits} logits exceeds the "
                f"program's {self.max_rows}, {self.max_seqs} and {self.max_logits}"
            )
        assert self._pointers is not None, "the program is still being captured"
        self._run(self._address, len(self.ops), rows, num_seqs, num_logits, threads, deterministic)

    def external(self, *tensors: Tensor) -> list[Tensor]:
        """Those the program must keep alive. Keeping the workspace's own would stop its reuse."""
        return [tensor for tensor in tensors if not self.workspace.owns(tensor)]

    def shared_scratch(self, op: structs.MatmulOp, nbytes: int) -> None:
        """Give ``op`` scratch that all matrix products of the program share."""
        if self._scratch is None or self._scratch.numel() < nbytes:
            self._scratch = torch.empty(nbytes + 64, dtype=torch.uint8)
        self._scratch_users.append(op)
        address = self._scratch.data_ptr()
        for user in self._scratch_users:
            user.x_scratch = address + -address % 64


class NativeOps:
    """The :class:`~skimp.kernels.ops.Ops` that captures. Calls outside ``capture`` are errors.

    Results are buffers of the program: of ``max_rows`` rows (logits: ``max_logits``), valid from
    one run to the next for as long as someone holds them. ``matmul`` with a residual and
    ``add_norm`` work in place. Products are float32, except gated ones and attention's output,
    which are in the weights' dtype, ready for the next product. Of low-bit weights that is the
    dtype they came to be computed in: the ops', or else that of the norm or the rows before them.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        """``dtype`` of packed dense weights: float32 or bfloat16; None: as the checkpoint has
        them, float16 as float32."""
        library()
        if dtype is not None and dtype not in structs.DTYPES:
            raise ValueError(f"native kernels hold float32 or bfloat16 weights, not {dtype}")
        self.dtype = dtype
        self._memory = PanelMemory()
        self._program: Program | None = None

    @contextmanager
    def capture(self, max_rows: int, max_seqs: int, max_logits: int) -> Iterator[Program]:
        """Append the calls made inside to a new program."""
        assert self._program is None, "captures do not nest"
        program = self._program = Program(
            max_rows=max_rows, max_seqs=max_seqs, max_logits=max_logits
        )
        try:
            yield program
            program.finish()
        finally:
            self._program = None

    @property
    def program(self) -> Program:
        assert self._program is not None, "NativeOps runs only inside capture()"
        return self._program

    def pack(
        self, linears: Sequence[Linear], layout: PackLayout = "stack"
    ) -> PackedMatrix | PackedStack:
        return packed.pack(linears, layout, self.dtype, self._memory)

    def embed(self, step: StepInputs, table: PackedMatrix, scale: float) -> Tensor:
        program = self.program
        out = program.workspace.empty(program.max_rows, table.in_features, torch.float32)
        check_ints(step.token_ids, program.max_rows, "token_ids")
        op = structs.EmbedOp(
            head=structs.OpHeader(structs.EMBED, structs.DTYPES.get(table.dtype, structs.F32)),
            ids=step.token_ids.data_ptr(),
            table=table.panels.data_ptr(),
            out=out.data_ptr(),
            out_stride=out.stride(0),
            dim=table.in_features,
            panels=1,
            scale=scale,
            low=table.low_struct,
        )
        program.append(op, step.token_ids, table)
        return out

    def matmul(
        self,
        x: Tensor,
        matrix: PackedMatrix | PackedStack,
        *,
        norm: RMSNorm | None = None,
        activation: Activation | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        program = self.program
        dtype = torch.float32
        if activation is not None:
            dtype = self._compute_dtype(matrix.parts[0], x, norm)
        if residual is not None:
            out = residual
        else:
            out = program.workspace.empty(program.max_rows, matrix.out_features, dtype)
        first = 0
        for part in matrix.parts:
            columns = slice(first, first + part.out_features)
            added = None if residual is None else residual[:, columns]
            self._product(
                x, part, out[:, columns], norm=norm, activation=activation, residual=added
            )
            first = columns.stop
        return out

    def _compute_dtype(self, matrix: PackedMatrix, x: Tensor, norm: RMSNorm | None) -> torch.dtype:
        if matrix.low is None:
            return matrix.dtype
        dtype = self.dtype or (x.dtype if norm is None else norm.weight.dtype)
        return dtype if dtype in structs.DTYPES else torch.float32

    def logits(
        self,
        x: Tensor,
        matrix: PackedMatrix,
        norm: RMSNorm,
        softcap: float | None,
        step: StepInputs,
        *,
        scale: float = 1.0,
    ) -> Tensor:
        program = self.program
        out = program.workspace.empty(program.max_logits, matrix.out_features, torch.float32)
        check_ints(step.logit_rows, program.max_logits, "logit_rows")
        self._product(
            x, matrix, out, norm=norm, softcap=softcap, logit_rows=step.logit_rows, scale=scale
        )
        return out

    def _product(
        self,
        x: Tensor,
        matrix: PackedMatrix,
        out: Tensor,
        *,
        norm: RMSNorm | None = None,
        activation: Activation | None = None,
        residual: Tensor | None = None,
        softcap: float | None = None,
        logit_rows: Tensor | None = None,
        scale: float = 1.0,
    ) -> None:
        """``scale`` is that of normed rows without a bias, and joins the norm's factor."""
        program = self.program
        factor = factor_of(norm)
        if scale != 1.0:
            assert factor is not None and matrix.bias is None
            factor = factor * scale
        op = self._matmul_op(
            x,
            matrix,
            out,
            norm=norm,
            factor=factor,
            activation=activation,
            residual=residual,
            softcap=softcap,
            logit_rows=logit_rows,
        )
        program.append(op, matrix, factor, logit_rows, *program.external(x, out))

    def _matmul_op(
        self,
        x: Tensor,
        matrix: PackedMatrix,
        out: Tensor,
        *,
        norm: RMSNorm | None = None,
        factor: Tensor | None = None,
        activation: Activation | ClampedSwiGLU | None = None,
        residual: Tensor | None = None,
        softcap: float | None = None,
        logit_rows: Tensor | None = None,
    ) -> structs.MatmulOp:
        """``factor`` is that of ``norm``; the caller keeps it, and what else is pointed to."""
        program = self.program
        if (activation is not None) != matrix.gated:
            raise ValueError("an activation needs a gated matrix, and a gated matrix an activation")
        assert norm is None or x.dtype == torch.float32, "only float32 rows are normed"
        assert residual is None or residual.dtype == torch.float32
        check_rows(x, matrix.in_features)
        check_rows(out, matrix.out_features)
        alpha = limit = 0.0
        if isinstance(activation, ClampedSwiGLU):
            kind, alpha, limit = structs.CLAMPED, activation.alpha, activation.limit
        else:
            kind = structs.ACTIVATIONS[activation]
        op = structs.MatmulOp(
            head=structs.OpHeader(
                structs.MATMUL, structs.DTYPES[self._compute_dtype(matrix, x, norm)]
            ),
            x=x.data_ptr(),
            norm_factor=address_of(factor),
            row_index=address_of(logit_rows),
            panels=matrix.panels.data_ptr(),
            bias=address_of(matrix.bias),
            residual=address_of(residual),
            out=out.data_ptr(),
            x_stride=x.stride(0),
            residual_stride=0 if residual is None else residual.stride(0),
            out_stride=out.stride(0),
            x_dtype=structs.DTYPES[x.dtype],
            out_dtype=structs.DTYPES[out.dtype],
            k=matrix.in_features,
            n=matrix.out_features,
            num_panels=matrix.num_panels,
            activation=kind,
            count=0 if logit_rows is None else 1,
            norm_eps=0.0 if norm is None else norm.eps,
            softcap=softcap or 0.0,
            act_alpha=alpha,
            act_limit=limit,
            low=matrix.low_struct,
        )
        rows = program.max_rows if logit_rows is None else program.max_logits
        program.shared_scratch(op, rows * (5 * matrix.in_features + 512))
        return op

    def add_norm(self, x: Tensor, y: Tensor, norm: RMSNorm) -> Tensor:
        program = self.program
        check_rows(x, y.shape[1])
        factor = norm.factor().detach().contiguous()
        op = structs.NormOp(
            head=structs.OpHeader(structs.NORM, structs.F32),
            x=x.data_ptr(),
            y=y.data_ptr(),
            factor=factor.data_ptr(),
            out=x.data_ptr(),
            x_stride=x.stride(0),
            y_stride=y.stride(0),
            out_stride=x.stride(0),
            dim=x.shape[1],
            eps=norm.eps,
        )
        program.append(op, factor, *program.external(x, y))
        return x

    def add_scaled(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        program = self.program
        check_rows(x, y.shape[1])
        assert x.dtype == y.dtype == torch.float32
        op = structs.AddOp(
            head=structs.OpHeader(structs.ADD, structs.F32),
            x=x.data_ptr(),
            y=y.data_ptr(),
            x_stride=x.stride(0),
            y_stride=y.stride(0),
            dim=x.shape[1],
            scale=scale,
        )
        program.append(op, *program.external(x, y))
        return x

    def pack_experts(self, params: ExpertParams) -> PackedExperts:
        return pack_experts(params, self.dtype, self._memory)

    def experts(self, x: Tensor, experts: PackedExperts, norm: RMSNorm) -> Tensor:
        program, spec = self.program, experts.spec
        count, k = spec.num_experts, spec.experts_per_token
        empty = program.workspace.empty
        logits = empty(program.max_rows, count, torch.float32)
        self._product(x, experts.router, logits, norm=norm)
        first, last = experts.each[0]
        dtype = self._compute_dtype(first, x, norm)
        h = empty(program.max_rows * k, first.out_features, dtype)
        y = empty(program.max_rows * k, last.out_features, torch.float32)
        out = empty(program.max_rows, last.out_features, torch.float32)
        factor = factor_of(norm)
        matrices: list[structs.MatmulOp] = [
            self._matmul_op(x, up, h, norm=norm, factor=factor, activation=spec.activation)
            for up, _ in experts.each
        ]
        matrices += [self._matmul_op(h, down, y) for _, down in experts.each]
        pointers = (ctypes.c_void_p * (2 * count))(*map(ctypes.addressof, matrices))
        pairs = torch.empty(3, program.max_rows * k, dtype=torch.int32)
        weights = torch.empty(program.max_rows * k)
        starts = torch.empty(count + 1, dtype=torch.int32)
        router = spec.router
        op = structs.ExpertsOp(
            head=structs.OpHeader(structs.EXPERTS, structs.F32),
            logits=logits.data_ptr(),
            correction=address_of(experts.correction),
            gate_up=ctypes.addressof(pointers),
            down=ctypes.addressof(pointers) + count * ctypes.sizeof(ctypes.c_void_p),
            y=y.data_ptr(),
            out=out.data_ptr(),
            chosen=pairs[0].data_ptr(),
            weights=weights.data_ptr(),
            places=pairs[1].data_ptr(),
            sources=pairs[2].data_ptr(),
            starts=starts.data_ptr(),
            logits_stride=logits.stride(0),
            y_stride=y.stride(0),
            out_stride=out.stride(0),
            num_experts=count,
            per_token=k,
            dim=last.out_features,
            sigmoid=router.scoring == "sigmoid",
            groups=router.groups,
            groups_chosen=router.groups_chosen,
            top2=router.group_score == "top2",
            normalize=router.normalize,
            normalize_eps=router.normalize_eps,
            scale=router.scale,
        )
        held = (experts, factor, matrices, pointers, pairs, weights, starts)
        program.append(op, held, *program.external(x))
        return out

    def pack_latent(self, linear: Linear, spec: LatentAttentionSpec) -> PackedLatent:
        return pack_latent(linear, spec, self.dtype, self._memory)

    def latent_attention(
        self,
        queries: Tensor,
        latents: Tensor,
        heads: PackedLatent,
        params: LatentParams,
        step: StepInputs,
    ) -> Tensor:
        program, spec = self.program, params.spec
        dtype, meta, pages = self._rows_and_pages(params.cache, step)
        assert queries.dtype == latents.dtype == torch.float32
        check_rows(queries, spec.query_dim)
        check_rows(latents, spec.cached_dim)
        empty = program.workspace.empty
        absorbed = empty(program.max_rows, spec.num_heads * spec.cached_dim, torch.float32)
        mixed = empty(program.max_rows, spec.num_heads * spec.latent_dim, dtype)
        out = empty(program.max_rows, spec.out_dim, dtype)
        expanding = heads.expanding
        if expanding is not None and expanding.dtype != dtype:
            expanding = None  # latents are multiplied as they are cached
        sizes = structs.LatentSizes(
            latent_dim=spec.latent_dim,
            rope_dim=spec.rope_dim,
            nope_dim=spec.nope_dim,
            value_dim=spec.value_dim,
            expand_rows=0 if expanding is None else EXPAND_ROWS,
        )
        norm, (cos, sin) = factor_of(params.latent_norm), angles_of(params.rope)
        append = structs.LatentAppendOp(
            head=structs.OpHeader(structs.LATENT_APPEND, structs.DTYPES[dtype]),
            meta=meta,
            cache=pages,
            queries=queries.data_ptr(),
            q_stride=queries.stride(0),
            absorbed=absorbed.data_ptr(),
            absorbed_stride=absorbed.stride(0),
            latents=latents.data_ptr(),
            latents_stride=latents.stride(0),
            norm=address_of(norm),
            cos=address_of(cos),
            sin=address_of(sin),
            norm_eps=params.latent_norm.eps,
            num_heads=spec.num_heads,
            rotary_dim=0 if cos is None else 2 * cos.shape[1],
            interleaved=spec.rope is not None and spec.rope.interleaved,
            sizes=sizes,
        )
        program.append(append, step, norm, cos, sin, *program.external(queries, latents))

        def products(x: Tensor, x_step: int, matrix: PackedMatrix, y: Tensor, y_step: int) -> None:
            first = x[:, : matrix.in_features], matrix, y[:, : matrix.out_features]
            product = self._matmul_op(*first)
            op = structs.HeadProductsOp(
                head=structs.OpHeader(structs.HEAD_PRODUCTS, structs.DTYPES[dtype]),
                meta=meta,
                product=ctypes.addressof(product),
                x_step=x_step,
                out_step=y_step,
                num_heads=spec.num_heads,
                sizes=sizes,
            )
            program.append(op, product, matrix)

        def attend(q: Tensor, result: Tensor, **form: Any) -> None:
            op = structs.AttendOp(
                head=structs.OpHeader(structs.ATTEND, structs.DTYPES[dtype]),
                meta=meta,
                cache=pages,
                q=q.data_ptr(),
                q_stride=q.stride(0),
                out=result.data_ptr(),
                out_stride=result.stride(0),
                scale=spec.scale,
                num_heads=spec.num_heads,
                sizes=sizes,
                **form,
            )
            program.append(op, heads)

        query_dim = spec.nope_dim + spec.rope_dim
        products(queries, query_dim, heads.to_latent, absorbed, spec.cached_dim)
        attend(
            absorbed,
            mixed,
            latent=structs.ABSORBED,
            num_kv_heads=groups_of_heads(spec),
            head_dim=spec.cached_dim,
        )
        products(mixed, spec.latent_dim, heads.from_latent, out, spec.value_dim)
        if expanding is not None:
            attend(
                queries,
                out,
                latent=structs.EXPANDED,
                num_kv_heads=spec.num_heads,
                head_dim=query_dim,
                made=expanding.data_ptr(),
            )
        return out

    def _rows_and_pages(
        self, cache: LayerCache | None, step: StepInputs
    ) -> tuple[torch.dtype, structs.RowMeta, structs.CachePages]:
        """Which rows attend, and what they see of a layer: its dtype and its pages."""
        if cache is None or step.arena is None:
            raise ValueError("the native backend needs a cache: bind the decoder with caches")
        dtype = getattr(torch, cache.spec.dtype)
        if dtype not in structs.DTYPES:
            raise ValueError(f"native kernels cache float32 or bfloat16, not {dtype}")
        for name in ("positions", "row_seq", "kv_end"):
            check_ints(getattr(step, name), self.program.max_rows, name)
        meta = structs.RowMeta(
            positions=step.positions.data_ptr(),
            row_seq=step.row_seq.data_ptr(),
            kv_end=step.kv_end.data_ptr(),
            arena=step.arena.data_ptr(),
        )
        assert step.arena.data_ptr() % 64 == 0
        return dtype, meta, pages_of(cache, step)

    def attention(self, qkv: Tensor, params: AttentionParams, step: StepInputs) -> Tensor:
        program = self.program
        spec, cache = params.spec, params.cache
        dtype, meta, pages = self._rows_and_pages(cache, step)
        assert cache is not None and qkv.dtype == torch.float32
        check_rows(qkv, spec.q_dim + 2 * spec.kv_dim)
        recent = pages_of(cache.recent, step)
        q_norm, k_norm = factor_of(params.q_norm), factor_of(params.k_norm)
        cos, sin = angles_of(params.rope)
        rope = structs.RopeAppendOp(
            head=structs.OpHeader(structs.ROPE_APPEND, structs.DTYPES[dtype]),
            meta=meta,
            cache=pages,
            recent=recent,
            qkv=qkv.data_ptr(),
            qkv_stride=qkv.stride(0),
            q_norm=address_of(q_norm),
            k_norm=address_of(k_norm),
            cos=address_of(cos),
            sin=address_of(sin),
            norm_eps=params.q_norm.eps if params.q_norm is not None else params.norm_eps,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            rotary_dim=0 if cos is None else 2 * cos.shape[1],
            interleaved=spec.rope is not None and spec.rope.interleaved,
            hadamard=cache.spec.hadamard,
        )
        program.append(rope, step, q_norm, k_norm, cos, sin, *program.external(qkv))
        out = program.workspace.empty(program.max_rows, spec.q_dim, dtype)
        sinks = None if params.sinks is None else params.sinks.detach().float().contiguous()
        attend = structs.AttendOp(
            head=structs.OpHeader(structs.ATTEND, structs.DTYPES[dtype]),
            meta=meta,
            cache=pages,
            recent=recent,
            q=qkv.data_ptr(),
            q_stride=qkv.stride(0),
            out=out.data_ptr(),
            out_stride=out.stride(0),
            sinks=address_of(sinks),
            scale=spec.scale,
            softcap=spec.softcap or 0.0,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            window=spec.window or 0,
            recent_tokens=0 if cache.recent is None else cache.recent.spec.horizon,
            hadamard=cache.spec.hadamard,
        )
        program.append(attend, sinks)
        return out


def lacks(spec: ModelSpec) -> str | None:
    """What of a model these kernels do not compute, in words; None if they serve all of it."""
    if any(name.endswith(".ffn.router") for name in spec.formats):
        return "routers in low-bit formats"
    return None
