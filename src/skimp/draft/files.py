"""Draft heads on the disk, in the layout that EAGLE-3's authors published.

A directory with ``config.json``, in the words of a Llama of one layer, and ``model.safetensors``:
what SpecForge writes and vLLM and SGLang read. Sizes: D the target's hidden size, T taps, V its
words, W those of the head.

=================================================  ==========  =====================================
tensor                                             shape       in :class:`DraftHead`
=================================================  ==========  =====================================
``fc.weight``                                      [D, T * D]  ``fusion.parts``, side by side
``midlayer.input_layernorm.weight``                [D]         ``embed_norm``
``midlayer.hidden_norm.weight``                    [D]         ``feature_norm``
``midlayer.self_attn.{q,k,v}_proj.weight``         [.., 2 D]   ``embed_qkv`` beside ``feature_qkv``
``midlayer.self_attn.o_proj.weight``               [D, ..]     ``o_proj``
``midlayer.post_attention_layernorm.weight``       [D]         ``ffn_norm``
``midlayer.mlp.{gate,up,down}_proj.weight``                    ``ffn``
``norm.weight``                                    [D]         ``norm``
``lm_head.weight``                                 [W, D]      ``lm_head``
``d2t``                                            int64 [W]   ``token_ids`` - 0, 1, 2 ..
``t2d``                                            bool [V]    which words are among ``token_ids``
=================================================  ==========  =====================================

The layer is called ``midlayer`` or, in exports of vLLM's speculators, ``layers.0``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from skimp.errors import CheckpointError, ConfigError, shown
from skimp.formats.checkpoints import Part
from skimp.model.checkpoint import (
    SINGLE_FILE,
    StoredTensor,
    map_tensors,
    read_directory,
)
from skimp.model.draft_head import DraftHead, HeadSpec
from skimp.model.families import common
from skimp.model.families.reader import ConfigReader
from skimp.model.families.rope_config import read_rope
from skimp.model.loading import (
    CONFIG_FILE,
    FLOATS,
    as_dtype,
    assign,
    check_stored,
    load_config,
)
from skimp.model.saving import appearing, check_free, write_json, write_tensors
from skimp.model.spec import AttentionSpec, GatedFFNSpec, ModelSpec

ARCHITECTURE: Final = "LlamaForCausalLMEagle3"  # SpecForge's and SGLang's name
# vLLM's name, and that of EAGLE's own first exports.
ARCHITECTURES: Final = (ARCHITECTURE, "Eagle3LlamaForCausalLM", "LlamaForCausalLM")
RECORD: Final = "skimp"  # in the config: how a head was trained
TAPS: Final = "eagle_aux_hidden_state_layer_ids"
EAGLE: Final = "eagle_config"
# In ``eagle_config``: what a head without these fields does.
EAGLE_FIELDS: Final[Mapping[str, Any]] = {
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "next_layer_regular": True,
    "parallel_draft_step": 1,
}
PLAIN: Final = {
    "midlayer.input_layernorm.weight": "embed_norm.weight",
    "midlayer.hidden_norm.weight": "feature_norm.weight",
    "midlayer.self_attn.o_proj.weight": "o_proj.weight",
    "midlayer.post_attention_layernorm.weight": "ffn_norm.weight",
    "midlayer.mlp.gate_proj.weight": "ffn.gate_proj.weight",
    "midlayer.mlp.up_proj.weight": "ffn.up_proj.weight",
    "midlayer.mlp.down_proj.weight": "ffn.down_proj.weight",
    "norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}
TABLES: Final = ("embed_tokens.weight", "model.embed_tokens.weight")
D2T: Final = "d2t"
T2D: Final = "t2d"


def default_taps(num_layers: int) -> tuple[int, ...]:
    """The layers whose input a head reads if nobody says so: EAGLE-3's, as in vLLM and SGLang.
    Raises ConfigError if the target is too shallow for three different ones."""
    taps = (2, num_layers // 2, num_layers - 3)
    if not taps[0] < taps[1] < taps[2]:
        raise ConfigError(
            f"layers: a target of {num_layers} layers has no default for what a draft head reads "
            f"({', '.join(map(str, taps))}); name the layers"
        )
    return taps


# ---- reading ----------------------------------------------------------------------------------


def read_head(
    directory: Path | str,
    target: ModelSpec,
    *,
    table: Tensor | None = None,
    dtype: torch.dtype | str = "auto",
) -> DraftHead:
    """The head in ``directory``, made for ``target``, with its weights, on the CPU.

    ``dtype`` "auto" keeps bfloat16 and float32 and turns float16 into float32. A head that brings
    an embedding table is read only if it is ``table``, the target's own [V, D]. Raises ConfigError
    or CheckpointError naming file and field or tensor.
    """
    directory = Path(directory)
    spec = read_spec(directory, target)
    stored = _by_name(read_directory(directory))
    own = [stored.pop(name) for name in TABLES if name in stored]
    wanted = _layouts(spec)
    for name, shape in wanted.items():
        if name not in stored:
            raise CheckpointError(f"{directory}: tensor {name!r} is missing")
        check_stored(stored[name], Part((shape,), FLOATS))
    maps: dict[str, StoredTensor] = {n: stored.pop(n) for n in (D2T, T2D) if n in stored}
    extra = next((t for name, t in stored.items() if name not in wanted), None)
    if extra is not None:
        raise CheckpointError(f"{extra.file}: a draft head has no place for {extra.name!r}")
    for tensor in own:
        _check_table(tensor, table, spec)
    found = {stored[name].dtype for name in wanted}
    kept = found.pop() if len(found) == 1 else as_dtype(spec.dtype)
    made = as_dtype(dtype) if dtype != "auto" else kept
    if dtype == "auto" and made == torch.float16:
        made = torch.float32
    head = empty_head(spec)
    for name, weight in map_tensors({name: stored[name] for name in wanted}):
        for ours, part in _apart(name, weight.to(made), spec).items():
            assign(head, ours, part)
    head.token_ids = _token_ids(directory, maps, spec)
    return head


def read_spec(directory: Path | str, target: ModelSpec) -> HeadSpec:
    """What the config of a head says. Raises ConfigError naming file and field."""
    directory = Path(directory)
    config = load_config(directory)
    try:
        return _to_spec(
            config,
            _Target(
                hidden_size=target.hidden_size,
                vocab_size=target.vocab_size,
                num_layers=target.num_layers,
            ),
        )
    except ConfigError as error:
        raise ConfigError(f"{directory / CONFIG_FILE}: {error}") from error


def training_record(directory: Path | str) -> dict[str, Any]:
    """How skimp trained the head of ``directory``; empty if it did not."""
    record = load_config(Path(directory)).get(RECORD, {})
    if not isinstance(record, dict):
        raise ConfigError(f"{Path(directory) / CONFIG_FILE}: {RECORD} must be an object")
    return record


@dataclass(frozen=True, kw_only=True)
class _Target:
    """What a head's config is compared with."""

    hidden_size: int
    vocab_size: int
    num_layers: int


def _to_spec(config: Mapping[str, Any], target: _Target) -> HeadSpec:
    read = ConfigReader("draft head", config)
    if read.raw("model_type", "llama") != "llama":
        raise read.refuse(f"model_type={shown(config['model_type'])} is not llama")
    names = read.raw("architectures")
    if not isinstance(names, list) or not any(name in ARCHITECTURES for name in names):
        known = ", ".join(ARCHITECTURES)
        raise read.refuse(f"architectures={shown(names)} is not a draft head's (known: {known})")
    sizes = common.read_sizes(read, max_positions=2048)
    for field, found, own in (
        ("hidden_size", sizes.hidden_size, target.hidden_size),
        ("target_hidden_size", read.raw("target_hidden_size"), target.hidden_size),
        ("vocab_size", sizes.vocab_size, target.vocab_size),
        ("target_vocab_size", read.raw("target_vocab_size"), target.vocab_size),
    ):
        if found is not None and found != own:
            raise read.refuse(f"{field}={shown(found)}, but the target has {own}")
    if sizes.num_layers != 1:
        raise read.refuse(f"num_hidden_layers={sizes.num_layers}: heads of one layer are supported")
    for field in (
        "attention_bias",
        "qkv_bias",
        "mlp_bias",
        "bias",
        "norm_before_residual",
        "norm_before_fc",
        "fc_norm",
        "norm_output",
        "parallel_drafting",
    ):
        if read.raw(field) not in (None, False):
            raise read.refuse(f"{field}={shown(config[field])} is not supported")
    if read.raw("use_sliding_window") is not False and read.raw("sliding_window") is not None:
        raise read.refuse(f"sliding_window={shown(config['sliding_window'])} is not supported")
    for field in ("sliding_window", "tie_word_embeddings", "bos_token_id", "eos_token_id"):
        read.raw(field)
    words = read.optional_integer("draft_vocab_size", least=1) or target.vocab_size
    if words > target.vocab_size:
        raise read.refuse(f"draft_vocab_size={words}, but the target has {target.vocab_size} words")
    read.raw("pad_token_id"), read.mapping(RECORD)
    spec = HeadSpec(
        hidden_size=sizes.hidden_size,
        vocab_size=target.vocab_size,
        draft_vocab_size=words,
        taps=_read_taps(read, target),
        mixer=AttentionSpec(
            num_heads=sizes.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            head_dim=sizes.head_dim,
            rope=read_rope(read, head_dim=sizes.head_dim, max_positions=sizes.max_positions),
            scale=sizes.head_dim**-0.5,
        ),
        ffn=GatedFFNSpec(
            intermediate_size=sizes.intermediate_size,
            activation=read.choice("hidden_act", "silu", common.ACTIVATIONS),
        ),
        norm_eps=read.number("rms_norm_eps", 1e-6),
        max_positions=sizes.max_positions,
        dtype=common.read_dtype(read),
    )
    read.rest()
    return spec


def _read_taps(read: ConfigReader, target: _Target) -> tuple[int, ...]:
    """Two spellings are about. At the top level, where vLLM reads it, an id is the layer that the
    stream enters. In ``eagle_config``, where SGLang reads it, it is the layer that the stream
    leaves if the first id is 1, and else the one it enters; SpecForge's default means the same
    layers as none (sgl-project/sglang, pull request 25454)."""
    eagle = read.mapping(EAGLE) or {}
    for field, value in EAGLE_FIELDS.items():
        if eagle.get(field) not in (None, value):
            raise read.refuse(f"{EAGLE}.{field}={shown(eagle[field])} is not supported")
    unknown = [f for f, v in eagle.items() if v and f not in EAGLE_FIELDS and f != TAPS]
    # A number of layers of what ``parallel_draft_step`` 1 does not have.
    unknown = [field for field in unknown if field != "parallel_draft_heads_num_layers"]
    if unknown:
        raise read.refuse(f"{EAGLE}.{unknown[0]}={shown(eagle[unknown[0]])} is not supported")
    outer, inner = read.raw(TAPS), eagle.get(TAPS)
    if outer is None and inner is None:
        return default_taps(target.num_layers)
    name, ids = (TAPS, outer) if outer is not None else (f"{EAGLE}.{TAPS}", inner)
    if not isinstance(ids, list) or not ids:
        raise read.refuse(f"{name} must be a list of layers, got {shown(ids)}")
    taps = [read.check_integer(name, i, least=0, most=target.num_layers) for i in ids]
    if outer is None and taps[0] == 1:
        taps = [tap + 1 for tap in taps]
    if sorted(set(taps)) != taps or taps[-1] > target.num_layers:
        raise read.refuse(
            f"{name}={shown(ids)}: layers in order, of the target's {target.num_layers}"
        )
    return tuple(taps)


def _by_name(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for raw, tensor in stored.items():
        name = raw
        if raw.startswith("layers.0."):
            name = "midlayer." + raw.removeprefix("layers.0.")
        if name in found:
            raise CheckpointError(f"{tensor.file}: {raw!r} and {found[name].name!r} are the same")
        found[name] = tensor
    return found


def _check_table(own: StoredTensor, table: Tensor | None, spec: HeadSpec) -> None:
    check_stored(own, Part(((spec.vocab_size, spec.hidden_size),), FLOATS))
    where = f"{own.file}: tensor {own.name!r}"
    if table is None:
        raise CheckpointError(
            f"{where}: the head has an embedding table, and the target's is not there to compare"
        )
    theirs = table.detach().cpu()
    if not torch.equal(dict(map_tensors({"own": own}))["own"].to(theirs.dtype), theirs):
        raise CheckpointError(
            f"{where} differs from the target's embedding table; heads with a table of their own "
            "are not supported"
        )


def _token_ids(directory: Path, maps: Mapping[str, StoredTensor], spec: HeadSpec) -> Tensor:
    """int64 [W] of ``d2t``, checked against ``t2d`` if that is there."""
    words, vocab = spec.draft_vocab_size, spec.vocab_size
    if D2T not in maps and words != vocab:
        raise CheckpointError(
            f"{directory}: tensor {D2T!r} is missing, though draft_vocab_size={words} is not "
            f"vocab_size={vocab}"
        )
    ids = torch.arange(words)
    if D2T in maps:
        check_stored(maps[D2T], Part(((words,),), (torch.int64, torch.int32)))
        ids = ids + dict(map_tensors({D2T: maps[D2T]}))[D2T].to(torch.int64)
        file = maps[D2T].file
        if int(ids.min()) < 0 or int(ids.max()) >= vocab:
            raise CheckpointError(f"{file}: tensor {D2T!r} leads out of the {vocab} target words")
        if len(ids.unique()) != words:
            raise CheckpointError(f"{file}: tensor {D2T!r} leads to a word twice")
    if T2D in maps:
        check_stored(maps[T2D], Part(((vocab,),), (torch.bool, torch.uint8)))
        said = dict(map_tensors({T2D: maps[T2D]}))[T2D].to(torch.bool)
        if not torch.equal(said.nonzero()[:, 0], ids.sort().values):
            raise CheckpointError(f"{maps[T2D].file}: tensors {T2D!r} and {D2T!r} disagree")
    return ids


# ---- tensors ----------------------------------------------------------------------------------


def empty_head(spec: HeadSpec) -> DraftHead:
    """A head whose parameters have shapes but no storage; see ``loading.assign``."""
    with torch.device("meta"):
        head = DraftHead(spec)
    head.token_ids = torch.arange(spec.draft_vocab_size)
    return head


def _layouts(spec: HeadSpec) -> dict[str, tuple[int, ...]]:
    """The shape of every weight by its name in the file."""
    head = empty_head(spec)
    size, mixer = spec.hidden_size, spec.mixer
    found = {theirs: tuple(head.get_parameter(ours).shape) for theirs, ours in PLAIN.items()}
    found["fc.weight"] = (size, len(spec.taps) * size)
    for name, width in zip("qkv", (mixer.q_dim, mixer.kv_dim, mixer.kv_dim)):
        found[f"midlayer.self_attn.{name}_proj.weight"] = (width, 2 * size)
    return found


def _split_names(spec: HeadSpec) -> dict[str, list[str]]:
    """Weights that are several of ours, side by side."""
    found = {"fc.weight": [f"fusion.parts.{i}.weight" for i in range(len(spec.taps))]}
    for i, name in enumerate("qkv"):
        ours = [f"embed_qkv.{i}.weight", f"feature_qkv.{i}.weight"]
        found[f"midlayer.self_attn.{name}_proj.weight"] = ours
    return found


def _apart(name: str, tensor: Tensor, spec: HeadSpec) -> dict[str, Tensor]:
    """Our parameters in the tensor ``name`` of the file."""
    if name in PLAIN:
        return {PLAIN[name]: tensor}
    parts = _split_names(spec)[name]
    return {ours: p.contiguous() for ours, p in zip(parts, tensor.chunk(len(parts), dim=1))}


# ---- writing ----------------------------------------------------------------------------------


def check_output(directory: Path | str, overwrite: bool) -> None:
    """CheckpointError if a head cannot be written there: only a head is ever overwritten."""
    directory = Path(directory)
    if not overwrite or not directory.is_dir() or not any(directory.iterdir()):
        return check_free(directory)
    names = None
    if not directory.is_symlink() and (directory / CONFIG_FILE).is_file():
        names = load_config(directory).get("architectures")
    if names != [ARCHITECTURE]:
        raise CheckpointError(f"{directory}: is not a draft head, and so is not overwritten")
    return None


def write_head(
    directory: Path | str,
    head: DraftHead,
    *,
    record: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write ``directory``, whole or not at all, and return it; ``record`` says how the head was
    trained. Raises ConfigError if the layout cannot express the head, CheckpointError if the
    directory is taken or, with ``overwrite``, is not a head's."""
    directory = Path(directory)
    check_output(directory, overwrite)
    spec = head.spec
    parameters = {name: parameter.detach() for name, parameter in head.named_parameters()}
    dtypes = {parameter.dtype for parameter in parameters.values()}
    if len(dtypes) != 1 or not dtypes <= set(FLOATS):
        raise CheckpointError(f"a draft head is written in one dtype, not {_names(dtypes)}")
    dtype = dtypes.pop()
    config = to_config(spec, str(dtype).removeprefix("torch."), record)
    wanted = _layouts(spec)
    layouts = {name: (dtype, shape) for name, shape in wanted.items()}
    layouts[D2T] = torch.int64, (spec.draft_vocab_size,)
    layouts[T2D] = torch.bool, (spec.vocab_size,)
    split = _split_names(spec)

    def read(name: str) -> Tensor:
        ids = head.token_ids.cpu()
        if name == D2T:
            return ids - torch.arange(len(ids))
        if name == T2D:
            return torch.zeros(spec.vocab_size, dtype=torch.bool).index_fill(0, ids, True)
        parts = [PLAIN[name]] if name in PLAIN else split[name]
        missing = next((part for part in parts if part not in parameters), None)
        if missing is not None:
            raise CheckpointError(f"tensor {missing!r} is missing, or a backend has packed it")
        return torch.cat([parameters[part] for part in parts], dim=-1)

    with appearing(directory, replace=overwrite) as partial:
        write_tensors(partial / SINGLE_FILE, layouts, read)
        write_json(partial / CONFIG_FILE, config)
    return directory


def to_config(
    spec: HeadSpec, dtype: str, record: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The ``config.json`` of a head. Raises ConfigError if it would not be read back so."""
    mixer, taps = spec.mixer, list(spec.taps)
    eagle: dict[str, Any] = {"use_aux_hidden_state": True}
    if taps[0] != 1:
        eagle[TAPS] = taps  # SGLang would take a list that begins with 1 for one of outputs
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "vocab_size": spec.vocab_size,
        "draft_vocab_size": spec.draft_vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.ffn.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads,
        "head_dim": mixer.head_dim,
        "hidden_act": common.ACTIVATION_NAMES[spec.ffn.activation],
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.norm_eps,
        **common.write_rope(mixer.rope),
        "attention_bias": False,
        "mlp_bias": False,
        "norm_before_residual": False,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        TAPS: taps,
        EAGLE: eagle,
    }
    like = _Target(
        hidden_size=spec.hidden_size, vocab_size=spec.vocab_size, num_layers=taps[-1] + 1
    )
    again = _to_spec(json.loads(json.dumps(config)), like)
    wanted = {**vars(spec), "dtype": dtype}
    for field, value in wanted.items():
        difference = common.first_difference(value, getattr(again, field), field)
        if difference is not None:
            raise ConfigError(f"a draft head's config cannot express it: {difference}")
    return config | ({RECORD: dict(record)} if record else {})


def _names(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) or "none"
