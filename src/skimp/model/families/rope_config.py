"""Reading RoPE fields: ``rope_theta`` and ``rope_scaling``, or transformers 5's dictionaries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from skimp.errors import shown
from skimp.model.families.reader import ConfigReader
from skimp.model.spec import RopeSpec

# The keys each type reads besides rope_type (or type) and rope_theta.
KEYS: Final[Mapping[str, frozenset[str]]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "longrope": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "short_factor",
            "long_factor",
        }
    ),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
}


def read_rope(
    read: ConfigReader,
    *,
    head_dim: int,
    max_positions: int,
    theta: float = 10_000.0,
    interleaved: bool = False,
) -> RopeSpec:
    """One RoPE for all layers; ``theta`` and ``interleaved`` are the class's.

    transformers 5 prefers ``rope_scaling`` over ``rope_parameters``; both may be there only if
    they say the same.
    """
    outer = read.raw("rope_theta")
    found = {}
    for name in ("rope_scaling", "rope_parameters"):
        values = read.mapping(name)
        if values:
            for kind in ("full_attention", "sliding_attention"):
                if kind in values:
                    raise read.refuse(f"{name}.{kind}: this class has one RoPE for all layers")
            found[name] = rope_from(read, name, values, outer, head_dim, max_positions, theta)
    read.raw("original_max_position_embeddings")
    specs = list(found.values())
    if len(specs) == 2 and specs[0] != specs[1]:
        raise read.refuse("rope_scaling and rope_parameters disagree")
    found_rope = (
        specs[0]
        if specs
        else rope_from(read, "rope_parameters", {}, outer, head_dim, max_positions, theta)
    )
    return replace(found_rope, interleaved=interleaved)


def rope_from(
    read: ConfigReader,
    name: str,
    values: Mapping[str, Any],
    outer_theta: Any,
    head_dim: int,
    max_positions: int,
    default_theta: float,
) -> RopeSpec:
    """A RopeSpec from one dictionary called ``name``; ``outer_theta`` stood beside it."""
    values = {key: value for key, value in values.items() if value is not None}
    theta = default_theta
    if outer_theta is not None:
        theta = read.check_number("rope_theta", outer_theta, above=1.0)
    if "rope_theta" in values:
        inner = read.check_number(f"{name}.rope_theta", values.pop("rope_theta"), above=1.0)
        if outer_theta is not None and inner != theta:
            raise read.refuse(f"rope_theta={theta:g} beside {name}.rope_theta={inner:g}")
        theta = inner
    for partial in (values.pop("partial_rotary_factor", 1.0), read.raw("partial_rotary_factor")):
        if partial not in (None, 1):
            raise read.refuse(
                f"partial_rotary_factor={shown(partial)}: this class turns whole heads"
            )
    scaling = _scaling(read, name, values, max_positions, head_dim)
    return RopeSpec(theta=theta, rotary_dim=head_dim, scaling=scaling)


def _scaling(
    read: ConfigReader, name: str, values: dict[str, Any], max_positions: int, rotary_dim: int
) -> Mapping[str, Any] | None:
    old, kind = values.pop("type", None), values.pop("rope_type", None)
    if None not in (old, kind) and old != kind:
        raise read.refuse(f"{name}.type={shown(old)} beside {name}.rope_type={shown(kind)}")
    kind = kind or old or "default"
    if kind == "su":  # its first name
        kind = "longrope"
    if not isinstance(kind, str) or kind not in KEYS:
        raise read.refuse(
            f"{name}.rope_type={shown(kind)} is not supported (known: {', '.join(KEYS)})"
        )
    values.pop("finetuned", None)  # provenance, in the first YaRN checkpoints
    for key in values:
        if key not in KEYS[kind]:
            raise read.refuse(f"{name}.{key}={shown(values[key])} has no meaning for {kind}")
    if kind == "default":
        return None

    def number(key: str, default: float | None = None) -> float:
        if key not in values and default is None:
            raise read.refuse(f"{name}.{key} is missing for rope_type {kind}")
        return read.check_number(f"{name}.{key}", values.get(key, default))

    if kind in ("linear", "dynamic"):
        scaling = {"rope_type": kind, "factor": _factor(read, name, number("factor"))}
        if kind == "dynamic":
            # Up to here it is the default RoPE exactly; beyond, it would rewrite cached keys.
            scaling["original_max_position_embeddings"] = max_positions
            read.warn(
                f"{name}.rope_type dynamic: exact up to max_position_embeddings={max_positions}, "
                "longer texts are refused"
            )
        return scaling
    original = values.get("original_max_position_embeddings")
    beside = read.raw("original_max_position_embeddings")
    if None not in (original, beside) and original != beside:
        raise read.refuse(
            f"original_max_position_embeddings={shown(beside)} beside "
            f"{name}.original_max_position_embeddings={shown(original)}"
        )
    context = read.check_integer(
        f"{name}.original_max_position_embeddings",
        next(v for v in (original, beside, max_positions) if v is not None),
    )
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if high <= low:
            raise read.refuse(
                f"{name}.high_freq_factor={high:g} is not above low_freq_factor={low:g}"
            )
        return {
            "rope_type": kind,
            "factor": _factor(read, name, number("factor")),
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": context,
        }
    if kind == "longrope":
        return _longrope(read, name, values, context, max_positions, rotary_dim)
    fast, slow = number("beta_fast", 32.0), number("beta_slow", 1.0)
    if fast < slow:
        raise read.refuse(f"{name}.beta_fast={fast:g} is below beta_slow={slow:g}")
    truncate = values.get("truncate", True)
    if not isinstance(truncate, bool):
        raise read.refuse(f"{name}.truncate must be true or false, got {shown(truncate)}")
    optional = ("attention_factor", "mscale", "mscale_all_dim")
    return {
        "rope_type": kind,
        # DeepSeek's way: without a factor, the ratio of the two context lengths.
        "factor": _factor(read, name, number("factor", max_positions / context)),
        "original_max_position_embeddings": context,
        "beta_fast": fast,
        "beta_slow": slow,
        "truncate": truncate,
        **{key: number(key) for key in optional if key in values},
    }


def _longrope(
    read: ConfigReader,
    name: str,
    values: Mapping[str, Any],
    context: int,
    max_positions: int,
    rotary_dim: int,
) -> Mapping[str, Any]:
    """LongRoPE (Ding et al. 2024): a factor a frequency, others once texts outgrow ``context``."""
    lists = {}
    for key in ("short_factor", "long_factor"):
        given = values.get(key)
        if not isinstance(given, list) or len(given) != rotary_dim // 2:
            raise read.refuse(f"{name}.{key} must be a list of {rotary_dim // 2} numbers")
        lists[key] = tuple(read.check_number(f"{name}.{key}", x) for x in given)
    if max_positions > context:
        read.warn(
            f"{name}.rope_type longrope: exact up to original_max_position_embeddings={context}, "
            "longer texts are refused"
        )
    found: dict[str, Any] = {
        "rope_type": "longrope",
        "original_max_position_embeddings": context,
        # The ratio of the two context lengths, whatever ``factor`` says.
        "factor": _factor(read, name, max(1.0, max_positions / context)),
        **lists,
    }
    if "attention_factor" in values:
        found["attention_factor"] = read.check_number(
            f"{name}.attention_factor", values["attention_factor"]
        )
    return found


def _factor(read: ConfigReader, name: str, factor: float) -> float:
    if factor < 1:
        raise read.refuse(f"{name}.factor must be at least 1, got {factor:g}")
    return factor
