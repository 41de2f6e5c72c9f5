"""What ops are handed, as the kernels read it."""

from __future__ import annotations

import torch
from torch import Tensor

from skimp.kernels.native import structs
from skimp.kernels.ops import LayerCache, StepInputs
from skimp.model.layers import RMSNorm


def pages_of(cache: LayerCache | None, step: StepInputs) -> structs.CachePages:
    if cache is None:
        return structs.CachePages()
    table = step.block_tables[cache.group]
    assert table.dtype == torch.int32 and table.stride(1) == 1
    return structs.CachePages(
        block_table=table.data_ptr(),
        table_stride=table.stride(0),
        layer_offset=cache.offset,
        format=structs.CACHE_FORMATS[cache.spec.format],
        page_tokens=cache.page_tokens,
    )


def angles_of(rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    """Cosines and sines as the kernels read them."""
    if rope is None:
        return None, None
    return rope[0].float().contiguous(), rope[1].float().contiguous()


def factor_of(norm: RMSNorm | None) -> Tensor | None:
    return None if norm is None else norm.factor().detach().contiguous()


def address_of(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def check_rows(x: Tensor, width: int) -> None:
    assert x.shape[1] == width and x.stride(1) == 1 and x.dtype in structs.DTYPES, x.shape


def check_ints(x: Tensor, count: int, name: str) -> None:
    assert x.dtype == torch.int32 and x.is_contiguous() and x.shape[0] >= count, name
