"""Checkpoints of AutoGPTQ, GPTQModel and optimum (``quant_method`` gptq): read, never written.

For a matrix [N outputs, K inputs] in G groups: ``qweight`` int32 [K * bits / 32, N], the first
input lowest; ``scales`` [G, N]; ``qzeros`` int32 [G, N * bits / 32], the first output lowest, one
less than the zero point in version 1 and itself in version 2; ``g_idx`` int32 [K], each input's
group. Values are unsigned: ``w = (q - zero) * scale``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from skimp.errors import CheckpointError, SkimpWarning, shown
from skimp.formats.checkpoints import (
    SCALE_DTYPES,
    Part,
    converted,
    group_size,
    is_unset,
    names,
    refuse,
    refuse_others,
)
from skimp.formats.weight import QuantizedWeight, WeightFormat

# Version 1's other names are for repacked or otherwise different tensors.
ZERO_OFFSETS: Final = {"gptq": 1, "gptq_v2": 0}
# Say how the file was made, or what some other software should run it with.
PROVENANCE: Final = frozenset(
    """
    quant_method tokenizer dataset damp_percent damp_auto_increment act_group_aware
    true_sequential static_groups mse meta backend model_seqlen block_name_to_quantize
    module_name_preceding_first_block batch_size pad_token_id max_input_length
    cache_block_outputs use_cuda_fp16 use_exllama disable_exllama exllama_config
    model_name_or_path model_file_base_name desc_act offload_to_disk offload_to_disk_path
    hyb_act failsafe
    """.split()  # noqa: SIM905
)
READ: Final = frozenset(
    """
    bits group_size sym format checkpoint_format lm_head pack_dtype modules_to_not_convert
    modules_in_block_to_quantize
    """.split()  # noqa: SIM905
)


def spelling(config: Mapping[str, Any]) -> GPTQ:
    """The version that a config names."""
    told = [config[name] for name in ("checkpoint_format", "format") if config.get(name)]
    version = told[0] if told else "gptq"
    if version not in list(ZERO_OFFSETS) or any(other != version for other in told):
        known = ", ".join(ZERO_OFFSETS)
        raise refuse(f"checkpoint_format={', '.join(map(shown, told))} is not one of {known}")
    return GPTQ(zero_offset=ZERO_OFFSETS[version])


@dataclass(frozen=True, kw_only=True)
class GPTQ:
    """The spelling; ``zero_offset`` is what stored zero points lack."""

    zero_offset: int

    def read_config(
        self, config: Mapping[str, Any], modules: Mapping[str, str]
    ) -> tuple[dict[str, WeightFormat], str | None]:
        """See :class:`~skimp.formats.checkpoints.Spelling`."""
        bits, symmetric = config.get("bits"), config.get("sym", True)
        if type(bits) is not int or bits not in (4, 8):
            raise refuse(f"gptq with bits={shown(bits)}: 4 and 8 are supported")
        if not isinstance(symmetric, bool):
            raise refuse(f"sym must be true or false, got {shown(symmetric)}")
        if config.get("pack_dtype") not in (None, "int32", "torch.int32"):
            raise refuse(f"pack_dtype={shown(config['pack_dtype'])} is not supported")
        refuse_others(config, PROVENANCE | READ)
        form = WeightFormat(
            kind="int",
            bits=bits,
            group_size=group_size("group_size", config.get("group_size", 128)),
            symmetric=symmetric,
        )
        found = converted(
            modules,
            skipped=names("modules_to_not_convert", config.get("modules_to_not_convert")),
            lm_head=config.get("lm_head") is True,
        )
        inside = config.get("modules_in_block_to_quantize")
        if not is_unset(inside):
            if not isinstance(inside, list):
                raise refuse("modules_in_block_to_quantize must be a list of lists of names")
            chosen = [name for part in inside for name in names(f"{shown(inside)}", part)]
            found = [m for m in found if modules[m].endswith(tuple(f".{c}" for c in chosen))]
        return dict.fromkeys(found, form), None

    def parts(self, form: WeightFormat, shape: tuple[int, int]) -> dict[str, Part]:
        """The tensors of a matrix [N, K] by the end of their names."""
        n, k = shape
        word, groups = 32 // form.bits, form.groups(k)
        return {
            "qweight": Part(((-(-k // word), n),), (torch.int32,)),
            "qzeros": Part(((groups, -(-n // word)),), (torch.int32,)),
            "scales": Part(((groups, n),), SCALE_DTYPES),
            "g_idx": Part(((k,),), (torch.int32, torch.int64), required=False),
        }

    def decode(
        self, form: WeightFormat, shape: tuple[int, int], tensors: Mapping[str, Tensor]
    ) -> QuantizedWeight | Tensor:
        """The matrix of :meth:`parts`; dense, float32, if its groups are not runs of inputs.

        Raises CheckpointError naming the part that is not what the format says.
        """
        n, k = shape
        high = (1 << form.bits) - 1
        zero = _fields(tensors["qzeros"], form.bits)[:, :n]
        zero = (zero + self.zero_offset) & high  # 0 is stored as the highest number in version 1
        if form.symmetric and not bool((zero == 1 << form.bits - 1).all()):
            raise CheckpointError("qzeros: the config says sym, but they are not the middle")
        zero = (zero - (1 << form.bits - 1)).to(torch.int8).T.contiguous()
        # Transposed, the words of an output lie as ours do: the first input lowest.
        values = tensors["qweight"].T.contiguous().view(torch.uint8)[:, : -(-k * form.bits // 8)]
        if form.bits == 8:
            values = (values ^ 128).view(torch.int8)
        scale = tensors["scales"].T.contiguous()
        group = torch.arange(k) // (form.group_size or k)
        index = tensors.get("g_idx")
        if index is None or torch.equal(index.long(), group):
            return QuantizedWeight(
                format=form,
                in_features=k,
                values=values,
                scale=scale,
                zero=None if form.symmetric else zero,
            )
        if not bool(((index >= 0) & (index < form.groups(k))).all()):
            raise CheckpointError(f"g_idx: names a group outside 0..{form.groups(k) - 1}")
        return _by_index(form, k, values, scale, zero, index.long())


def _by_index(
    form: WeightFormat, k: int, values: Tensor, scale: Tensor, zero: Tensor, index: Tensor
) -> Tensor:
    warnings.warn(
        "g_idx: inputs of a group are not neighbours (desc_act), so the matrix is held dense",
        SkimpWarning,
        stacklevel=2,
    )
    whole = WeightFormat(kind="int", bits=form.bits)  # only to read the values
    q = QuantizedWeight(
        format=whole, in_features=k, values=values, scale=scale.new_ones(len(values), 1)
    ).stored()
    return (q - zero.float()[:, index]) * scale.float()[:, index]


def _fields(words: Tensor, bits: int) -> Tensor:
    """The unsigned numbers in int32 words [R, C], lowest first: int32 [R, C * 32 / bits]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words[:, :, None] >> shifts) & ((1 << bits) - 1)).flatten(1)
