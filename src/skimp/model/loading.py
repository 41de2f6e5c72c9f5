"""From a model directory to a :class:`~skimp.model.decoder.Decoder`.

Strict: a missing, extra, mis-shaped or wrongly typed tensor is a CheckpointError that names it.
Weights are mapped from their files and become parameters without a copy where the dtype agrees.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from skimp.errors import CheckpointError, ConfigError, SkimpWarning
from skimp.formats import QuantizedWeight, WeightFormat, mxfp4, quantize
from skimp.formats.checkpoints import Part, Spelling, spelling
from skimp.model import families
from skimp.model.checkpoint import StoredTensor, inside, map_tensors, read_directory, read_json
from skimp.model.families.reader import ConfigReader
from skimp.model.layers import Linear
from skimp.model.spec import ModelSpec

if TYPE_CHECKING:
    from skimp.model.decoder import Decoder

FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)
CONFIG_FILE: Final = "config.json"
GENERATION_FILE: Final = "generation_config.json"
FUSED: Final = (".experts.gate_up_proj", ".experts.down_proj")
CACHE_SCALES: Final = (".k_scale", ".v_scale")
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
        found = {t.dtype for name, t in stored.dense.items() if not keeps_float32(name)}
        target = found.pop() if len(found) == 1 else as_dtype(spec.dtype)
        if target == torch.float16:
            target = torch.float32
    formats = dict(spec.formats)
    for name, value in stored.read():
        if isinstance(value, Tensor):
            assign(decoder, name, value.to(torch.float32 if keeps_float32(name) else target))
            formats.pop(name.removesuffix(".weight"), None)  # none of ours could hold it
        else:
            linear = decoder.get_submodule(name.removesuffix(".weight"))
            assert isinstance(linear, Linear)
            linear.quantized = value
        del value  # or the last mapping would outlive this loop's next step
    decoder.spec = replace(spec, formats=formats)
    return decoder


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where a model's tensors lie, by our parameter names: dense ones, and the parts of those in
    low-bit formats."""

    dense: dict[str, StoredTensor]
    parts: dict[str, dict[str, StoredTensor]]
    formats: Mapping[str, WeightFormat]
    shapes: Mapping[str, tuple[int, ...]]
    spelling: Spelling | None

    def names(self) -> list[str]:
        """Our parameter names, the low-bit matrices under their weights'."""
        return [*self.dense, *self.parts]

    def read(
        self, names: Collection[str] | None = None
    ) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        """Each tensor (of ``names``, or all), mapped, in file order; a low-bit matrix when its
        last part is there."""
        wanted = set(self.names() if names is None else names)
        flat = {name: tensor for name, tensor in self.dense.items() if name in wanted}
        part_of: dict[str, tuple[str, str]] = {}
        for name, parts in self.parts.items():
            if name not in wanted:
                continue
            for part, place in parts.items():
                key = f"{name}:{part}"
                flat[key], part_of[key] = place, (name, part)
        waiting: dict[str, dict[str, Tensor]] = {}
        for key, tensor in map_tensors(flat):
            if key not in part_of:
                yield key, tensor
                continue
            name, part = part_of[key]
            found = waiting.setdefault(name, {})
            found[part] = tensor
            if len(found) == len(self.parts[name]):
                yield name, self._decode(name, waiting.pop(name))
            del found, tensor

    def _decode(self, name: str, parts: dict[str, Tensor]) -> Tensor | QuantizedWeight:
        matrix = name.removesuffix(".weight")
        try:
            if matrix not in self.formats:
                return mxfp4.decode(self.shapes[name], parts)
            assert self.spelling is not None
            n, k = self.shapes[name]
            return self.spelling.decode(self.formats[matrix], (n, k), parts)
        except CheckpointError as error:
            file = next(iter(self.parts[name].values())).file
            raise CheckpointError(f"{file}: {matrix}: {error}") from None


def load_stored(directory: Path | str, spec: ModelSpec, decoder: Decoder) -> Stored:
    """Each parameter's place in the files, checked against the decoder's shapes."""
    directory = _directory(directory)
    config = load_config(directory)
    speller = spelling(config["quantization_config"]) if spec.formats else None
    shapes = parameter_shapes(spec)
    stored_as = families.tensor_names(spec)
    ours = {theirs: name for name, theirs in stored_as.items()}
    assert set(shapes) == set(ours.values()), "family and decoder disagree on parameter names"
    places: dict[str, tuple[str, str]] = {}  # a part's name in the files: our name, the part
    wanted: dict[str, dict[str, Part]] = {}
    for matrix, form in spec.formats.items():
        assert speller is not None
        name = f"{matrix}.weight"
        n, k = shapes[name]
        wanted[name] = speller.parts(form, (n, k))
        module = stored_as[name].removesuffix(".weight")
        del ours[stored_as[name]]
        places |= {f"{module}.{part}": (name, part) for part in wanted[name]}
    if mxfp4.is_named(config.get("quantization_config")):
        for name in (n for n in shapes if n.endswith(FUSED)):
            wanted[name] = mxfp4.parts(shapes[name])
            places |= {f"{stored_as[name]}_{part}": (name, part) for part in wanted[name]}
    stored_name = families.family_of(config).stored_name

    def rename(name: str) -> str | None:
        return stored_name(name, spec)

    dense: dict[str, StoredTensor] = {}
    parts: dict[str, dict[str, StoredTensor]] = {name: {} for name in wanted}
    extra: list[StoredTensor] = []
    superseded = 0
    for raw, tensor in read_directory(directory).items():
        theirs = rename(raw)
        if theirs is None:
            continue
        if theirs in ours:
            into, key = dense, ours[theirs]
        elif theirs in places:
            name, key = places[theirs]
            into = parts[name]
        elif spec.cache_format is not None and theirs.endswith(CACHE_SCALES):
            superseded += 1
            continue
        else:
            extra.append(tensor)
            continue
        if key in into:
            raise CheckpointError(f"{tensor.file}: {raw!r} and {into[key].name!r} are the same")
        into[key] = tensor
    if superseded:
        message = (
            f"{directory}: {superseded} fixed cache scales are skipped: skimp scales each token"
        )
        warnings.warn(message, SkimpWarning, stacklevel=2)
    missing = [t for t, name in ours.items() if name not in dense and not parts.get(name)]
    missing += [
        theirs
        for theirs, (name, part) in places.items()
        if (wanted[name][part].required or (name not in dense and stored_as[name] in ours))
        and part not in parts[name]
        and wanted[name][part].instead not in parts[name]
    ]
    extra = [
        tensor
        for tensor in extra
        if not _is_tied_head(tensor, spec, dense) and not _is_empty_bias(tensor, rename, places)
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        hint = f"; found {extra[0].name!r}, which the config has no place for" if extra else ""
        raise CheckpointError(f"{directory}: tensor {missing[0]!r}{more} missing{hint}")
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise CheckpointError(
            f"{extra[0].file}: the config has no place for tensor {extra[0].name!r}{more}"
        )
    for name, tensor in dense.items():
        check_stored(tensor, Part((shapes[name],), FLOATS))
    for name, found in parts.items():
        for part, tensor in found.items():
            check_stored(tensor, wanted[name][part])
            if name in dense:
                first = dense[name].name
                raise CheckpointError(f"{tensor.file}: {tensor.name!r} and {first!r} are the same")
    parts = {name: found for name, found in parts.items() if found}
    return Stored(dense=dense, parts=parts, formats=spec.formats, shapes=shapes, spelling=speller)


def check_stored(tensor: StoredTensor, wanted: Part) -> None:
    """CheckpointError if a tensor has another shape or dtype."""
    if tensor.shape not in wanted.shapes:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} has shape {list(tensor.shape)}, "
            f"the config wants {list(wanted.shapes[0])}"
        )
    if tensor.dtype not in wanted.dtypes:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} is {tensor.dtype}, "
            f"it must be one of {', '.join(map(str, wanted.dtypes))}"
        )


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


def _is_empty_bias(
    tensor: StoredTensor, rename: Callable[[str], str | None], places: Collection[str]
) -> bool:
    """GPTQ tools once gave every matrix a bias; tolerated where the model has none if it is 0."""
    module, _, last = (rename(tensor.name) or "").rpartition(".")
    if last != "bias" or f"{module}.qweight" not in places or tensor.dtype not in FLOATS:
        return False
    return not bool(dict(map_tensors({"bias": tensor}))["bias"].any())


def empty_decoder(spec: ModelSpec) -> Decoder:
    """A decoder whose parameters have shapes but no storage; see :func:`assign`."""
    from skimp.model.decoder import Decoder

    with torch.device("meta"):
        decoder = Decoder(spec)
    for name in spec.formats:
        linear = decoder.get_submodule(name)
        assert isinstance(linear, Linear)
        linear.weight = None
    return decoder


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape, a low-bit matrix standing under its weight's name."""
    decoder = empty_decoder(replace(spec, formats={}))
    return {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}


def keeps_float32(name: str) -> bool:
    """Whether a parameter of ours is float32 in a model of any dtype: a router's correction, small
    differences of which choose (DeepSeek-V3 stores it so)."""
    return name.endswith(".correction")


def assign(decoder: nn.Module, name: str, tensor: Tensor) -> None:
    """Make ``tensor`` the parameter ``name``, without a copy."""
    path, _, attribute = name.rpartition(".")
    setattr(decoder.get_submodule(path), attribute, nn.Parameter(tensor, requires_grad=False))


def random_decoder(spec: ModelSpec, seed: int = 0, dtype: torch.dtype | str = "float32") -> Decoder:
    """A decoder with weights as at the start of training: matrices N(0, 0.02), norms near 1,
    biases and sinks small. The same seed gives the same weights in every dtype, up to rounding,
    and whatever the number of threads."""
    target = as_dtype(dtype)
    decoder = empty_decoder(replace(spec, formats={}))
    decoder.spec = spec
    seeds = torch.Generator().manual_seed(seed)
    chunks: list[tuple[Tensor, float, int]] = []
    for name, parameter in list(decoder.named_parameters()):
        dtype = torch.float32 if keeps_float32(name) else target
        tensor = torch.empty(parameter.shape, dtype=dtype)
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
    for name, form in spec.formats.items():
        linear = decoder.get_submodule(name)
        assert isinstance(linear, Linear) and linear.weight is not None
        linear.quantized, linear.weight = quantize(linear.weight.detach(), form), None
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
