"""Writing a checkpoint as a standard Hugging Face directory, whole or not at all.

Everything goes to a sibling directory first, the manifest last, is flushed to the disk and
then renamed. A run killed half-way leaves at most a hidden directory that does not load.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor, nn

from skimp.errors import CheckpointError
from skimp.formats import QuantizedWeight, compressed_tensors
from skimp.model import families
from skimp.model.checkpoint import DTYPES, INDEX_FILE, SINGLE_FILE, inside
from skimp.model.layers import Linear
from skimp.model.loading import (
    CONFIG_FILE,
    FLOATS,
    GENERATION_FILE,
    keeps_float32,
    parameter_shapes,
)
from skimp.model.manifest import write_manifest
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
    tensors: Mapping[str, Tensor | QuantizedWeight] | nn.Module,
    *,
    tokenizer_files_from: Path | str | None = None,
    shard_bytes: int = SHARD_BYTES,
    more_files: Mapping[str, str] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``directory``, which must not exist or be empty, and return it.

    ``tensors`` is a decoder or a mapping from our parameter names, read one tensor at a time (and
    more than once), so it may make them on demand; matrices in the spec's low-bit formats stand
    under their weights' names and are written as compressed-tensors. The tokenizer's files, the
    chat template and ``generation_config.json`` are copied from ``tokenizer_files_from``;
    ``more_files`` maps names to texts. ``config.json`` gets the dtype the tensors have. The last
    file written is a manifest of all the others, with ``about`` in it. Raises ConfigError if the
    family cannot express the spec, CheckpointError if tensors are missing or of the wrong shape
    or format, or
    the directory is taken.
    """
    directory = Path(directory)
    check_free(directory)
    if isinstance(tensors, nn.Module):
        tensors = module_tensors(tensors)
    pieces = _pieces(spec, tensors)
    dtypes = {p.dtype for p in pieces if p.part is None and not keeps_float32(p.name)}
    if len(dtypes) == 1:
        spec = dataclasses.replace(spec, dtype=str(dtypes.pop()).removeprefix("torch."))
    config = families.to_config(spec)  # before any work, since the class may not be able to
    with appearing(directory) as partial:
        if tokenizer_files_from is not None:
            _copy_companions(Path(tokenizer_files_from), partial)
        shards = _plan(pieces, shard_bytes)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            file = file if len(shards) > 1 else SINGLE_FILE
            _write_shard(partial / file, shard, tensors)
            weight_map |= {piece.stored: file for piece in shard}
        if len(shards) > 1:
            total = sum(piece.nbytes for piece in pieces)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(partial / INDEX_FILE, index)
        for name, text in (more_files or {}).items():
            _write_text(partial / name, text)
        write_json(partial / CONFIG_FILE, config)
        write_manifest(partial, about or {})
    return directory


@dataclass(frozen=True)
class _Piece:
    """One tensor of the files: of our parameter ``name``, or that part of a low-bit matrix."""

    name: str
    part: str | None
    stored: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def _pieces(spec: ModelSpec, tensors: Mapping[str, Tensor | QuantizedWeight]) -> list[_Piece]:
    """What to write, in the decoder's order, once it is what the spec says."""
    wanted = parameter_shapes(spec)
    stored = families.tensor_names(spec)
    missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing:
        raise CheckpointError(f"tensor {missing[0]!r} is missing, or a backend has packed it")
    if extra:
        raise CheckpointError(f"tensor {extra[0]!r} has no place in this {spec.family} spec")
    pieces: list[_Piece] = []
    for name, shape in wanted.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"tensor {name!r} has shape {list(tensor.shape)}, the spec wants {list(shape)}"
            )
        form = spec.formats.get(name.removesuffix(".weight"))
        found = tensor.format if isinstance(tensor, QuantizedWeight) else None
        if found != form:
            told = [f.name if f is not None else "dense" for f in (found, form)]
            raise CheckpointError(f"tensor {name!r} is {told[0]}, the spec says {told[1]}")
        if isinstance(tensor, QuantizedWeight):
            module = stored[name].removesuffix(".weight")
            pieces += [
                _Piece(name, part, f"{module}.{part}", value.dtype, tuple(value.shape))
                for part, value in compressed_tensors.encode(tensor)
            ]
            continue
        if tensor.dtype not in FLOATS:
            raise CheckpointError(f"tensor {name!r} is {tensor.dtype}, which no config can name")
        pieces.append(_Piece(name, None, stored[name], tensor.dtype, shape))
    return pieces


def _plan(pieces: Sequence[_Piece], shard_bytes: int) -> list[list[_Piece]]:
    """Pieces by shard, in the decoder's order, so that the plan depends on the spec alone."""
    shards: list[list[_Piece]] = []
    size = shard_bytes
    for piece in pieces:
        if not shards or size + piece.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.nbytes
    return shards


def _write_shard(
    path: Path, pieces: Sequence[_Piece], tensors: Mapping[str, Tensor | QuantizedWeight]
) -> None:
    def read(piece: _Piece) -> Tensor:
        whole = tensors[piece.name]
        if isinstance(whole, QuantizedWeight):
            assert piece.part is not None
            return dict(compressed_tensors.encode(whole))[piece.part]
        return whole

    layouts = {piece.stored: (piece.dtype, piece.shape) for piece in pieces}
    by_name = {piece.stored: piece for piece in pieces}
    write_tensors(path, layouts, lambda name: read(by_name[name]))


def write_tensors(
    path: Path,
    layouts: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    read: Callable[[str], Tensor],
) -> None:
    """A safetensors file on the disk, written a tensor at a time. Wider dtypes come first, so all
    are aligned; the bytes depend on the arguments alone."""
    names = sorted(layouts, key=lambda name: -layouts[name][0].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        dtype, shape = layouts[name]
        end = offset + dtype.itemsize * math.prod(shape)
        header[name] = {
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
            tensor = read(name).detach().cpu().contiguous()
            if (tensor.dtype, tuple(tensor.shape)) != layouts[name]:
                raise CheckpointError(f"tensor {name!r} changed while it was being written")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        flush(file)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    _write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    with path.open("wb") as file:
        file.write(text.encode())
        flush(file)


def _copy_companions(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise CheckpointError(f"{source}: not a directory to copy tokenizer files from")
    for name in COMPANIONS:
        if (source / name).exists():
            with inside(source, name).open("rb") as read, (target / name).open("wb") as write:
                shutil.copyfileobj(read, write)
                flush(write)


def module_tensors(module: nn.Module) -> dict[str, Tensor | QuantizedWeight]:
    """The parameters of a decoder, low-bit matrices included."""
    found: dict[str, Tensor | QuantizedWeight] = dict(module.named_parameters())
    for name, child in module.named_modules():
        if isinstance(child, Linear) and child.quantized is not None:
            found[f"{name}.weight"] = child.quantized
    return found


def flush(file: BinaryIO) -> None:
    """Onto the disk."""
    file.flush()
    os.fsync(file.fileno())


def check_free(directory: Path) -> None:
    """CheckpointError if ``directory`` is there and not empty."""
    empty = directory.is_dir() and not any(directory.iterdir())
    if directory.is_symlink() or (directory.exists() and not empty):
        raise CheckpointError(f"{directory}: exists already and is not an empty directory")


@contextlib.contextmanager
def appearing(directory: Path, *, replace: bool = False) -> Iterator[Path]:
    """A hidden sibling that becomes ``directory`` if the block succeeds, and is removed if not.
    ``replace``: what is at ``directory`` goes when the new one is whole."""
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
            sync_directory(partial)
            if replace and directory.exists():
                old = partial.with_suffix(".old")
                directory.rename(old)
                partial.rename(directory)
                shutil.rmtree(old)
            else:
                partial.rename(directory)
        except OSError as error:
            raise CheckpointError(f"{directory}: not written: {error}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_directory(parent)


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
