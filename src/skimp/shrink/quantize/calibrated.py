"""One layer under the methods that look at activations, and the output matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from skimp.formats.weight import QuantizedWeight, WeightFormat
from skimp.kernels.plain import rms_norm
from skimp.shrink.capture import LayerRunner, final_norm
from skimp.shrink.fold import divide_norm, gain, narrow, require_attention, wide
from skimp.shrink.quantize.awq import search_factors
from skimp.shrink.quantize.gptq import gptq
from skimp.shrink.quantize.rtn import moment_blocks, rtn, stored_scale_dtype
from skimp.shrink.quantize.statistics import Inputs

if TYPE_CHECKING:
    from skimp.shrink.step import Tensors, Unit

Note = Callable[[str], None]


class GptqOptions(Protocol):
    @property
    def damping(self) -> float: ...
    @property
    def block(self) -> int: ...
    @property
    def act_order(self) -> bool: ...


def gptq_layer(
    unit: Unit,
    hidden: Tensor,
    formats: Mapping[str, WeightFormat],
    *,
    damping: float,
    block: int,
    act_order: bool,
    note: Note,
) -> dict[str, Tensor | QuantizedWeight]:
    """Group by group, each with the inputs that the groups before it, already rounded, make."""
    out = dict(unit.tensors)
    for group, names in _groups(unit).items():
        matrices = [f"{unit.name}.{name}" for name in names]
        if matrices[0] not in formats:
            continue
        inputs = observe(unit, out, hidden, (group,))[group]
        for matrix in matrices:
            weight = _dense(out, matrix)
            out[f"{matrix}.weight"] = gptq(
                weight,
                formats[matrix],
                inputs.moments,
                scale_dtype=stored_scale_dtype(weight),
                damping=damping,
                block=block,
                act_order=act_order,
                note=partial(_named, note, matrix),
            )
    return out


def awq_layer(
    unit: Unit, hidden: Tensor, formats: Mapping[str, WeightFormat]
) -> dict[str, Tensor | QuantizedWeight]:
    """Scales folded from the last group to the first, then every matrix rounded."""
    groups = _groups(unit)
    seen = observe(unit, unit.tensors, hidden, tuple(groups))
    mixed = {n: t for n, t in unit.tensors.items() if isinstance(t, QuantizedWeight)}
    assert not mixed, next(iter(mixed))
    tensors, moments = wide(unit), {group: seen[group].moments for group in groups}
    for group, matrices in reversed(groups.items()):
        form = formats.get(f"{unit.name}.{matrices[0]}")
        if form is None or not _foldable(unit, group):
            continue
        weight = torch.cat([tensors[f"{m}.weight"] for m in matrices]).float()
        s = search_factors(weight, form, moments[group], seen[group].magnitude)
        s = fold(unit, tensors, group, s.double())
        moments[group] = moments[group] / s[:, None] / s
    out: dict[str, Tensor | QuantizedWeight] = dict(narrow(unit, tensors))
    for group, matrices in groups.items():
        for name in matrices:
            matrix = f"{unit.name}.{name}"
            if matrix in formats:
                blocks = moment_blocks(moments[group].float(), formats[matrix])
                out[f"{matrix}.weight"] = rtn(
                    tensors[f"{name}.weight"].float(),
                    formats[matrix],
                    scale_dtype=stored_scale_dtype(_dense(unit.tensors, matrix)),
                    importance=blocks,
                )
    return out


def _groups(unit: Unit) -> dict[str, tuple[str, ...]]:
    assert unit.layer is not None
    return unit.spec.layers[unit.layer].input_groups


def _foldable(unit: Unit, group: str) -> bool:
    """Whether something before the group can take 1 / s: not values that heads share."""
    assert unit.layer is not None
    mixer = require_attention(unit.spec, "quantize")[unit.layer]
    return group != "mixer.o_proj" or mixer.num_heads == mixer.num_kv_heads


def fold(unit: Unit, tensors: dict[str, Tensor], group: str, s: Tensor) -> Tensor:
    """Divide the inputs of a group by s [K], float64, in whatever makes them, and multiply the
    columns of its matrices. Returns s as it came out: a norm's gain is stored in the checkpoint's
    dtype, and s moves by what that rounds, so that the layer computes what it did."""
    source = {"mixer.o_proj": "mixer.v_proj", "ffn.down_proj": "ffn.up_proj"}.get(group)
    if source is None:
        norm = "mixer_norm" if group == "mixer.qkv" else "ffn_norm"
        stored = _dense(unit.tensors, f"{unit.name}.{norm}").dtype
        before = gain(tensors[f"{norm}.weight"], unit.spec)
        trial = dict(tensors)
        divide_norm(trial, norm, (), s, unit.spec)
        after = gain(trial[f"{norm}.weight"].to(stored).double(), unit.spec)
        s = torch.where((before != 0) & (after != 0), before / after, torch.ones_like(s))
        divide_norm(tensors, norm, _groups(unit)[group], s, unit.spec)
        return s
    tensors[f"{source}.weight"] = tensors[f"{source}.weight"] / s[:, None]
    if f"{source}.bias" in tensors:
        tensors[f"{source}.bias"] = tensors[f"{source}.bias"] / s
    for matrix in _groups(unit)[group]:
        tensors[f"{matrix}.weight"] = tensors[f"{matrix}.weight"] * s
    return s


def quantize_head(
    unit: Unit, hidden: Tensor, form: WeightFormat, options: GptqOptions | None, note: Note
) -> QuantizedWeight:
    """The output matrix behind the final norm, by GPTQ; without ``options`` to nearest, with the
    scales that its inputs ask for."""
    weight, spec = _dense(unit.tensors, "lm_head"), unit.spec
    norm = final_norm(spec, _dense(unit.tensors, "norm"))
    inputs = Inputs(spec.hidden_size)
    for sample in hidden:
        inputs.add(rms_norm(sample, norm))
    dtype = stored_scale_dtype(weight)
    if options is None:
        blocks = moment_blocks(inputs.moments.float(), form)
        return rtn(weight, form, scale_dtype=dtype, importance=blocks)
    return gptq(
        weight,
        form,
        inputs.moments,
        scale_dtype=dtype,
        damping=options.damping,
        block=options.block,
        act_order=options.act_order,
        note=partial(_named, note, "lm_head"),
    )


def observe(
    unit: Unit, tensors: Tensors, hidden: Tensor, groups: tuple[str, ...]
) -> dict[str, Inputs]:
    """The inputs of some groups of a layer, in its order, over the calibration text."""
    assert unit.layer is not None
    seen: dict[str, Inputs] = {}

    def look(group: str, x: Tensor) -> None:
        if group in groups:
            seen.setdefault(group, Inputs(x.shape[-1])).add(x)

    LayerRunner(unit.spec, unit.layer, tensors).watch(hidden, groups[-1], look)
    return seen


def _dense(tensors: Tensors, name: str) -> Tensor:
    tensor = tensors[f"{name}.weight"]
    assert not isinstance(tensor, QuantizedWeight), name
    return tensor


def _named(note: Note, matrix: str, text: str) -> None:
    note(f"{matrix}: {text}")
