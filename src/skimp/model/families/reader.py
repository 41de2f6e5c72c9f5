"""Strict, typed reading of a ``config.json``: nothing in it is silently ignored."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from typing import Any, Final, TypeVar

from skimp.errors import ConfigError, SkimpWarning, shown

T = TypeVar("T")
REQUIRED: Final[Any] = object()
LARGEST: Final = 2**31 - 1  # positions and token ids are int32

# Fields that cannot change what a decoder computes: provenance, training, generation defaults
# (transformers reads those from generation_config.json now), and hints to other software.
IRRELEVANT: Final = frozenset(
    """
    architectures transformers_version initializer_range use_cache attention_dropout
    pretraining_tp name_or_path hidden_dropout output_attentions output_hidden_states
    return_dict torchscript use_bfloat16 pruned_heads cross_attention_hidden_size
    add_cross_attention is_decoder is_encoder_decoder chunk_size_feed_forward
    finetuning_task id2label label2id problem_type task_specific_params prefix
    decoder_start_token_id sep_token_id forced_bos_token_id forced_eos_token_id
    tokenizer_class tf_legacy_loss gradient_checkpointing cache_implementation
    attn_implementation max_length min_length do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences output_scores return_dict_in_generate
    remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens transformers.js_config unsloth_version unsloth_fixed
    max_window_layers embedding_initializer_range router_aux_loss_coef output_router_logits
    """.split()  # noqa: SIM905 (a literal of fifty strings is harder to read)
)
# An unknown field that sounds like one of these may change the result, so it is refused.
MEANINGFUL: Final = re.compile(
    "expert|moe|rope|rotary|alibi|window|attn|attention|logit|softcap|multiplier|scal|norm|bias"
    "|head|layer|mlp|mamba|ssm|lora|sink|position|mask|quant|compress|block|activation|act_|_act"
    "|hidden|embed|vocab|sparse|vision|audio|image|conv|state|latent|router|chunk|predict"
)


class ConfigReader:
    """Reads fields by type and remembers which; :meth:`rest` answers for the others."""

    def __init__(self, family: str, config: Mapping[str, Any]) -> None:
        self.family = family
        self._config = config
        self._read: set[str] = {"model_type"}
        self._kept: set[str] = set()

    def refuse(self, message: str) -> ConfigError:
        return ConfigError(f"{self.family} config: {message}")

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._config.get(name) is not None

    def raw(self, name: str, default: Any = None) -> Any:
        self._read.add(name)
        if name not in self._config:
            if default is REQUIRED:
                raise self.refuse(f"{name} is missing")
            return default
        return self._config[name]

    def keep(self, name: str) -> None:
        """Write this field back as it was, though it has been read."""
        self._kept.add(name)

    def integer(
        self, name: str, default: Any = REQUIRED, *, least: int = 1, most: int = LARGEST
    ) -> int:
        return self.check_integer(name, self.raw(name, default), least=least, most=most)

    def check_integer(self, name: str, value: Any, *, least: int = 1, most: int = LARGEST) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(f"{name} must be an integer, got {shown(value)}")
        if not least <= value <= most:
            raise self.refuse(f"{name} must be between {least} and {most}, got {shown(value)}")
        return value

    def optional_integer(self, name: str, default: int | None = None, *, least: int) -> int | None:
        value = self.raw(name, default)
        return None if value is None else self.check_integer(name, value, least=least)

    def number(self, name: str, default: Any = REQUIRED) -> float:
        return self.check_number(name, self.raw(name, default))

    def check_number(self, name: str, value: Any, *, above: float = 0.0) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(f"{name} must be a number, got {shown(value)}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or number <= above:
            raise self.refuse(f"{name} must be finite and above {above:g}, got {shown(value)}")
        return number

    def optional_number(self, name: str, default: float | None = None) -> float | None:
        value = self.raw(name, default)
        return None if value is None else self.check_number(name, value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.raw(name, default)
        if not isinstance(value, bool):
            raise self.refuse(f"{name} must be true or false, got {shown(value)}")
        return value

    def choice(self, name: str, default: str, choices: Mapping[str, T]) -> T:
        value = self.raw(name, default)
        if not isinstance(value, str) or value not in choices:
            known = ", ".join(choices)
            raise self.refuse(f"{name}={shown(value)} is not supported (known: {known})")
        return choices[value]

    def token_id(self, name: str, default: int | None, vocab_size: int) -> int | None:
        value = self.raw(name, default)
        if value is None:
            return None
        # -1 was the old spelling of "no such token".
        if value == -1 and not isinstance(value, bool):
            return None
        return self.check_integer(name, value, least=0, most=vocab_size - 1)

    def token_ids(self, name: str, default: int | None, vocab_size: int) -> tuple[int, ...]:
        value = self.raw(name, default)
        if not isinstance(value, list):
            one = self.token_id(name, default, vocab_size)
            return () if one is None else (one,)
        ids = [self.check_integer(name, v, least=0, most=vocab_size - 1) for v in value]
        return tuple(dict.fromkeys(ids))

    def mapping(self, name: str) -> Mapping[str, Any] | None:
        value = self.raw(name)
        if value is not None and not isinstance(value, dict):
            raise self.refuse(f"{name} must be an object, got {shown(value)}")
        return value

    def must_be(self, name: str, value: bool | int | str) -> None:
        """The class computes as if this field had this value; absent or null is fine too."""
        found = self.raw(name)
        if found is not None and (type(found) is not type(value) or found != value):
            raise self.refuse(f"{name}={shown(found)}, but this class always has {shown(value)}")

    def rest(self) -> dict[str, Any]:
        """The fields nobody read or that are kept, to be written back unchanged.

        Raises ConfigError for one that may change the result, warns about one that is unknown.
        """
        unread = self._config.keys() - (self._read - self._kept)
        rest = {name: value for name, value in self._config.items() if name in unread}
        for name, value in rest.items():
            if name in IRRELEVANT or name in self._kept or name.startswith("_") or not value:
                continue
            if name == "auto_map":
                self.warn("auto_map is skipped: code from a model directory is never run")
            elif MEANINGFUL.search(name.lower()):
                raise self.refuse(f"{name}={shown(value)} is not a field of this class")
            else:
                self.warn(f"{name}={shown(value)} is unknown and skipped")
        return rest

    def warn(self, message: str) -> None:
        warnings.warn(f"{self.family} config: {message}", SkimpWarning, stacklevel=2)
