"""From a model directory to a :class:`~skimp.model.decoder.Decoder`.

Strict: a missing, extra, mis-shaped or wrongly typed tensor is a CheckpointError that names it.
Weights are mapped from their files and become parameters without a copy where the dtype agrees.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from skimp.errors import CheckpointError, ConfigError
from skimp.model import families
from skimp.model.checkpoint import StoredTensor, inside, map_tensors, read_directory, read_json
from skimp.model.families.reader import ConfigReader
from skimp.model.spec import ModelSpec

if TYPE_CHECKING:
    from skimp.model.decoder import Decoder

FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)
CONFIG_FILE: Final = "config.json"
GENERATION_FILE: Final = "generation_config.json"
RANDOM_CHUNK: Final = 1 << 21  # weights drawn from one generator


def load_config(directory: Path | str) -> dict[str, Any]:
    """The ``config.json`` of a model directory, as it stands."""
    directory = _directory(directory)
    if not (directory / CONFIG_FILE).exists():
        raise CheckpointError(f"{directory}: no {CONFIG_FILE}")
    return read_json(inside(directory, CONFIG_FILE))


def load_spec(directory: Path | str) -> ModelSpec:
    """The spec of a model directory. Raises ConfigError or CheckpointError."""
    directory = _directory(directory)
    config = load_config(directory)
    try:
        return families.to_spec(config)
    except ConfigError as error:
        raise ConfigError(f"{directory / CONFIG_FILE}: {error}") from error


def stop_token_ids(directory: Path | str, spec: ModelSpec) -> tuple[int, ...]:
    """The end tokens of the spec and, after them, those only ``generation_config.json`` names.

    Chat models often list the end of a turn there and nowhere else.
    """
    directory = _directory(directory)
    if not (directory / GENERATION_FILE).exists():
        return spec.eos_token_ids
    read = ConfigReader("generation", read_json(inside(directory, GENERATION_FILE)))
    more = read.token_ids("eos_token_id", None, spec.vocab_size)
    return tuple(dict.fromkeys(spec.eos_token_ids + more))


def load_decoder(directory: Path | str, *, dtype: torch.dtype | str = "auto") -> Decoder:
    """A decoder with the directory's weights, on the CPU.

    ``dtype`` "auto" keeps bfloat16 and float32 and turns float16 into float32, for which a CPU
    has fast kernels; a checkpoint of several dtypes becomes the config's one.
    """
    spec = load_spec(directory)
    decoder = empty_decoder(spec)
    target = None if dtype == "auto" else as_dtype(dtype)
    stored = load_stored(directory, spec, decoder)
    if target is None:
        found = {tensor.dtype for tensor in stored.values()}
        target = found.pop() if len(found) == 1 else as_dtype(spec.dtype)
        if target == torch.float16:
            target = torch.float32
    for name, tensor in map_tensors(stored):
        assign(decoder, name, tensor.to(target))
        del tensor  # or the last mapping would outlive this loop's next step
    return decoder


def load_stored(
    directory: Path | str, spec: ModelSpec, decoder: Decoder
) -> dict[str, StoredTensor]:
    """Our parameter name → its place in the files, checked against the decoder's shapes."""
    directory = _directory(directory)
    ours = {theirs: name for name, theirs in families.tensor_names(spec).items()}
    rename = families.family_of(load_config(directory)).stored_name
    stored: dict[str, StoredTensor] = {}
    extra: list[StoredTensor] = []
    for raw, tensor in read_directory(directory).items():
        theirs = rename(raw)
        if theirs is None:
            continue
        name = ours.get(theirs)
        if name is None:
            extra.append(tensor)
        elif name in stored:
            raise CheckpointError(f"{tensor.file}: {raw!r} and {stored[name].name!r} are the same")
        else:
            stored[name] = tensor
    wanted = {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}
    assert set(wanted) == set(ours.values()), "family and decoder disagree on parameter names"
    missing = [theirs for theirs, name in ours.items() if name not in stored]
    extra = [tensor for tensor in extra if not _is_tied_head(tensor, spec, stored)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        hint = f"; found {extra[0].name!r}, which the config has no place for" if extra else ""
        raise CheckpointError(f"{directory}: tensor {missing[0]!r}{more} missing{hint}")
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise CheckpointError(
            f"{extra[0].file}: the config has no place for tensor {extra[0].name!r}{more}"
        )
    for name, tensor in stored.items():
        if tensor.shape != wanted[name]:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r} has shape {list(tensor.shape)}, "
                f"the config wants {list(wanted[name])}"
            )
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r} is {tensor.dtype}, "
                f"weights must be one of {', '.join(map(str, FLOATS))}"
            )
    return stored


def _is_tied_head(tensor: StoredTensor, spec: ModelSpec, stored: Mapping[str, Any]) -> bool:
    """Some exports write a tied output matrix a second time; tolerated if it is the same."""
    table = stored.get("embed_tokens.weight")
    if not spec.tie_embeddings or tensor.name.rpartition("lm_head.")[2] != "weight" or not table:
        return False
    if tensor.shape != table.shape or tensor.dtype != table.dtype:
        return False
    pair = dict(map_tensors({"head": tensor})) | dict(map_tensors({"table": table}))
    if not torch.equal(pair["head"], pair["table"]):
        raise CheckpointError(
            f"{tensor.file}: tie_word_embeddings is true, but {tensor.name!r} differs from "
            f"{table.name!r}"
        )
    return True


def empty_decoder(spec: ModelSpec) -> Decoder:
    """A decoder whose parameters have shapes but no storage; see :func:`assign`."""
    from skimp.model.decoder import Decoder

    with torch.device("meta"):
        return Decoder(spec)


def assign(decoder: nn.Module, name: str, tensor: Tensor) -> None:
    """Make ``tensor`` the parameter ``name``, without a copy."""
    path, _, attribute = name.rpartition(".")
    setattr(decoder.get_submodule(path), attribute, nn.Parameter(tensor, requires_grad=False))


def random_decoder(spec: ModelSpec, seed: int = 0, dtype: torch.dtype | str = "float32") -> Decoder:
    """A decoder with weights as at the start of training: matrices N(0, 0.02), norms near 1,
    biases and sinks small. The same seed gives the same weights in every dtype, up to rounding,
    and whatever the number of threads."""
    target = as_dtype(dtype)
    decoder = empty_decoder(spec)
    seeds = torch.Generator().manual_seed(seed)
    chunks: list[tuple[Tensor, float, int]] = []
    for name, parameter in list(decoder.named_parameters()):
        tensor = torch.empty(parameter.shape, dtype=target)
        mean = 1.0 if "norm" in name and not spec.norm_plus_one else 0.0
        pieces = tensor.view(-1).split(RANDOM_CHUNK)
        for piece, draw in zip(pieces, torch.randint(2**62, (len(pieces),), generator=seeds)):
            chunks.append((piece, mean, int(draw)))
        assign(decoder, name, tensor)

    def fill(chunk: tuple[Tensor, float, int]) -> None:
        piece, mean, draw = chunk
        generator = torch.Generator().manual_seed(draw)
        piece.copy_(torch.empty(len(piece)).normal_(mean, 0.02, generator=generator))

    # One call fills on one thread, without Python's lock.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fill, chunks))
    return decoder


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """One of the dtypes weights may have, from its name or itself."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in FLOATS:
        raise ConfigError(f"dtype={dtype!r} is not one of float32, bfloat16, float16")
    assert isinstance(found, torch.dtype)
    return found


def _directory(directory: Path | str) -> Path:
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: not a directory")
    return directory
