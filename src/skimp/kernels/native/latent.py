"""What makes heads of latents, packed for both forms of attention (``kernels/latent.py``)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skimp.formats.weight import QuantizedWeight
from skimp.kernels.latent import split_heads
from skimp.kernels.native import matrix as packed
from skimp.kernels.native import structs
from skimp.kernels.native.matrix import PackedMatrix
from skimp.kernels.native.memory import PanelMemory
from skimp.model.layers import Linear
from skimp.model.spec import LatentAttentionSpec

MOST_LANES = 16  # heads that pass through the attention kernels together
EXPAND_ROWS = 64  # on Zen 4, 32 rows of a short prompt take a quarter longer expanded, 64 as long


@dataclass(frozen=True)
class PackedLatent:
    """Matrices of the first head; in ``panels``, those of the other heads follow."""

    to_latent: PackedMatrix  # U_h^T, for what is not rotated of a query
    from_latent: PackedMatrix  # V_h, for what was mixed in the latent
    expanding: Tensor | None  # [heads * (nope_dim + value_dim), latent_dim]; None: only absorbed


def pack_latent(
    linear: Linear, spec: LatentAttentionSpec, dtype: torch.dtype | None, memory: PanelMemory
) -> PackedLatent:
    """Pack ``kv_b_proj``, taking it away; ``dtype`` as in :func:`matrix.pack`.

    Low-bit matrices become dense: their groups run along latents, which queries are brought to.
    Expanding is for bfloat16: in float32 a row's bits depend on no other row, so that one form has
    to serve all, and generation needs the absorbed one.
    """
    held = linear.take()
    weight = held.dequantize().to(held.scale.dtype) if isinstance(held, QuantizedWeight) else held
    weight = weight.to(dtype or (weight.dtype if weight.dtype in structs.DTYPES else torch.float32))
    heads = split_heads(weight, spec)
    pairs = spec.nope_dim % 2 == 0 and spec.latent_dim % 2 == 0  # as they lie in panels
    return PackedLatent(
        to_latent=_pack(heads.keys_HNL.transpose(1, 2), memory),
        from_latent=_pack(heads.values_HVL, memory),
        expanding=weight.contiguous() if weight.dtype == torch.bfloat16 and pairs else None,
    )


def groups_of_heads(spec: LatentAttentionSpec) -> int:
    """In how many groups of like size heads read latents: few enough to a group that one pass over
    a latent serves it, enough to be worth the pass."""
    if spec.num_heads <= MOST_LANES:
        return 1
    whole = [n for n in range(MOST_LANES, MOST_LANES // 2, -1) if spec.num_heads % n == 0]
    return spec.num_heads // whole[0] if whole else 1


def _pack(heads_HNK: Tensor, memory: PanelMemory) -> PackedMatrix:
    """See :class:`PackedLatent`. Outputs of each head are padded to whole panels."""
    padded = F.pad(heads_HNK, (0, 0, 0, -heads_HNK.shape[1] % structs.PANEL)).flatten(0, 1)
    with torch.device("meta"):
        linear = Linear(padded.shape[1], padded.shape[0])
    linear.weight = nn.Parameter(padded, requires_grad=False)
    matrix = packed.pack((linear,), "stack", padded.dtype, memory)
    assert isinstance(matrix, PackedMatrix)
    return replace(matrix, sizes=(heads_HNK.shape[1],))
