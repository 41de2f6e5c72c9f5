"""Compile the kernels of a mixture of experts for a Hopper GPU, which takes none, and print their
PTX."""

from __future__ import annotations

from hopper import write_ptx
from triton.compiler import ASTSource

from skimp.kernels.triton import experts

PRODUCT = {
    "x_ptr": "*bf16",
    "h_ptr": "*bf16",
    "w_ptr": "*bf16",
    "bias_ptr": "*fp32",
    "chosen_ptr": "*i32",
    "order_ptr": "*i32",
    "start_ptr": "*i32",
    "weight_ptr": "*fp32",
}
SIZES = {"K": 8, "BLOCK_E": 128}
FLOATS = ("alpha", "limit", "eps", "scale")


def write(kernel, pointers, constants, floats=(), varying=("E",), **options) -> None:
    held = {name: kind for name, kind in pointers.items() if name in kernel.arg_names}
    fixed = {name: value for name, value in constants.items() if name in kernel.arg_names}
    used = [name for name in FLOATS if name in kernel.arg_names]
    varying = [name for name in varying if name in kernel.arg_names]
    write_ptx(kernel, ASTSource, held, fixed, floats=used, varying=varying, **options)


if __name__ == "__main__":
    for activation, out in ((experts.CLAMPED, "*bf16"), (0, "*fp32")):
        for tile in (experts.SMALL, experts.LARGE):
            blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_D": tile.block_k}
            write(
                experts._grouped_kernel,
                PRODUCT | {"out_ptr": out},
                SIZES | blocks | {"STAGES": tile.stages, "EVEN_D": True, "ACTIVATION": activation},
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
    few = SIZES | {"BLOCK_N": 8, "BLOCK_D": 512, "ACTIVATION": 1}
    write(experts._few_up_kernel, PRODUCT, few)
    write(experts._few_down_kernel, PRODUCT | {"out_ptr": "*fp32"}, few)
    combine = {"y_ptr": "*fp32", "out_ptr": "*fp32"}
    write(experts._combine_kernel, combine, {"K": 8, "BLOCK": 1024})
    routing = {"logit_ptr": "*fp32", "correction_ptr": "*fp32", "chosen_ptr": "*i32"}
    limits = {"SOFTMAX": False, "GROUPS": 8, "GROUPS_CHOSEN": 4, "TOP2": True, "BLOCK_G": 8}
    write(
        experts._route_kernel,
        routing | {"weight_ptr": "*fp32"},
        limits | {"K": 8, "NORMALIZE": True, "BLOCK_E": 256},
    )
    group = {"chosen_ptr": "*i32", "order_ptr": "*i32", "start_ptr": "*i32"}
    write(experts._group_kernel, group, {"BLOCK": experts.SCANNED}, varying=("E", "P"))
