"""Compile the Gluon kernel for a Hopper GPU, which takes none, and print its PTX."""

from __future__ import annotations

from hopper import write_ptx
from triton.experimental.gluon._runtime import GluonASTSource

from skimp.kernels.triton.few_rows import few_rows_kernel
from skimp.kernels.triton.products import INT4, SILU

POINTERS = {
    "x_ptr": "*fp32",
    "factor_ptr": "*fp32",
    "w_ptr": "*i16",
    "scale_ptr": "*fp32",
    "bias_ptr": "*fp32",
    "out_ptr": "*bf16",
}
CONSTANTS = {
    "row_scale_ptr": None,
    "residual_ptr": None,
    "K": 1024,
    "CHUNKS": 8,
    "KIND": INT4,
    "PER": 4,
    "GROUP": 128,
    "ACTIVATION": SILU,
    "ROWS": 1,
    "SLICES": 4,
    "BLOCK_N": 32,
    "AHEAD": 2,
    "PDL": True,
}


VARYING = ("M", "N", "stride_x", "stride_residual", "stride_out")


if __name__ == "__main__":
    write_ptx(
        few_rows_kernel,
        GluonASTSource,
        POINTERS,
        CONSTANTS,
        floats=("eps",),
        varying=VARYING,
        num_warps=4,
    )
