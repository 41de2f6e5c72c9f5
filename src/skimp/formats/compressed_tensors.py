"""The compressed-tensors format (https://github.com/vllm-project/compressed-tensors), which
transformers, vLLM and SGLang read: ``quantization_config`` and the tensors of a matrix.

What is read: ``pack-quantized``, ``int-quantized``, ``float-quantized`` and ``naive-quantized``
weights of 4 or 8 bits, by channel, group or tensor, with rows as they are or rounded per token as
they come. Whatever else a config asks for is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from skimp.errors import CheckpointError, ConfigError, shown
from skimp.formats.checkpoints import SCALE_DTYPES, Part, is_unset, names, refuse, refuse_others
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
READ: Final = frozenset({"config_groups", "ignore", "kv_cache_scheme"})
GROUP_FIELDS: Final = frozenset(
    {"targets", "format", "weights", "input_activations", "output_activations"}
)
# An observer has done its work by now; the dtypes are what the tensors themselves say.
OBSERVED: Final = frozenset({"observer", "observer_kwargs", "scale_dtype", "zp_dtype"})
WEIGHT_FIELDS: Final = OBSERVED | set(
    "num_bits type strategy group_size symmetric dynamic actorder block_structure".split()  # noqa: SIM905
)


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
    sparsity = config.get("sparsity_config")
    dense = isinstance(sparsity, dict) and sparsity.get("format") == "dense"
    refuse_others(config, READ | PROVENANCE | ({"sparsity_config"} if dense else set()))
    cache = _read_cache(config.get("kv_cache_scheme"))
    groups, ignore = config.get("config_groups"), names("ignore", config.get("ignore"))
    if not isinstance(groups, dict) or (not groups and cache is None):
        raise refuse(f"config_groups must be a non-empty object, got {shown(groups)}")
    by_target: dict[str, WeightFormat] = {}
    for name, group in groups.items():
        where = f"config_groups.{name}"
        if not isinstance(group, dict):
            raise refuse(f"{where} must be an object, got {shown(group)}")
        form = _group_format(where, group, config.get("format"))
        for target in names(f"{where}.targets", group.get("targets")):
            by_target[target] = form
    formats: dict[str, WeightFormat] = {}
    for ours, theirs in modules.items():
        chosen = None if _first(theirs, ignore) else _first(theirs, by_target)
        if chosen is not None:
            formats[ours] = by_target[chosen]
    if groups and not formats:
        raise refuse("config_groups: its targets match no matrix of this model")
    return formats, cache


def _first(module: str, targets: Collection[str]) -> str | None:
    """The target that decides over a module: its name, then a pattern, then its class."""
    if module in targets:
        return module
    for target in sorted(targets):
        if target.startswith("re:"):
            try:
                if re.match(target[3:], module):
                    return target
            except re.error as error:
                raise refuse(f"{target!r} is no regular expression: {error}") from None
    kind = EMBEDDING if module.endswith("embed_tokens") else LINEAR
    return kind if kind in targets else None


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

    for field, value in {**group, **{f"weights.{name}": v for name, v in weights.items()}}.items():
        known = GROUP_FIELDS if not field.startswith("weights.") else WEIGHT_FIELDS
        if field.removeprefix("weights.") not in known and not is_unset(value):
            raise bad(field, value)
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    if type(bits) is not int:
        raise bad("weights.num_bits", bits)
    if kind not in ("int", "float"):
        raise bad("weights.type", kind)
    size = weights.get("group_size")
    size = None if size == -1 else size
    strategy = weights.get("strategy")
    if strategy is None:
        strategy = "group" if size else "channel" if weights.get("group_size") else "tensor"
    if strategy not in ("channel", "group", "tensor"):
        raise bad("weights.strategy", strategy)
    if (type(size) is not int or size < 1) if strategy == "group" else size is not None:
        raise bad("weights.group_size", size)
    if not isinstance(weights.get("symmetric", True), bool):
        raise bad("weights.symmetric", weights["symmetric"])
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
            symmetric=weights.get("symmetric", True),
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
    wanted = {"num_bits": (8,), "type": ("int", "float"), "dynamic": (True,)}
    wanted |= {"strategy": ("token",), "symmetric": (True,)}
    defaults = {"num_bits": 8, "type": "int", "symmetric": True}  # of the library
    for field, allowed in wanted.items():
        value = args.get(field, defaults.get(field))
        if value not in allowed or type(value) is not type(allowed[0]):
            raise bad(f"input_activations.{field}", value)
    for field, value in args.items():
        if field not in OBSERVED and field not in wanted and not is_unset(value):
            raise bad(f"input_activations.{field}", value)
    return "fp8" if args.get("type") == "float" else "int8"


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
    for index, (form, members) in enumerate(by_format.items()):
        tables = [name for name in members if name.endswith("embed_tokens")]
        # One format for all: by class, as other writers spell it. Else each matrix by its name.
        targets = [LINEAR, *tables] if len(by_format) == 1 else members
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
    """The tensors of a matrix [N, K] by the end of their names.

    Integers may be packed or not, since the layouts differ in nothing else.
    """
    n, k = shape
    groups = form.groups(k)
    # By tensor there is one scale; by channel the last dimension is left out at times.
    shapes: tuple[tuple[int, ...], ...] = ((n, groups),)
    shapes += ((1,), (), (n,), (1, 1)) if groups == 1 else ()
    found = {"weight_scale": Part(shapes, SCALE_DTYPES)}
    if form.kind == "float":
        found["weight"] = Part(((n, k),), (torch.float8_e4m3fn,))
        return found
    word = 32 // form.bits
    found["weight_packed"] = Part(((n, -(-k // word)),), (torch.int32,), instead="weight")
    found["weight"] = Part(((n, k),), (torch.int8,), instead="weight_packed")
    found["weight_shape"] = Part(((2,),), (torch.int64, torch.int32), required=False)
    if not form.symmetric:
        packed = (-(-n // word), groups)
        found["weight_zero_point"] = Part((packed, *shapes), (torch.int32, torch.int8))
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
    scale = _wide(tensors["weight_scale"], n, form.groups(k))
    zero = tensors.get("weight_zero_point")
    if zero is not None and zero.dtype == torch.int8:
        zero = _wide(zero, n, form.groups(k))
    elif zero is not None:
        zero = _read_packed_zero(zero, form, (n, form.groups(k)))
    said = tensors.get("weight_shape")
    if said is not None and tuple(said.tolist()) != shape:
        raise CheckpointError(f"weight_shape says {said.tolist()}, the config wants {[n, k]}")
    if ("weight" in tensors) == ("weight_packed" in tensors):
        raise CheckpointError("weight: it is stored both packed and unpacked")
    if "weight_packed" in tensors:
        values = _bytes(tensors["weight_packed"], -(-k * form.bits // 8))
        values = _unoffset(values) if form.bits == 8 else values
    else:
        values = tensors["weight"]
        if form.bits == 4:
            if int(values.min()) < -8 or int(values.max()) > 7:
                raise CheckpointError("weight: holds numbers outside -8..7")
            values = pack_nibbles(values)
    return QuantizedWeight(format=form, in_features=k, values=values, scale=scale, zero=zero)


def _wide(numbers: Tensor, n: int, groups: int) -> Tensor:
    """Scales or zero points as [N, groups], however few a file holds."""
    if numbers.numel() == 1:
        numbers = numbers.reshape(1, 1)
    elif numbers.dim() == 1:
        numbers = numbers[:, None]
    return numbers.expand(n, groups).contiguous()


def _read_packed_zero(words: Tensor, form: WeightFormat, shape: tuple[int, int]) -> Tensor:
    """Zero points, which are packed along the outputs."""
    n, groups = shape
    if tuple(words.shape) != (-(-n * form.bits // 32), groups):
        raise CheckpointError(f"weight_zero_point has shape {list(words.shape)}")
    across = _bytes(words.T.contiguous(), -(-n * form.bits // 8))
    if form.bits == 8:
        return _unoffset(across).T.contiguous()
    pairs = torch.stack((across & 15, across >> 4), dim=-1).flatten(1)[:, :n]
    return (pairs.to(torch.int8) - 8).T.contiguous()


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
