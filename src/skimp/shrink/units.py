"""Units on disk: what a step is shown and what it left, a few tensors in memory at a time."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from skimp.errors import ShrinkError
from skimp.formats import QuantizedWeight, WeightFormat
from skimp.model.checkpoint import StoredTensor, map_tensors, read_header
from skimp.model.loading import Stored
from skimp.model.manifest import file_sha256
from skimp.model.saving import sync_directory, write_tensors
from skimp.shrink.step import Tensors

PARTS = ("values", "scale", "zero")
Formats = Mapping[str, Mapping[str, Any]]  # name → fields of a low-bit matrix, in JSON


class Source(Protocol):
    """Where a step's input lies."""

    def names(self) -> list[str]:
        """Of all tensors."""
        ...

    def read(self, name: str) -> Tensor | QuantizedWeight:
        """One tensor, mapped."""
        ...


def unit_of(name: str) -> str:
    """The unit that a parameter is shown in, whichever a step left it in."""
    if name.startswith("layers."):
        return ".".join(name.split(".", 2)[:2])
    return "embed" if name.startswith("embed_tokens.") else "head"


def read_unit(source: Source, unit: str) -> dict[str, Tensor | QuantizedWeight]:
    return {name: source.read(name) for name in source.names() if unit_of(name) == unit}


class CheckpointSource:
    """The model that goes in."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self._names = stored.names()

    def names(self) -> list[str]:
        return self._names

    def read(self, name: str) -> Tensor | QuantizedWeight:
        ((_, value),) = self._stored.read([name])
        return value


class UnitFiles:
    """The files a step has written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, dict[str, StoredTensor]] = {}
        self._formats: dict[str, Mapping[str, Any]] = {}

    def write(self, index: int, tensors: Tensors) -> tuple[str, Formats]:
        """Put a unit on the disk; its file's SHA-256 and what must be remembered to read it."""
        flat: dict[str, Tensor] = {}
        formats: dict[str, Mapping[str, Any]] = {}
        for name, value in tensors.items():
            if isinstance(value, QuantizedWeight):
                fields = dataclasses.asdict(value.format)
                formats[name] = {"in_features": value.in_features, "format": fields}
                for part in PARTS:
                    if (tensor := getattr(value, part)) is not None:
                        flat[f"{name}:{part}"] = tensor
            else:
                flat[name] = value
        digest = write_file(self._path(index), flat)
        self.add(index, formats)
        return digest, formats

    def add(self, index: int, formats: Formats) -> None:
        """Know a unit that is on the disk already."""
        for key, place in read_header(self._path(index)).items():
            name, _, part = key.partition(":")
            self._places.setdefault(name, {})[part] = place
        self._formats |= formats

    def check(self, index: int, digest: str) -> None:
        check_file(self._path(index), digest)

    def _path(self, index: int) -> Path:
        return self.folder / f"unit-{index:05}.safetensors"

    def names(self) -> list[str]:
        return list(self._places)

    def read(self, name: str) -> Tensor | QuantizedWeight:
        parts = dict(map_tensors(self._places[name]))
        if name not in self._formats:
            return parts[""]
        fields = self._formats[name]
        return QuantizedWeight(
            format=WeightFormat(**fields["format"]),
            in_features=fields["in_features"],
            values=parts["values"],
            scale=parts["scale"],
            zero=parts.get("zero"),
        )


class OnDemand(Mapping[str, "Tensor | QuantizedWeight"]):
    """All tensors of a source, each mapped when it is asked for."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._names = dict.fromkeys(source.names())

    def __getitem__(self, name: str) -> Tensor | QuantizedWeight:
        if name not in self._names:
            raise KeyError(name)
        return self._source.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """A safetensors file, whole or not there, on the disk when this returns; its SHA-256."""
    partial = path.with_suffix(".partial")
    layouts = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    write_tensors(partial, layouts, lambda name: tensors[name])
    digest = file_sha256(partial)
    partial.replace(path)
    sync_directory(path.parent)
    return digest


def read_file(path: Path) -> dict[str, Tensor]:
    return dict(map_tensors(read_header(path)))


def check_file(path: Path, digest: str) -> None:
    """ShrinkError unless the file is as it was written."""
    found = file_sha256(path) if os.path.lexists(path) else None
    if found != digest:
        problem = "is missing" if found is None else "is not as it was written"
        raise ShrinkError(f"{path}: {problem}; use --restart to begin again")


def calibration_hash(tokens: Tensor | None) -> str | None:
    """SHA-256 of token ids."""
    import hashlib

    if tokens is None:
        return None
    return hashlib.sha256(tokens.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()
