"""Safetensors checkpoints: headers checked before use, files mapped rather than read.

The format (https://github.com/huggingface/safetensors#format) is eight bytes of header length,
a JSON header, then the tensors. It is parsed here, in a page of Python, because we need the
offsets to map each group of tensors separately; a file the safetensors library refuses must be
refused here too, which a test checks on damaged files.

A mapped tensor costs no memory until touched, and its pages stay the file's: the kernel may drop
them under pressure. A mapping lives as long as any tensor in it. There are several per file, so
that a backend which packs the weights one by one gives the originals back as it goes. A file
must not be changed in place while it is mapped (replacing it by rename is fine).
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor

from skimp.errors import CheckpointError

DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
MAX_HEADER: Final = 100_000_000  # bytes, the safetensors library's own limit
MAX_JSON: Final = 64 << 20  # bytes of config.json or of an index
MAX_MAPPINGS: Final = 128  # about, for a checkpoint; each holds a file descriptor
SMALL: Final = 1 << 20  # bytes; mappings are not cut finer than this
SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
PICKLES: Final = ("pytorch_model", "consolidated", "model.ckpt", "tf_model", "flax_model")


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies: ``begin`` and ``end`` are absolute file offsets in bytes."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int
    identity: tuple[int, ...] = ()  # of the file when its header was checked


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of ours or anybody's; duplicate keys and NaN are refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice!r} is there twice")
        return found

    def constant(text: str) -> Any:
        raise ValueError(f"{text} is not JSON")

    check_regular(path)
    if path.stat().st_size > MAX_JSON:
        raise CheckpointError(f"{path}: {path.stat().st_size} bytes, more than {MAX_JSON}")
    try:
        text = path.read_bytes().decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except RecursionError:
        raise CheckpointError(f"{path}: nested too deeply") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def check_regular(path: Path) -> None:
    """Refuse a missing file, and what would block or surprise: a pipe, a device, a directory."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: not a regular file")


# ---- headers ----------------------------------------------------------------------------------


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file; CheckpointError if it is not sound."""
    check_regular(path)
    try:
        with path.open("rb") as file:
            identity = _identity(file)
            size = identity[2]
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER):
                raise CheckpointError(
                    f"{path}: truncated or not safetensors: {length} bytes of header in {size}"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    try:
        if not raw.startswith(b"{"):
            raise ValueError("it does not start with '{'")
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_names)
    except RecursionError:
        raise CheckpointError(f"{path}: header nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: header is not JSON: {error}") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
    data = 8 + length
    found = {name: _stored(path, name, entry, data, identity) for name, entry in header.items()}
    end = data
    for tensor in sorted(found.values(), key=lambda t: (t.begin, t.end)):
        if tensor.begin != end:
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} starts at byte {tensor.begin}, "
                f"the one before it ends at {end}"
            )
        end = tensor.end
    if end != size:
        raise CheckpointError(f"{path}: tensors end at byte {end}, the file has {size}")
    return found


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _identity(file: BinaryIO) -> tuple[int, int, int, int]:
    """What changes if the file is replaced or written to; the size is third."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _stored(
    path: Path, name: str, entry: Any, data: int, identity: tuple[int, ...]
) -> StoredTensor:
    """One header entry: a dtype we know, a shape, and offsets that fit both."""

    def bad(reason: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name!r}: {reason}")

    def sizes(key: str) -> list[int]:
        values = entry[key]
        if not isinstance(values, list) or not all(
            type(v) is int and 0 <= v < 2**63 for v in values
        ):
            raise bad(f"{key} must be a list of sizes")
        return values

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise bad("must have exactly dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise bad(f"dtype {entry['dtype']!r} is not supported (known: {', '.join(DTYPES)})")
    shape, offsets = sizes("shape"), sizes("data_offsets")
    if len(offsets) != 2 or len(shape) > 8:
        raise bad("needs two data_offsets and at most 8 dimensions")
    begin, end = offsets
    wanted = math.prod(shape) * dtype.itemsize
    if end - begin != wanted:
        raise bad(
            f"shape {shape} of {entry['dtype']} needs {wanted} bytes, offsets give {end - begin}"
        )
    if data + end > identity[2]:
        raise bad(f"ends at byte {data + end}, the file has {identity[2]}: truncated")
    return StoredTensor(
        name=name,
        file=path,
        dtype=dtype,
        shape=tuple(shape),
        begin=data + begin,
        end=data + end,
        identity=identity,
    )


# ---- directories ------------------------------------------------------------------------------


def read_directory(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a model directory: one file, or shards that agree with their index."""
    index, single = directory / INDEX_FILE, directory / SINGLE_FILE
    if index.exists() and single.exists():
        raise CheckpointError(f"{directory}: has both {SINGLE_FILE} and {INDEX_FILE}")
    if index.exists():
        return _read_shards(directory, index)
    if single.exists():
        return read_header(inside(directory, SINGLE_FILE))
    raise CheckpointError(f"{directory}: {_why_no_weights(directory)}")


def _read_shards(directory: Path, index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(inside(directory, INDEX_FILE)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be a non-empty object")
    shards: dict[str, dict[str, StoredTensor]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{index}: weight_map[{name!r}] must be a file name")
        if shard not in shards:
            shards[shard] = read_header(inside(directory, shard, index))
        if name not in shards[shard]:
            raise CheckpointError(f"{index}: tensor {name!r} is not in {shard}")
    found: dict[str, StoredTensor] = {}
    for shard, tensors in shards.items():
        for name, tensor in tensors.items():
            if name in found:
                raise CheckpointError(f"tensor {name!r} is in both {found[name].file} and {shard}")
            if name not in weight_map:
                raise CheckpointError(
                    f"{directory / shard}: tensor {name!r} is not in {index.name}"
                )
            found[name] = tensor
    return found


def inside(directory: Path, name: str, source: Path | None = None) -> Path:
    """The path of a file that must lie in the model directory, whatever links say.

    One exception: a Hub cache snapshot is made of links into the ``blobs`` beside it.
    """
    where = source or directory
    parts = Path(name).parts
    if not name or "\0" in name or "\\" in name or Path(name).is_absolute() or ".." in parts:
        raise CheckpointError(f"{where}: file name {name!r} leaves the model directory")
    path, root = directory / name, directory.resolve()
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{where}: file {name!r} is missing or a broken link") from error
    blobs = root.parent.parent / "blobs"
    hub = root.parent.name == "snapshots" and real.parent == blobs
    if not hub and not real.is_relative_to(root):
        raise CheckpointError(f"{where}: file {name!r} is a link out of the model directory")
    return path


def _why_no_weights(directory: Path) -> str:
    names = sorted(entry.name for entry in directory.iterdir())
    for name in names:
        if name.startswith(PICKLES) and not name.endswith((".json", ".safetensors")):
            return (
                f"only {name} and the like, which need unpickling, and unpickling can run code; "
                "convert to safetensors first"
            )
    for name in names:
        if name.endswith((".safetensors", ".gguf")):
            return f"{name} is there, but neither {SINGLE_FILE} nor {INDEX_FILE}"
    return f"no weights: neither {SINGLE_FILE} nor {INDEX_FILE}"


# ---- mapping ----------------------------------------------------------------------------------


def map_tensors(stored: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor, mapped, in file order; a mapping is dropped with the last tensor in it.

    Tensors are private to the process: writing to one never reaches the file.
    """
    if sys.byteorder != "little":
        raise CheckpointError("safetensors files are little-endian, this machine is not")
    names: dict[Path, list[tuple[str, StoredTensor]]] = {}
    for name, tensor in stored.items():
        names.setdefault(tensor.file, []).append((name, tensor))
    total = sum(tensor.end - tensor.begin for tensor in stored.values())
    group_bytes = max(SMALL, total // MAX_MAPPINGS)
    for path, tensors in names.items():
        tensors.sort(key=lambda item: item[1].begin)
        start = 0
        while start < len(tensors):
            # At least one tensor, then as many as fit, so there are about total / group_bytes.
            stop, begin = start + 1, tensors[start][1].begin
            while stop < len(tensors) and tensors[stop][1].end - begin <= group_bytes:
                stop += 1
            yield from _map_group(path, tensors[start:stop])
            start = stop


def _map_group(path: Path, group: list[tuple[str, StoredTensor]]) -> Iterator[tuple[str, Tensor]]:
    begin, end = group[0][1].begin, group[-1][1].end
    begin -= begin % mmap.ALLOCATIONGRANULARITY
    buffer = None
    if end > begin:
        try:
            with path.open("rb") as file:
                if _identity(file) != group[0][1].identity:
                    raise CheckpointError(f"{path}: changed while it was being read")
                pages = mmap.mmap(file.fileno(), end - begin, access=mmap.ACCESS_COPY, offset=begin)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be mapped: {error}") from error
        # The tensor holds the mapping; without another reference it is unmapped with the tensor.
        buffer = torch.frombuffer(pages, dtype=torch.uint8)
    for name, tensor in group:
        if buffer is None or tensor.begin == tensor.end:
            yield name, torch.empty(tensor.shape, dtype=tensor.dtype)
            continue
        data = buffer[tensor.begin - begin : tensor.end - begin]
        if data.data_ptr() % tensor.dtype.itemsize:
            data = data.clone()  # legal in the format, though no writer of ours does it
        yield name, data.view(tensor.dtype).view(tensor.shape)
