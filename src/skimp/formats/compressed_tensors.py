"""The compressed-tensors format (https://github.com/vllm-project/compressed-tensors), which
transformers, vLLM and SGLang read: ``quantization_config`` and the tensors of a matrix.

What is read: ``pack-quantized``, ``int-quantized``, ``float-quantized`` and ``naive-quantized``
weights of 4 or 8 bits, by channel, group or tensor, with rows as they are or rounded per token as
they come. Whatever else a config asks for is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from skimp.errors import CheckpointError, ConfigError, shown
from skimp.formats.checkpoints import SCALE_DTYPES, Part
from skimp.formats.weight import QuantizedWeight, WeightFormat, pack_nibbles

METHOD: Final = "compressed-tensors"
PACKED: Final = "pack-quantized"
INTEGERS: Final = "int-quantized"
FLOATS: Final = "float-quantized"
LAYOUTS: Final = (PACKED, INTEGERS, FLOATS, "naive-quantized")
LINEAR: Final = "Linear"
EMBEDDING: Final = "Embedding"
# Say how the file was made, or repeat what its tensors say.
PROVENANCE: Final = frozenset(
    "quantization_status global_compression_ratio version quant_method format".split()  # noqa: SIM905
)
UNSET: Final[tuple[Any, ...]] = (None, {}, [], False)


def refuse(message: str) -> ConfigError:
    return ConfigError(f"quantization_config: {message}")


# ---- the config -------------------------------------------------------------------------------


def read_config(
    config: Mapping[str, Any], modules: Mapping[str, str]
) -> tuple[dict[str, WeightFormat], str | None]:
    """The format of each matrix and of the cache, as the config says.

    ``modules`` maps our matrix names to the checkpoint's module names. Raises ConfigError.
    """
    status = config.get("quantization_status")
    if status not in (None, "compressed"):
        raise refuse(f"quantization_status={shown(status)}: only compressed weights are read")
    groups, ignore = config.get("config_groups"), config.get("ignore") or []
    only_cache = groups == {} and config.get("kv_cache_scheme") is not None
    if not isinstance(groups, dict) or not (groups or only_cache):
        raise refuse(f"config_groups must be a non-empty object, got {shown(groups)}")
    _strings("ignore", ignore)
    formats: dict[str, WeightFormat] = {}
    for name, group in groups.items():
        where = f"config_groups.{name}"
        if not isinstance(group, dict):
            raise refuse(f"{where} must be an object, got {shown(group)}")
        _strings(f"{where}.targets", group.get("targets"))
        form = _group_format(where, group, config.get("format"))
        for ours, theirs in modules.items():
            taken = ours in formats or _matches(theirs, ignore)
            if not taken and _matches(theirs, group["targets"]):
                formats[ours] = form
    if groups and not formats:
        raise refuse("config_groups: its targets match no matrix of this model")
    for field, value in config.items():
        known = {"config_groups", "ignore", "kv_cache_scheme"} | PROVENANCE
        if field not in known and not _is_unset(value):
            raise refuse(f"{field}={shown(value)} is not supported")
    return formats, _read_cache(config.get("kv_cache_scheme"))


def _is_unset(value: Any) -> bool:
    return any(value == unset and type(value) is type(unset) for unset in UNSET) or (
        isinstance(value, dict) and value.get("format") == "dense"
    )


def _strings(where: str, value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise refuse(f"{where} must be a list of names, got {shown(value)}")


def _matches(module: str, targets: list[str]) -> bool:
    kind = EMBEDDING if module.endswith("embed_tokens") else LINEAR
    for target in targets:
        if target.startswith("re:"):
            try:
                if re.match(target[3:], module):
                    return True
            except re.error as error:
                raise refuse(f"{target!r} is no regular expression: {error}") from None
        elif target in (kind, module):
            return True
    return False


def _group_format(where: str, group: Mapping[str, Any], overall: Any) -> WeightFormat:
    layout = group.get("format") or overall
    if layout not in LAYOUTS:
        raise refuse(f"{where}: format={shown(layout)} is not one of {', '.join(LAYOUTS)}")
    if group.get("output_activations"):
        raise refuse(f"{where}.output_activations is not supported")
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise refuse(f"{where}.weights must be an object, got {shown(weights)}")

    def bad(field: str, value: Any) -> ConfigError:
        return refuse(f"{where}.{field}={shown(value)} is not supported")

    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    if kind not in ("int", "float"):
        raise bad("weights.type", kind)
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    if strategy not in ("channel", "group", "tensor"):
        raise bad("weights.strategy", strategy)
    size = weights.get("group_size") if strategy == "group" else None
    if strategy == "group" and (type(size) is not int or size < 1):
        raise bad("weights.group_size", size)
    if weights.get("dynamic"):
        raise bad("weights.dynamic", weights["dynamic"])
    if weights.get("actorder") not in (None, False, "static", "weight"):
        raise bad("weights.actorder", weights["actorder"])
    if weights.get("block_structure"):
        raise bad("weights.block_structure", weights["block_structure"])
    try:
        return WeightFormat(
            kind=kind,
            bits=bits,
            group_size=size,
            symmetric=weights.get("symmetric", True) is True,
            activations=_activations(group.get("input_activations"), bad),
        )
    except ValueError as error:
        raise refuse(f"{where}.weights: {error}") from None


def _activations(args: Any, bad: Callable[[str, Any], ConfigError]) -> Any:
    """``int8`` or ``fp8``, or None."""
    if args is None:
        return None
    if not isinstance(args, dict):
        raise bad("input_activations", args)
    if args.get("num_bits", 8) != 8 or args.get("type", "int") not in ("int", "float"):
        raise bad("input_activations.num_bits", args.get("num_bits"))
    if args.get("dynamic") is not True:
        raise bad("input_activations.dynamic", args.get("dynamic", False))
    if args.get("strategy", "token") not in (None, "token"):
        raise bad("input_activations.strategy", args["strategy"])
    if args.get("symmetric", True) is not True:
        raise bad("input_activations.symmetric", args["symmetric"])
    return "fp8" if args.get("type", "int") == "float" else "int8"


def _read_cache(scheme: Any) -> str | None:
    if not scheme:
        return None
    kind = (scheme.get("num_bits", 8), scheme.get("type", "int")) if type(scheme) is dict else None
    if kind not in ((8, "int"), (8, "float")):
        raise refuse(f"kv_cache_scheme={shown(scheme)}: only 8 bits are supported")
    return "fp8" if kind[1] == "float" else "int8"


def write_config(
    formats: Mapping[str, WeightFormat], cache_format: str | None, modules: Mapping[str, str]
) -> dict[str, Any]:
    """A ``quantization_config`` that :func:`read_config` reads back as these formats."""
    by_format: dict[WeightFormat, list[str]] = {}
    for name in modules:  # in the model's order
        if name in formats:
            by_format.setdefault(formats[name], []).append(modules[name])
    ignore = [theirs for ours, theirs in modules.items() if ours not in formats]
    if "lm_head" not in modules.values():
        ignore.append("lm_head")  # tied: ours has none, but other readers make one
    groups = {}
    for index, (form, names) in enumerate(by_format.items()):
        tables = [name for name in names if name.endswith("embed_tokens")]
        # One format for all: by class, as other writers spell it. Else each matrix by its name.
        targets = [LINEAR, *tables] if len(by_format) == 1 else names
        groups[f"group_{index}"] = {
            "targets": targets,
            "format": layout_of(form),
            "weights": _weight_args(form),
            "input_activations": _activation_args(form.activations),
            "output_activations": None,
        }
    layouts = list(dict.fromkeys(group["format"] for group in groups.values()))
    config: dict[str, Any] = {
        "quant_method": METHOD,
        "format": layouts[0] if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        # A table is no Linear, so it needs no exception.
        "ignore": [name for name in ignore if not name.endswith("embed_tokens")],
        "kv_cache_scheme": None,
    }
    if cache_format is not None:
        config["kv_cache_scheme"] = {
            "num_bits": 8,
            "type": "float" if cache_format == "fp8" else "int",
            "strategy": "tensor",
            "symmetric": True,
            "dynamic": False,
        }
    return config


def layout_of(form: WeightFormat) -> str:
    """Which of the layouts stores a format."""
    if form.kind == "float":
        return FLOATS
    return INTEGERS if form.bits == 8 and form.activations is not None else PACKED


def _weight_args(form: WeightFormat) -> dict[str, Any]:
    return {
        "num_bits": form.bits,
        "type": form.kind,
        "symmetric": form.symmetric,
        "strategy": "channel" if form.group_size is None else "group",
        "group_size": form.group_size,
        "dynamic": False,
    }


def _activation_args(kind: str | None) -> dict[str, Any] | None:
    if kind is None:
        return None
    return {
        "num_bits": 8,
        "type": "float" if kind == "fp8" else "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }


# ---- the tensors ------------------------------------------------------------------------------


def parts(form: WeightFormat, shape: tuple[int, int]) -> dict[str, Part]:
    """The tensors of a matrix [N, K] by the end of their names."""
    n, k = shape
    groups = form.groups(k)
    # By tensor there is one scale; by channel the last dimension is left out at times.
    shapes: tuple[tuple[int, ...], ...] = ((n, groups),)
    shapes += ((1,), (), (n,), (1, 1)) if groups == 1 else ()
    found = {"weight_scale": Part(shapes, SCALE_DTYPES)}
    if layout_of(form) == PACKED:
        word = 32 // form.bits
        found["weight_packed"] = Part(((n, -(-k // word)),), (torch.int32,))
        found["weight_shape"] = Part(((2,),), (torch.int64, torch.int32), required=False)
        if not form.symmetric:
            found["weight_zero_point"] = Part(((-(-n // word), groups),), (torch.int32,))
    else:
        dtype = torch.int8 if form.kind == "int" else torch.float8_e4m3fn
        found["weight"] = Part(((n, k),), (dtype,))
        if not form.symmetric:
            found["weight_zero_point"] = Part(shapes, (torch.int8,))
    return found


def encode(weight: QuantizedWeight) -> Iterator[tuple[str, Tensor]]:
    """The tensors to store, by the end of their names."""
    form, (n, k) = weight.format, weight.shape
    yield "weight_scale", weight.scale
    if layout_of(form) != PACKED:
        yield "weight", weight.values
        if weight.zero is not None:
            yield "weight_zero_point", weight.zero
        return
    yield "weight_packed", _words(weight.values if form.bits == 4 else _offset(weight.values))
    yield "weight_shape", torch.tensor([n, k])
    if weight.zero is not None:
        across = weight.zero.T
        packed = pack_nibbles(across.float()) if form.bits == 4 else _offset(across)
        yield "weight_zero_point", _words(packed).T.contiguous()


def decode(
    form: WeightFormat, shape: tuple[int, int], tensors: Mapping[str, Tensor]
) -> QuantizedWeight:
    """The matrix of :func:`parts`; 4-bit values share memory where no padding ends the rows.

    Raises CheckpointError naming the part that is not what the format says.
    """
    n, k = shape
    scale = tensors["weight_scale"]
    if scale.numel() == 1:
        scale = scale.reshape(1, 1)
    elif scale.dim() == 1:
        scale = scale[:, None]
    scale = scale.expand(n, form.groups(k))
    zero = tensors.get("weight_zero_point")
    if layout_of(form) != PACKED:
        if zero is not None:
            zero = zero.expand(n, form.groups(k))
        return QuantizedWeight(
            format=form, in_features=k, values=tensors["weight"], scale=scale, zero=zero
        )
    said = tensors.get("weight_shape")
    if said is not None and tuple(said.tolist()) != shape:
        raise CheckpointError(f"weight_shape says {said.tolist()}, the config wants {[n, k]}")
    values = _bytes(tensors["weight_packed"], -(-k * form.bits // 8))
    if form.bits == 8:
        values = _unoffset(values)
    if zero is not None:
        across = _bytes(zero.T.contiguous(), -(-n * form.bits // 8))
        if form.bits == 4:
            pairs = torch.stack((across & 15, across >> 4), dim=-1).flatten(1)[:, :n]
            zero = (pairs.to(torch.int8) - 8).T.contiguous()
        else:
            zero = _unoffset(across).T.contiguous()
    return QuantizedWeight(format=form, in_features=k, values=values, scale=scale, zero=zero)


def _words(packed: Tensor) -> Tensor:
    """Bytes [N, B] to the int32 words they fill."""
    short = -packed.shape[1] % 4
    if short:
        packed = torch.nn.functional.pad(packed, (0, short))
    # A fresh copy: a lone row's strides may forbid the view.
    return packed.clone(memory_format=torch.contiguous_format).view(torch.int32)


def _bytes(words: Tensor, count: int) -> Tensor:
    return words.reshape(-1).view(torch.uint8).view(words.shape[0], -1)[:, :count]


def _offset(values: Tensor) -> Tensor:
    return (values.to(torch.int16) + 128).to(torch.uint8)


def _unoffset(values: Tensor) -> Tensor:
    return (values.to(torch.int16) - 128).to(torch.int8)
