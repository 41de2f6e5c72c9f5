"""Recipes: YAML lists of steps, checked before anything is touched.

A recipe is a list, ``- quantize: {format: int4, method: gptq}``, or a mapping that holds the list
as ``steps`` beside ``calibration`` and ``seed``. Every mistake is one line that names the file,
the step and the field.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from skimp.errors import ShrinkError, shown
from skimp.shrink.step import Step, WholeStep

STEPS: Final[Mapping[str, str]] = {
    "quantize": "skimp.shrink.quantize:Quantize",
    "smooth": "skimp.shrink.smooth:Smooth",
    "rotate": "skimp.shrink.rotate:Rotate",
    "cache": "skimp.shrink.cache:Cache",
    "gqa": "skimp.shrink.gqa:Gqa",
    "mla": "skimp.shrink.mla:Mla",
    "local": "skimp.shrink.local:Local",
    "heal": "skimp.shrink.heal:Heal",
}
MAX_BYTES: Final = 1 << 16
MAX_STEPS: Final = 64
TOP: Final = ("calibration", "seed", "steps")


class Calibration(BaseModel):
    """What steps measure activations on: ``samples`` pieces of ``tokens`` tokens each, of a
    ``text`` file, of a ``chat`` file (a JSON object with ``messages`` a line), or, by default, of
    the text that comes with skimp. Without ``samples``, up to 128, as far as the text goes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str | None = None
    chat: str | None = None
    samples: int | None = Field(default=None, ge=1, le=1 << 16)
    tokens: int = Field(default=512, ge=8, le=1 << 20)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.text is not None and self.chat is not None:
            raise ValueError("chat: text is given too, and only one of them can be")
        return self


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    calibration: Calibration = Calibration()
    seed: int = Field(default=0, ge=0, lt=2**31)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """``text`` is the file as it stands; the file that ``calibration`` names is resolved."""

    name: str
    text: str
    steps: tuple[Step | WholeStep, ...]
    calibration: Calibration
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """The parameters as given, in JSON (null is not always the default). Which calibration
        text does not count: the pipeline hashes the tokens that came of it."""
        steps = [
            {step.kind: cast(Any, step).model_dump(mode="json", exclude_unset=True)}
            for step in self.steps
        ]
        size = {"samples": self.calibration.samples, "tokens": self.calibration.tokens}
        return {"steps": steps, "calibration": size, "seed": self.seed}


def load_recipe(path: Path | str, registry: Mapping[str, str] = STEPS) -> Recipe:
    """The recipe of a file. Raises ShrinkError; ``registry`` maps a step's name to
    ``module:class``."""
    path = Path(path)
    if not path.is_file():
        raise ShrinkError(f"{path}: no such file")
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ShrinkError(f"{path}: more than {MAX_BYTES} bytes, which no recipe needs")
    try:
        return parse_recipe(raw.decode("utf-8"), path.name, path.parent, registry)
    except UnicodeDecodeError as error:
        raise ShrinkError(f"{path}: not UTF-8 at byte {error.start}") from None


def parse_recipe(text: str, name: str, folder: Path, registry: Mapping[str, str] = STEPS) -> Recipe:
    """The recipe of a text; file names in it are relative to ``folder``."""
    value = _read_yaml(text, name)
    settings: dict[str, Any] = {}
    if isinstance(value, dict):
        _check_plain(value, name)
        settings = {key: item for key, item in value.items() if key != "steps"}
        unknown = [key for key in settings if key not in TOP]
        if unknown:
            raise ShrinkError(f"{name}: {unknown[0]}: unknown field; allowed: {', '.join(TOP)}")
        if "steps" not in value:
            raise ShrinkError(f"{name}: steps: missing; a recipe is a list of steps or holds one")
        value = value["steps"]
        where = f"{name}: steps"
    else:
        where = name
    if not isinstance(value, list):
        raise ShrinkError(f"{where}: must be a list of steps, not {_kind(value)}")
    if not value:
        raise ShrinkError(f"{where}: must hold at least one step")
    if len(value) > MAX_STEPS:
        raise ShrinkError(f"{where}: {len(value)} steps, more than {MAX_STEPS}")
    steps = tuple(
        _step(item, f"{name}: step {i}", registry, folder) for i, item in enumerate(value, 1)
    )
    found = _validate(_Settings, settings, name)
    return Recipe(
        name=name,
        text=text,
        steps=steps,
        calibration=_resolved(found.calibration, name, folder),
        seed=found.seed,
    )


def _resolved(calibration: Calibration, name: str, folder: Path) -> Calibration:
    for field in ("text", "chat"):
        given = getattr(calibration, field)
        if given is None:
            continue
        if not given or "\0" in given:
            raise ShrinkError(f"{name}: calibration.{field}: {shown(given)} is not a file name")
        path = folder / Path(given).expanduser()
        if not path.is_file():
            raise ShrinkError(f"{name}: calibration.{field}: {path}: no such file")
        return calibration.model_copy(update={field: str(path)})
    return calibration


def _step(item: Any, where: str, registry: Mapping[str, str], folder: Path) -> Step | WholeStep:
    known = ", ".join(registry)
    if isinstance(item, str):
        item = {item: None}
    if not isinstance(item, dict):
        raise ShrinkError(f"{where}: must be one of {known} with its fields, not {_kind(item)}")
    if len(item) != 1:
        raise ShrinkError(
            f"{where}: must have one key, the step's name, not {len(item)} "
            f"({', '.join(shown(key) for key in list(item)[:4])}); write its fields in braces"
        )
    kind, fields = next(iter(item.items()))
    if not isinstance(kind, str) or kind not in registry:
        raise ShrinkError(f"{where}: unknown step {shown(kind)}; known: {known}")
    where = f"{where} ({kind})"
    if fields is not None and not isinstance(fields, dict):
        raise ShrinkError(f"{where}: fields must be a mapping, not {_kind(fields)}")
    module, _, name = registry[kind].partition(":")
    model = getattr(importlib.import_module(module), name)
    _check_plain(fields or {}, where)
    step = _validate(model, fields or {}, where)
    if not isinstance(step, WholeStep):
        return cast(Step, step)
    try:
        return step.located(folder)
    except ValueError as error:
        raise ShrinkError(f"{where}: {error}") from None


def _validate(model: Any, fields: dict[str, Any], where: str) -> Any:
    # Strict, so that "128" is no number; by way of JSON, where strictness lets lists be tuples.
    try:
        return model.model_validate_json(json.dumps(fields), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    at = [str(part) for part in first["loc"]]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        owner = _owner(model, at[:-1])
        message = f"unknown field; allowed: {', '.join(owner.model_fields) or 'none'}"
    elif first["type"] == "missing":
        message = "missing; this step needs it"
    elif first["type"] != "value_error":
        message = f"{message}, not {shown(first['input'])}"
    # A union adds the branch that failed to the place; the field is what was written.
    field = ".".join(_written(fields, at))
    raise ShrinkError(f"{where}: {field}: {message}" if field else f"{where}: {message}")


def _owner(model: Any, at: list[str]) -> Any:
    for part in at:
        model = model.model_fields[part].annotation
    return model


def _written(value: Any, at: list[str]) -> list[str]:
    """The part of a place that is keys and indices of ``value``, and a key that is missing."""
    found: list[str] = []
    for part in at:
        if isinstance(value, dict):
            found.append(part)
            value = value.get(part)
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            found.append(part)
            value = value[int(part)]
        else:
            break
    return found


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", type(None): "nothing"}
    return names.get(type(value), shown(value))


def _check_plain(value: Any, where: str, field: str = "") -> None:
    """Refuse what is no JSON: dates, bytes, NaN, keys that are not text."""
    at = f"{where}: {field}: " if field else f"{where}: "
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ShrinkError(f"{at}{shown(key)}: a field's name must be text")
            _check_plain(item, where, f"{field}.{key}" if field else key)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_plain(item, where, f"{field}.{i}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ShrinkError(f"{at}{value} is not a number")
    elif value is not None and not isinstance(value, str | int | float):
        raise ShrinkError(f"{at}{shown(value)} is neither text nor a number")


# ---- YAML -------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases (which can make a small file huge), merges and duplicate keys,
    and with the numbers of YAML 1.2 (``1e-2``)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(None, None, "aliases are not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def flatten_mapping(self, node: Any) -> None:
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(None, None, "'<<' is not allowed", key.start_mark)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(None, None, "a key must be text", key.start_mark)
            if (key.tag, key.value) in seen:
                problem = f"{shown(key.value)} is there twice"
                raise yaml.MarkedYAMLError(None, None, problem, key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _read_yaml(text: str, name: str) -> Any:
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark is not None else ""
        raise ShrinkError(f"{name}: {line}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ShrinkError(f"{name}: not YAML: {error}") from None
    except RecursionError:
        raise ShrinkError(f"{name}: nested too deeply") from None
    except ValueError as error:  # a date or an integer that Python has no room for
        raise ShrinkError(f"{name}: not YAML: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()
