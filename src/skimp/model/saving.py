"""Writing a checkpoint as a standard Hugging Face directory, whole or not at all.

Everything goes to a sibling directory first, ``config.json`` last, is flushed to the disk and
then renamed. A run killed half-way leaves at most a hidden directory that does not load.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor, nn

from skimp.errors import CheckpointError
from skimp.model import families
from skimp.model.checkpoint import DTYPES, INDEX_FILE, SINGLE_FILE, inside
from skimp.model.loading import CONFIG_FILE, FLOATS, GENERATION_FILE, empty_decoder
from skimp.model.spec import ModelSpec

# What travels with the weights: never code, never other exports of the weights.
COMPANIONS: Final = (
    GENERATION_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
SHARD_BYTES: Final = 5 * 10**9
DTYPE_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


def save_checkpoint(
    directory: Path | str,
    spec: ModelSpec,
    tensors: Mapping[str, Tensor] | nn.Module,
    *,
    tokenizer_files_from: Path | str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write ``directory``, which must not exist or be empty, and return it.

    ``tensors`` is a decoder or a mapping from our parameter names, read one tensor at a time, so
    it may make them on demand. The tokenizer's files, the chat template and
    ``generation_config.json`` are copied from ``tokenizer_files_from``. ``config.json`` gets the
    dtype the tensors have. Raises ConfigError if the family cannot express the spec,
    CheckpointError if tensors are missing or of the wrong shape, or the directory is taken.
    """
    directory = Path(directory)
    if directory.is_symlink() or (directory.exists() and not _is_empty(directory)):
        raise CheckpointError(f"{directory}: exists already and is not an empty directory")
    if isinstance(tensors, nn.Module):
        tensors = dict(tensors.named_parameters())
    layouts = _check(spec, tensors)
    dtypes = {dtype for dtype, _ in layouts.values()}
    if len(dtypes) == 1:
        spec = dataclasses.replace(spec, dtype=str(dtypes.pop()).removeprefix("torch."))
    config = families.to_config(spec)  # before any work, since the class may not be able to
    stored = families.tensor_names(spec)
    with _appearing(directory) as partial:
        if tokenizer_files_from is not None:
            _copy_companions(Path(tokenizer_files_from), partial)
        shards = _plan(layouts, shard_bytes)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            file = file if len(shards) > 1 else SINGLE_FILE
            _write_shard(partial / file, names, layouts, tensors, stored)
            weight_map |= {stored[name]: file for name in names}
        if len(shards) > 1:
            total = sum(_nbytes(*layout) for layout in layouts.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_json(partial / INDEX_FILE, index)
        _write_json(partial / CONFIG_FILE, config)
    return directory


def _check(
    spec: ModelSpec, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Each tensor's dtype and shape, once they are those of the spec's decoder."""
    wanted = {name: p.shape for name, p in empty_decoder(spec).named_parameters()}
    missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing:
        raise CheckpointError(f"tensor {missing[0]!r} is missing, or a backend has packed it")
    if extra:
        raise CheckpointError(f"tensor {extra[0]!r} has no place in this {spec.family} spec")
    layouts = {}
    for name, shape in wanted.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"tensor {name!r} has shape {list(tensor.shape)}, the spec wants {list(shape)}"
            )
        if tensor.dtype not in FLOATS:
            raise CheckpointError(f"tensor {name!r} is {tensor.dtype}, which no config can name")
        layouts[name] = (tensor.dtype, tensor.shape)
    return layouts


def _nbytes(dtype: torch.dtype, shape: torch.Size) -> int:
    return dtype.itemsize * shape.numel()


def _plan(
    layouts: Mapping[str, tuple[torch.dtype, torch.Size]], shard_bytes: int
) -> list[list[str]]:
    """Names by shard, in the decoder's order, so that the plan depends on the spec alone."""
    shards: list[list[str]] = []
    size = shard_bytes
    for name, layout in layouts.items():
        if not shards or size + _nbytes(*layout) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _nbytes(*layout)
    return shards


def _write_shard(
    path: Path,
    names: Sequence[str],
    layouts: Mapping[str, tuple[torch.dtype, torch.Size]],
    tensors: Mapping[str, Tensor],
    stored: Mapping[str, str],
) -> None:
    """One safetensors file, a tensor at a time. Wider dtypes come first, so all are aligned."""
    names = sorted(names, key=lambda name: -layouts[name][0].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        dtype, shape = layouts[name]
        end = offset + _nbytes(dtype, shape)
        header[stored[name]] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in names:
            tensor = tensors[name].detach().cpu().contiguous()
            if (tensor.dtype, tensor.shape) != layouts[name]:
                raise CheckpointError(f"tensor {name!r} changed while it was being written")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        _flush(file)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("wb") as file:
        file.write((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
        _flush(file)


def _copy_companions(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise CheckpointError(f"{source}: not a directory to copy tokenizer files from")
    for name in COMPANIONS:
        if (source / name).exists():
            with inside(source, name).open("rb") as read, (target / name).open("wb") as write:
                shutil.copyfileobj(read, write)
                _flush(write)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _is_empty(directory: Path) -> bool:
    return directory.is_dir() and not any(directory.iterdir())


@contextlib.contextmanager
def _appearing(directory: Path) -> Iterator[Path]:
    """A hidden sibling that becomes ``directory`` if the block succeeds, and is removed if not."""
    parent = directory.absolute().parent
    partial = parent / f".{directory.name}.{secrets.token_hex(4)}.partial"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise CheckpointError(f"{partial}: cannot be made: {error.strerror}") from error
    try:
        try:
            yield partial
            _sync_directory(partial)
            partial.rename(directory)
        except OSError as error:
            raise CheckpointError(f"{directory}: not written: {error}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync_directory(parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
