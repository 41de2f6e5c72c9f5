"""Compile the attention of single rows over a low-bit cache for a Hopper GPU, which takes none, and
print its PTX.

python compile_attention.py int8|fp8|int4
"""

from __future__ import annotations

import sys
from typing import Any

import triton.language as tl
from hopper import write_ptx
from triton.compiler import ASTSource

from skimp.kernels.triton.attention_kernels import ONE_ROW, attention_kernel
from skimp.kernels.triton.cached_heads import KINDS

POINTERS = {
    "q_ptr": "*bf16",
    "out_ptr": "*bf16",
    "arena_ptr": "*u8",
    "scales_ptr": "*bf16",
    "table_ptr": "*i32",
    "positions_ptr": "*i32",
    "row_seq_ptr": "*i32",
    "kv_end_ptr": "*i32",
    "seq_starts_ptr": "*i32",
    "cos_ptr": "*fp32",
    "sin_ptr": "*fp32",
}
ABSENT = (
    "recent_ptr",
    "recent_table_ptr",
    "q_factor_ptr",
    "k_factor_ptr",
    "sinks_ptr",
    "partial_ptr",
    "level_ptr",
    "counter_ptr",
)
VARYING = ("rows", "num_seqs", "least_rows", "target")


def constants(kind: str) -> dict[str, Any]:
    heads, page, dim = 8, 16, 128
    codes = dim // 2 if kind == "int4" else dim
    return dict.fromkeys(ABSENT) | {
        "EPS": 1e-6,
        "H": 2 * heads,
        "G": heads,
        "D": dim,
        "DP": dim,
        "NORM": False,
        "ROTARY": dim,
        "INTERLEAVED": False,
        "TURN": kind == "int4",
        "ROOT": dim**-0.5,
        "KIND": KINDS[kind],
        "RECENT": 0,
        "PAGE": page,
        "ITEM": 2,
        "PLANE": heads * page * (codes + 2),
        "EXTRA": 0,
        "QK_SCALE": dim**-0.5,
        "CAP": 0.0,
        "WINDOW": 0,
        "SINKS": False,
        "DTYPE": tl.bfloat16,
        "NATIVE_FP8": True,
        "FUSED": True,
        "MODE": ONE_ROW,
        "TWO_PHASE": False,
        "WORDS": True,
        "ASM": True,
        "SPLITS": 1,
        "SPLITS_P": 1,
        "APART": False,
        "LEAST_BLOCKS": 2,
        "LONE_BLOCKS": 4,
        "ROWS_P": 0,
        "BLOCK_M": 16,
        "BLOCK_N": 128,
        "PDL": True,
    }


if __name__ == "__main__":
    write_ptx(
        attention_kernel,
        ASTSource,
        POINTERS,
        constants(sys.argv[1]),
        varying=VARYING,
        num_warps=4,
        num_stages=2,
    )
