"""Compile the Gluon kernel for a Hopper GPU, which takes none, and print its PTX."""

from __future__ import annotations

import sys

import triton
from triton.backends.compiler import GPUTarget
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


def main() -> None:
    signature = {}
    for name in few_rows_kernel.arg_names:
        scalar = "fp32" if name == "eps" else "i32"
        signature[name] = "constexpr" if name in CONSTANTS else POINTERS.get(name, scalar)
    places = {name: (i,) for i, name in enumerate(few_rows_kernel.arg_names)}
    source = GluonASTSource(
        few_rows_kernel,
        signature,
        {places[name]: value for name, value in CONSTANTS.items()},
        {places[name]: [["tt.divisibility", 16]] for name in POINTERS},
    )
    options = {"num_warps": 4, "launch_pdl": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    sys.stdout.write(compiled.asm["ptx"])


if __name__ == "__main__":
    main()
