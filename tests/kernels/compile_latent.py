"""Compile the kernels of latent attention for a Hopper GPU, which takes none, and print their PTX.

python compile_latent.py [HEADS BLOCK_N WARPS STAGES PAGE]
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl
from compile_attention import ABSENT, POINTERS, VARYING, constants
from hopper import write_ptx
from triton.compiler import ASTSource

from skimp.kernels.triton.attention_kernels import ONE_ROW, attention_kernel
from skimp.kernels.triton.latent import ROWS_AT_ONCE, tile_of
from skimp.kernels.triton.latent_kernels import latent_rows_kernel, latent_values_kernel
from skimp.kernels.triton.shares import shares_kernel

LATENT, ROPE, NOPE, VALUE = 512, 64, 128, 128
SHARES = {"partial_ptr": "*fp32", "level_ptr": "*fp32"}


def write_attention(heads: int, block_n: int, warps: int, stages: int, page: int) -> None:
    absent = dict.fromkeys(name for name in ABSENT if name not in SHARES)
    own = {
        "H": heads,
        "G": 1,
        "D": LATENT,
        "DP": LATENT,
        "ROTARY": 0,
        "TURN": False,
        "KIND": 0,
        "EXTRA": ROPE,
        "PAGE": page,
        "PLANE": 0,
        "FUSED": False,
        "WORDS": False,
        "SPLITS": 32,
        "SPLITS_P": 32,
        "APART": True,
        "ROWS_P": 16,
        "BLOCK_M": max(16, triton.next_power_of_2(heads)),
        "BLOCK_N": block_n,
        "MODE": ONE_ROW,
        "DTYPE": tl.bfloat16,
    }
    plain = {name: v for name, v in constants("int8").items() if name not in SHARES}
    pointers = POINTERS | SHARES | {"arena_ptr": "*bf16"}
    unused = dict.fromkeys(("cos_ptr", "sin_ptr", "scales_ptr"))
    held = {name: kind for name, kind in pointers.items() if name not in unused}
    write_ptx(
        attention_kernel,
        ASTSource,
        held,
        plain | absent | unused | own,
        varying=VARYING,
        num_warps=warps,
        num_stages=stages,
    )


def write_others(expand: bool) -> None:
    shape = {"H": 32, "L": LATENT, "N": NOPE, "V": VALUE}
    rows = shape | {
        "EPS": 1e-6,
        "NP": NOPE,
        "P": ROPE,
        "PP": ROPE,
        "LP": LATENT,
        "ROTARY": ROPE,
        "INTERLEAVED": True,
        "PAGE": 16,
        "ITEM": 2,
        "EXPAND": expand,
        "BLOCK_R": 64,
        "BLOCK_L": 128,
        "STEP_R": ROWS_AT_ONCE,
        "PDL": True,
    }
    pointers = {
        **dict.fromkeys(("queries_ptr", "latents_ptr", "heads_ptr", "q_ptr", "arena_ptr"), "*bf16"),
        **dict.fromkeys(("table_ptr", "positions_ptr", "row_seq_ptr"), "*i32"),
        **dict.fromkeys(("factor_ptr", "cos_ptr", "sin_ptr"), "*fp32"),
    }
    if expand:
        pointers["cached_ptr"] = "*bf16"
    else:
        rows["cached_ptr"] = None
    write_ptx(latent_rows_kernel, ASTSource, pointers, rows, varying=("rows",), num_warps=4)
    pointers = {**dict.fromkeys(("mixed_ptr", "heads_ptr", "out_ptr"), "*bf16")}
    values = shape | {"BLOCK_R": 16, "BLOCK_V": 32, "BLOCK_L": 128, "PDL": True}
    write_ptx(
        latent_values_kernel,
        ASTSource,
        pointers | {"positions_ptr": "*i32"},
        values,
        varying=("rows",),
        num_warps=4,
        num_stages=4,
    )
    sizes = {"H": 32, "G": 1, "D": LATENT, "DP": LATENT, "SPLITS": 32, "SPLITS_P": 32}
    write_ptx(
        shares_kernel,
        ASTSource,
        SHARES | {"out_ptr": "*bf16", "positions_ptr": "*i32"},
        sizes | {"BLOCK_M": 32, "PDL": True},
        varying=("rows",),
        num_warps=8,
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        write_attention(*(int(number) for number in sys.argv[1:]))
    else:
        tile = tile_of(32, torch.bfloat16)
        write_attention(32, tile.block_n, tile.warps, tile.stages, 64)
        for expand in (False, True):
            write_others(expand)
