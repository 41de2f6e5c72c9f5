"""A model directory's tokenizer, on the ``tokenizers`` library alone (no transformers: start-up).

Files read: ``tokenizer.json`` (required); ``tokenizer_config.json`` and
``special_tokens_map.json`` for the names of special tokens; ``generation_config.json`` and
``config.json`` for the end tokens and the model's vocabulary size; the chat template from
``chat_template.jinja``, ``chat_template.json`` or ``tokenizer_config.json``, in that order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skimp.errors import SkimpError
from skimp.text.detokenize import DecodePlan, Detokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_MAX_JSON_BYTES = 256 * 2**20  # the largest real tokenizer.json is about 35 MB
TOGETHER = 32  # texts that :meth:`Tokenizer.encode_many` has encodings of at once
NOT_UNICODE = "the text is not valid Unicode (a lone surrogate?)"
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class TokenizerError(SkimpError):
    """A tokenizer directory or a text is refused; the message names the file or the field."""


class Tokenizer:
    """Encode, decode and stream; made by :meth:`load`.

    Attributes:
        vocab_size: one more than the largest token id.
        model_vocab_size: rows of the model's embedding by ``config.json``, or None. It may be
            larger than ``vocab_size`` (padding), never smaller.
        bos_id: the begin token, or None.
        eos_ids: ids that end a generation, from ``generation_config.json``, else ``config.json``,
            else the tokenizer's own end token.
        special_tokens: names (``bos_token``...) to strings, for chat templates.
        chat_template: Jinja source, a mapping of named templates, or None.
        control_ids: ids that untrusted text must not produce.
    """

    def __init__(self, source: str, files: Mapping[str, Any], *, name: str = "tokenizer") -> None:
        from tokenizers import Tokenizer as Backend

        try:
            self._spec: dict[str, Any] = json.loads(source)
            self._backend: Backend = Backend.from_str(source)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{name}: tokenizer.json cannot be read: {error}") from None
        # truncation and padding belong to a training set-up; a prompt must never be cut silently
        self._backend.no_truncation()
        self._backend.no_padding()
        self.name = name
        vocab = self._backend.get_vocab(with_added_tokens=True)
        if not vocab:
            raise TokenizerError(f"{name}: tokenizer.json has an empty vocabulary")
        self.vocab_size = max(vocab.values()) + 1
        config = _mapping(files, "config.json")
        text_config = config.get("text_config")
        if isinstance(text_config, dict):
            config = {**config, **text_config}
        generation = _mapping(files, "generation_config.json")
        self.model_vocab_size = self._check_model_vocab(config.get("vocab_size"))
        self.special_tokens = _special_names(files)
        self._added = self._backend.get_added_tokens_decoder()
        self.bos_id = self._named_id("bos_token", generation, config, vocab)
        self.eos_ids = self._find_eos(generation, config, vocab)
        self.chat_template: str | dict[str, str] | None = files.get("chat_template")
        self.control_ids = self._find_control(vocab)
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special)
        self._plan = DecodePlan.parse(self._spec.get("decoder"))
        self._prefix, self._suffix = self._frame()

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """From a model directory. Raises :class:`TokenizerError` naming the file at fault."""
        folder = Path(directory)
        if not folder.is_dir():
            raise TokenizerError(f"{folder} is not a directory")
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(_no_tokenizer(folder))
        files: dict[str, Any] = {}
        for name in (
            "tokenizer_config.json",
            "special_tokens_map.json",
            "generation_config.json",
            "config.json",
        ):
            if (folder / name).is_file():
                files[name] = _read_json(folder / name)
        files["chat_template"] = _chat_template(folder, files.get("tokenizer_config.json"))
        return cls(_read_text(path), files, name=str(folder))

    def encode(
        self, text: str, *, add_special: bool = True, allow_special: bool = False
    ) -> list[int]:
        """Token ids of ``text``.

        ``add_special``: with the tokens that the model's post-processor puts around a sequence
        (usually a begin token). ``allow_special``: whether control tokens written out in the text
        become those tokens; by default they are spelt out as ordinary text.

        Raises :class:`TokenizerError` for text that is not valid Unicode.
        """
        ids = self._encode_raw(text) if allow_special else self.encode_plain(text)
        return [*self._prefix, *ids, *self._suffix] if add_special else ids

    def encode_plain(self, text: str) -> list[int]:
        """Ids of untrusted text, none of them in ``control_ids``, nothing put around."""
        ids = self._encode_raw(text)
        if self.control_ids.isdisjoint(ids):
            return ids
        ids = self._without_added.encode(text, add_special_tokens=False).ids
        if self.control_ids.isdisjoint(ids):
            return ids
        # a model whose plain vocabulary holds the control string (Unigram): a letter at a time
        found: list[int] = []
        for letter in text:
            letters = self._without_added.encode(letter, add_special_tokens=False).ids
            found += [i for i in letters if i not in self.control_ids]
        return found

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """:meth:`encode_plain` of each text, on all processors."""
        found: list[list[int]] = []
        for first in range(0, len(texts), TOGETHER):
            part = list(texts[first : first + TOGETHER])
            try:
                encodings = self._backend.encode_batch_fast(part, add_special_tokens=False)
            except (UnicodeEncodeError, TypeError):
                raise TokenizerError(NOT_UNICODE) from None
            for text, encoding in zip(part, encodings):
                ids = encoding.ids
                plain = self.control_ids.isdisjoint(ids)
                found.append(ids if plain else self.encode_plain(text))
        return found

    def encode_parts(self, parts: Iterable[tuple[str, bool]]) -> list[int]:
        """Ids of consecutive (text, trusted) parts; only trusted text makes control tokens."""
        found: list[int] = []
        for text, trusted in parts:
            found += self._encode_raw(text) if trusted else self.encode_plain(text)
        return found

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of ``ids``: what a :class:`Detokenizer` would have streamed."""
        stream = self.detokenizer(skip_special=skip_special)
        return "".join([*(stream.push(i) for i in ids), stream.flush()])

    def detokenizer(self, *, skip_special: bool = True, continues: bool = False) -> Detokenizer:
        """A new stream; ``continues`` when its text follows a prompt (see :class:`Detokenizer`)."""
        return Detokenizer(
            self._backend.id_to_token,
            self._plan,
            decode_ids=lambda ids: self._backend.decode(ids, skip_special_tokens=skip_special),
            skip=self.special_ids if skip_special else frozenset(),
            continues=continues,
        )

    def token(self, token_id: int) -> str | None:
        """The vocabulary's own string of an id."""
        return self._backend.id_to_token(token_id) if token_id >= 0 else None

    def token_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    @cached_property
    def control_strings(self) -> tuple[str, ...]:
        """The texts of ``control_ids``, longest first."""
        texts = {self._backend.id_to_token(i) for i in self.control_ids}
        return tuple(sorted((t for t in texts if t), key=lambda t: (-len(t), t)))

    def _encode_raw(self, text: str) -> list[int]:
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError):
            raise TokenizerError(NOT_UNICODE) from None

    @cached_property
    def _without_added(self) -> Backend:
        """The same model without added tokens, made when a text first contains one."""
        from tokenizers import Tokenizer as Backend

        bare = {**self._spec, "added_tokens": [], "post_processor": None}
        bare["truncation"] = bare["padding"] = None
        return Backend.from_str(json.dumps(bare))

    def _frame(self) -> tuple[list[int], list[int]]:
        """What the post-processor puts before and after a sequence, found by trying."""
        bare = self._backend.encode("a", add_special_tokens=False).ids
        full = self._backend.encode("a", add_special_tokens=True).ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        raise TokenizerError(f"{self.name}: the post-processor changes the tokens it is given")

    def _check_model_vocab(self, size: object) -> int | None:
        if size is None:
            return None
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise TokenizerError(f"{self.name}: config.json vocab_size must be a positive integer")
        if size < self.vocab_size:
            raise TokenizerError(
                f"{self.name}: tokenizer.json has ids up to {self.vocab_size - 1}, but config.json "
                f"says vocab_size = {size}; the tokenizer is not this model's"
            )
        return size

    def _named_id(
        self,
        name: str,
        generation: Mapping[str, Any],
        config: Mapping[str, Any],
        vocab: Mapping[str, int],
    ) -> int | None:
        if name in self.special_tokens:
            return vocab.get(self.special_tokens[name])
        for source in (generation, config):
            value = source.get(f"{name}_id")
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return None

    def _find_eos(
        self,
        generation: Mapping[str, Any],
        config: Mapping[str, Any],
        vocab: Mapping[str, int],
    ) -> tuple[int, ...]:
        for file, source in (("generation_config.json", generation), ("config.json", config)):
            value = source.get("eos_token_id")
            if value is None:
                continue
            ids = value if isinstance(value, list) else [value]
            limit = self.model_vocab_size or self.vocab_size
            for i in ids:
                if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < limit:
                    raise TokenizerError(
                        f"{self.name}: {file} eos_token_id {i!r} is not a token id below {limit}"
                    )
            return tuple(dict.fromkeys(ids))
        named = vocab.get(self.special_tokens.get("eos_token", ""))
        return () if named is None else (named,)

    def _find_control(self, vocab: Mapping[str, int]) -> frozenset[int]:
        """Added tokens marked special, shaped ``<|...|>``, or named as special or end tokens.

        The shape, because many chat tunes add ``<|im_start|>`` without marking it.
        """
        found = set(self.eos_ids)
        for i, token in self._added.items():
            text = token.content
            if token.special or (text.startswith("<|") and text.endswith("|>")):
                found.add(i)
        for name in ("bos_token", "eos_token", "pad_token", "sep_token", "cls_token"):
            named = vocab.get(self.special_tokens.get(name, ""))
            if named is not None:
                found.add(named)
        if self.bos_id is not None:
            found.add(self.bos_id)
        unknown = vocab.get(self.special_tokens.get("unk_token", _unknown(self._spec) or ""))
        found.discard(unknown if unknown is not None else -1)
        return frozenset(found)


def _unknown(spec: Mapping[str, Any]) -> str | None:
    model = spec.get("model", {})
    token = model.get("unk_token")
    if isinstance(token, str):
        return token
    index, vocab = model.get("unk_id"), model.get("vocab")
    if isinstance(index, int) and isinstance(vocab, list) and 0 <= index < len(vocab):
        return str(vocab[index][0])
    return None


def _no_tokenizer(folder: Path) -> str:
    if any((folder / n).is_file() for n in ("tokenizer.model", "spiece.model", "tekken.json")):
        return (
            f"{folder} has no tokenizer.json, only a SentencePiece or tekken model. Convert it "
            "once with transformers: AutoTokenizer.from_pretrained(DIR, use_fast=True)"
            ".save_pretrained(DIR)"
        )
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return (
            f"{folder} has vocab.json and merges.txt but no tokenizer.json, which also says how "
            "text is split before merging. Write it once with transformers: "
            "AutoTokenizer.from_pretrained(DIR, use_fast=True).save_pretrained(DIR)"
        )
    return f"{folder} has no tokenizer.json"


def _read_text(path: Path) -> str:
    size = path.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise TokenizerError(f"{path} has {size} bytes; at most {_MAX_JSON_BYTES} are read")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} must hold a JSON object")
    return value


def _mapping(files: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = files.get(name)
    return value if isinstance(value, dict) else {}


def _special_names(files: Mapping[str, Any]) -> dict[str, str]:
    """``bos_token`` and the like; a value is a string or an added-token object."""
    found: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for name in _NAMED:
            value = _mapping(files, file).get(name)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                found[name] = value
    return found


def _chat_template(folder: Path, config: Mapping[str, Any] | None) -> str | dict[str, str] | None:
    if (folder / "chat_template.jinja").is_file():
        return _read_text(folder / "chat_template.jinja")
    value: Any = None
    if (folder / "chat_template.json").is_file():
        value = _read_json(folder / "chat_template.json").get("chat_template")
        source = "chat_template.json"
    elif config is not None:
        value = config.get("chat_template")
        source = "tokenizer_config.json"
    if value is None or isinstance(value, str):
        return value
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in value}
    except (TypeError, KeyError):
        raise TokenizerError(
            f"{folder}: chat_template in {source} must be a string or a list of "
            '{"name", "template"}'
        ) from None
