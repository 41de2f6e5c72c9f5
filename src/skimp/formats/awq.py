"""Checkpoints of AutoAWQ (``quant_method`` awq) in its GEMM layout: read, never written.

For a matrix [N outputs, K inputs] in G groups: ``qweight`` int32 [K, N / 8], ``qzeros`` int32
[G, N / 8] and ``scales`` [G, N]. The eight outputs of a word lie in the order 0, 2, 4, 6, 1, 3,
5, 7, the first lowest. Values are unsigned: ``w = (q - zero) * scale``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from skimp.errors import shown
from skimp.formats.checkpoints import (
    SCALE_DTYPES,
    Part,
    converted,
    group_size,
    names,
    refuse,
    refuse_others,
)
from skimp.formats.weight import QuantizedWeight, WeightFormat, pack_nibbles

WORD: Final = 8  # numbers in an int32
SHIFTS: Final = (0, 16, 4, 20, 8, 24, 12, 28)  # of outputs 0 to 7 in their word
KNOWN: Final = frozenset(
    """
    quant_method bits group_size zero_point version format modules_to_not_convert
    backend do_fuse fuse_max_seq_len modules_to_fuse exllama_config
    tokenizer dataset damp_percent act_group_aware true_sequential sym meta model_seqlen
    block_name_to_quantize module_name_preceding_first_block batch_size pad_token_id
    max_input_length cache_block_outputs
    """.split()  # noqa: SIM905
)  # transformers writes GPTQ's fields too, at their defaults


def read_config(
    config: Mapping[str, Any], modules: Mapping[str, str]
) -> tuple[dict[str, WeightFormat], str | None]:
    """See :class:`~skimp.formats.checkpoints.Spelling`."""
    version = config.get("version") or config.get("format") or "gemm"
    if str(version).lower() != "gemm":
        raise refuse(f"version={shown(version)} is not supported (known: gemm)")
    if config.get("bits", 4) != 4:
        raise refuse(f"bits={shown(config['bits'])}: 4 is supported")
    if config.get("zero_point", True) is not True:
        raise refuse(f"zero_point={shown(config['zero_point'])} is not supported")
    refuse_others(config, KNOWN)
    form = WeightFormat(
        kind="int",
        bits=4,
        group_size=group_size("group_size", config.get("group_size", 128)),
        symmetric=False,
    )
    skipped = names("modules_to_not_convert", config.get("modules_to_not_convert"))
    return dict.fromkeys(converted(modules, skipped=skipped), form), None


def parts(form: WeightFormat, shape: tuple[int, int]) -> dict[str, Part]:
    """The tensors of a matrix [N, K] by the end of their names."""
    n, k = shape
    groups, words = form.groups(k), -(-n // WORD)
    return {
        "qweight": Part(((k, words),), (torch.int32,)),
        "qzeros": Part(((groups, words),), (torch.int32,)),
        "scales": Part(((groups, n),), SCALE_DTYPES),
    }


def decode(
    form: WeightFormat, shape: tuple[int, int], tensors: Mapping[str, Tensor]
) -> QuantizedWeight:
    """The matrix of :func:`parts`."""
    n, k = shape
    return QuantizedWeight(
        format=form,
        in_features=k,
        values=pack_nibbles(_fields(tensors["qweight"])[:, :n].T.contiguous()),
        scale=tensors["scales"].T.contiguous(),
        zero=_fields(tensors["qzeros"])[:, :n].T.contiguous(),
    )


def _fields(words: Tensor) -> Tensor:
    """The numbers in words [R, C], less 8: int8 [R, 8 * C]."""
    fields = (words[:, :, None] >> torch.tensor(SHIFTS, dtype=torch.int32)) & 15
    return (fields.flatten(1) - 8).to(torch.int8)
