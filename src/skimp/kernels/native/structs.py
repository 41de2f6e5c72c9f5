"""ctypes mirrors of the op structs in ``src/op.h``; a test compares their sizes."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch

F32, BF16 = 0, 1
EMBED, NORM, MATMUL, ROPE_APPEND, ATTEND, PACK, EXPERTS, ADD = 1, 2, 3, 4, 5, 6, 7, 8
LATENT_APPEND, HEAD_PRODUCTS = 9, 10
ABSORBED, EXPANDED = 1, 2  # forms of latent attention; 0: attention to heads
PANEL = 16  # outputs to a panel of packed weights
K_ALIGN = 32  # inputs of bfloat16 panels are padded to a multiple of this
LOW_ALIGN = 8  # and those of low-bit panels to a multiple of this
INT4, INT8, FP8 = 1, 2, 3  # kinds of low-bit panels; 0: dense

DTYPES = {torch.float32: F32, torch.bfloat16: BF16}
SOURCE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LOW_KINDS = {("int", 4): INT4, ("int", 8): INT8, ("float", 8): FP8}
CACHE_FORMATS = {None: 0, "int8": 1, "fp8": 2, "int4": 3}
ROUNDINGS = {None: 0, "int8": 1, "fp8": 2}
ACTIVATIONS = {None: 0, "silu": 1, "gelu_tanh": 2, "gelu": 3}
CLAMPED = 4  # beside those


def _fields(*groups: tuple[Any, str]) -> list[tuple[str, Any]]:
    return [(name, ctype) for ctype, names in groups for name in names.split()]


class OpHeader(ctypes.Structure):
    _fields_ = _fields((c_int32, "kind dtype"))


class RowMeta(ctypes.Structure):
    _fields_ = _fields(
        (c_void_p, "positions row_seq kv_end arena"),
    )


class CachePages(ctypes.Structure):
    _fields_ = _fields(
        (c_void_p, "block_table"),
        (c_int64, "table_stride layer_offset"),
        (c_int32, "format page_tokens"),
    )


class LowBit(ctypes.Structure):
    _fields_ = _fields(
        (c_void_p, "scales zeros"),
        (c_int32, "kind rounding scale_dtype group groups"),
    )


class EmbedOp(ctypes.Structure):
    _fields_ = _fields(
        (OpHeader, "head"),
        (c_void_p, "ids table out"),
        (c_int64, "table_stride out_stride"),
        (c_int32, "dim panels"),
        (c_float, "scale"),
        (LowBit, "low"),
    )


class NormOp(ctypes.Structure):
    _fields_ = _fields(
        (OpHeader, "head"),
        (c_void_p, "x y factor out"),
        (c_int64, "x_stride y_stride out_stride"),
        (c_int32, "dim"),
        (c_float, "eps"),
    )


class MatmulOp(ctypes.Structure):
    _fields_ = _fields(
        (OpHeader, "head"),
        (c_void_p, "x norm_factor row_index panels bias residual out x_scratch"),
        (c_int64, "x_stride residual_stride out_stride"),
        (c_int32, "x_dtype out_dtype k n num_panels activation count"),
        (c_float, "norm_eps softcap act_alpha act_limit"),
        (LowBit, "low"),
    )


class RopeAppendOp(ctypes.Structure):
    _fields_ = _fields(
        (OpHeader, "head"),
        (RowMeta, "meta"),
        (CachePages, "cache recent"),
        (c_void_p, "qkv"),
        (c_int64, "qkv_stride"),
        (c_void_p, "q_norm k_norm cos sin"),
        (c_float, "norm_eps"),
        (c_int32, "num_heads num_kv_heads head_dim rotary_dim interleaved hadamard"),
    )


class LatentSizes(ctypes.Structure):
    _fields_ = _fields((c_int32, "latent_dim rope_dim nope_dim value_dim expand_rows"))


class LatentAppendOp(ctypes.Structure):
    _fields_ = _fields(
        (OpHeader, "head"),
        (RowMeta, "meta"),
        (CachePages, "cache"),
        (c_void_p, "queries"),
        (c_int64, "q_stride"),
        (c_void_p, "absorbed"),
        (c_int64, "absorbed_stride"),
        (c_void_p, "latents"),
        (c_int64, "latents_stride"),
        (c_void_p, "norm cos sin"),
        (c_float, "norm_eps"),
        (c_int32, "num_heads rotary_dim interleaved"),
        (LatentSizes, "sizes"),
    )


class HeadProductsOp(ctypes.Structure):
    _fields_ = _fields(
        (OpHeader, "head"),
        (RowMeta, "meta"),
        (c_void_p, "product"),
        (c_int64, "x_step out_step"),
        (c_int32, "num_heads"),
        (LatentSizes, "sizes"),
    )


class AttendOp(ctypes.Structure):
    _fields_ = _fields(
        (OpHeader, "head"),
        (RowMeta, "meta"),
        (CachePages, "cache recent"),
        (c_void_p, "q"),
        (c_int64, "q_stride"),
        (c_void_p, "out"),
        (c_int64, "out_stride"),
        (c_void_p, "sinks"),
        (c_float, "scale softcap"),
        (c_int32, "num_heads num_kv_heads head_dim window recent_tokens hadamard latent"),
        (LatentSizes, "sizes"),
        (c_void_p, "made"),
    )


class PackOp(ctypes.Structure):
    _fields_ = _fields(
        (OpHeader, "head"),
        (c_void_p, "rows panels"),
        (c_int64, "row_stride"),
        (c_int32, "rows_dtype n k first layout unpack low_kind"),
    )


class ExpertsOp(ctypes.Structure):
    _fields_ = _fields(
        (OpHeader, "head"),
        (c_void_p, "logits correction gate_up down y out chosen weights places sources starts"),
        (c_int64, "logits_stride y_stride out_stride"),
        (c_int32, "num_experts per_token dim sigmoid groups groups_chosen top2 normalize"),
        (c_float, "normalize_eps scale"),
    )


class AddOp(ctypes.Structure):
    _fields_ = _fields(
        (OpHeader, "head"),
        (c_void_p, "x y"),
        (c_int64, "x_stride y_stride"),
        (c_int32, "dim"),
        (c_float, "scale"),
    )


OPS: dict[int, type[ctypes.Structure]] = {
    EMBED: EmbedOp,
    NORM: NormOp,
    MATMUL: MatmulOp,
    ROPE_APPEND: RopeAppendOp,
    ATTEND: AttendOp,
    PACK: PackOp,
    EXPERTS: ExpertsOp,
    ADD: AddOp,
    LATENT_APPEND: LatentAppendOp,
    HEAD_PRODUCTS: HeadProductsOp,
}
