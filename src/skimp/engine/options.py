"""What a user may set about an engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from skimp.errors import OptionError
from skimp.model.caches import CacheDType
from skimp.model.spec import LatentAttentionSpec, ModelSpec

Backend = Literal["auto", "native", "triton", "plain"]
DTypeName = Literal["auto", "float32", "bfloat16"]
Speculate = Literal["none", "lookup", "suffix", "draft", "head"]
DraftRule = Literal["block", "chain", "match"]
BY_MODEL = ("draft", "head")  # ask ``draft_model``


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of an :class:`~skimp.engine.Engine`; a wrong one raises ``OptionError``.

    ``cache_bytes`` is the arena's whole budget (None: what ``max_batch`` sequences of
    ``max_context`` tokens need, but at most a quarter of the free memory, on a GPU 85 %).
    ``token_budget`` is the most prompt and generated tokens one step computes (None: 512, or 8,192
    on a GPU). ``deterministic`` makes every request's tokens independent of what else is in the
    batch, bit by bit; float32 on the native backend is so anyway. ``max_context`` defaults to the
    model's own limit. ``page_tokens`` must be a multiple of 16 on the native backend (None:
    16, or 64 where a GPU reads latents, in blocks of so many). ``overlap`` launches a step before
    the one before it has been read (None: on a GPU), where the requests allow it: no token changes.

    ``cache_dtype`` is how keys and values are remembered: ``auto`` (what the checkpoint asks for,
    else as the weights), ``bfloat16``, ``float32``, or rounded to ``fp8``, ``int8`` or ``int4``;
    ``cache_recent`` newest tokens are then kept at full precision beside the rounded past (None:
    64 at four bits, 0 at eight), and ``cache_hadamard`` turns keys and values before they are
    rounded (None: at four bits).

    ``speculate`` has tokens guessed that the model then checks several at a time: ``lookup`` copies
    what followed the same few tokens before, ``suffix`` what followed most often, in past answers
    of the same salt too, ``draft`` asks ``draft_model``, a smaller model with the same tokens,
    ``head`` a head that was trained for this model (``skimp draft train``), both with a cache on
    top of ``cache_bytes``. At most ``draft_tokens`` are guessed (None: 8), as many as were worth it
    lately, and none where plain generation is faster; with ``draft_control`` false always as many
    (None: 8, by a model or head 4).
    What is generated keeps its law; and where steps of one row and of several give the same bits
    every token, but for what a draft model guesses by ``draft_rule`` ``block`` or ``chain`` at a
    temperature above 0. ``match``, the rule of the deterministic mode, gives the tokens of plain
    generation there too, and accepts fewer (None: block, or match).
    """

    dtype: DTypeName = "auto"
    device: str = "cpu"
    threads: int | None = None
    cache_bytes: int | None = None
    max_batch: int = 64
    token_budget: int | None = None
    max_context: int | None = None
    page_tokens: int | None = None
    cache_dtype: CacheDType = "auto"
    cache_recent: int | None = None
    cache_hadamard: bool | None = None
    prefix_cache: bool = True
    backend: Backend = "auto"
    deterministic: bool = False
    overlap: bool | None = None
    speculate: Speculate = "none"
    draft_tokens: int | None = None
    draft_model: str | None = None
    draft_rule: DraftRule | None = None
    draft_control: bool | None = None

    def __post_init__(self) -> None:
        self._check_count("max_batch", self.max_batch)
        counts = ("threads", "cache_bytes", "max_context", "token_budget", "page_tokens")
        for name in (*counts, "draft_tokens"):
            if getattr(self, name) is not None:
                self._check_count(name, getattr(self, name))
        most_of = {
            "max_batch": 1 << 14,
            "token_budget": 1 << 20,
            "threads": 1024,
            "draft_tokens": 32,
        }
        for name, most in most_of.items():
            if (getattr(self, name) or 0) > most:
                raise OptionError(f"{name}: at most {most}, got {getattr(self, name)}")
        for name in ("prefix_cache", "deterministic"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}: expected true or false, got {getattr(self, name)!r}")
        self._check_choice("dtype", get_args(DTypeName))
        self._check_choice("backend", get_args(Backend))
        self._check_choice("cache_dtype", get_args(CacheDType))
        self._check_choice("speculate", get_args(Speculate))
        if self.cache_recent is not None:
            self._check_count("cache_recent", self.cache_recent, least=0)
        for name in ("cache_hadamard", "overlap"):
            if not isinstance(getattr(self, name), bool | None):
                got = f"got {getattr(self, name)!r}"
                raise OptionError(f"{name}: expected true, false or none, {got}")
        self._check_drafts()
        if self.device not in ("cpu", "cuda"):
            raise OptionError(f"device: expected cpu or cuda, got {self.device!r}")
        if self.device == "cuda" and self.backend == "native":
            raise OptionError("backend: native kernels run on the cpu, but device is cuda")
        if self.device == "cpu" and self.backend == "triton":
            raise OptionError("backend: triton kernels run on a GPU, but device is cpu")

    @property
    def step_tokens(self) -> int:
        """The token budget, chosen or the device's."""
        return self.token_budget or (8192 if self.device == "cuda" else 512)

    @property
    def controls(self) -> bool:
        """Whether how many tokens are guessed follows from what it has been worth."""
        return self.draft_control is not False

    @property
    def longest_draft(self) -> int:
        """The most tokens that are guessed."""
        fixed = 4 if self.speculate in BY_MODEL and not self.controls else 8
        return self.draft_tokens or fixed

    @property
    def accepts_by(self) -> DraftRule:
        """The rule for guesses that a model drew."""
        return self.draft_rule or ("match" if self.deterministic else "block")

    def for_draft(self, *, max_context: int, backend: Backend | None = None) -> EngineOptions:
        """The options of a model that guesses for one with these."""
        return replace(
            self,
            cache_bytes=None,
            max_context=max_context,
            backend=backend or self.backend,
            speculate="none",
            draft_tokens=None,
            draft_model=None,
            draft_rule=None,
            draft_control=None,
            overlap=False,
        )

    @property
    def overlaps(self) -> bool:
        """Whether steps overlap, as chosen or as the device has it."""
        return self.device == "cuda" if self.overlap is None else self.overlap

    def page_size(self, spec: ModelSpec) -> int:
        """Tokens of a page, as chosen or as the device reads them best."""
        latents = any(isinstance(layer.mixer, LatentAttentionSpec) for layer in spec.layers)
        return self.page_tokens or (64 if self.device == "cuda" and latents else 16)

    def _check_drafts(self) -> None:
        if self.draft_rule is not None:
            self._check_choice("draft_rule", get_args(DraftRule))
        if self.speculate in BY_MODEL and not isinstance(self.draft_model, str):
            raise OptionError(f"draft_model: speculate is {self.speculate}, so which one?")
        if not isinstance(self.draft_control, bool | None):
            got = f"got {self.draft_control!r}"
            raise OptionError(f"draft_control: expected true, false or none, {got}")
        for name in ("draft_model", "draft_rule"):
            if getattr(self, name) is not None and self.speculate not in BY_MODEL:
                listed = " or ".join(BY_MODEL)
                raise OptionError(f"{name}: only with speculate {listed}, not {self.speculate}")
        if self.draft_control and self.speculate == "none":
            raise OptionError("draft_control: nothing is guessed unless speculate says how")
        if self.speculate != "none" and self.overlap and not self.controls:
            raise OptionError(
                f"overlap: guesses follow from tokens that the host has seen, so with speculate "
                f"{self.speculate} and draft_control false no step overlaps another"
            )
        if self.deterministic and self.draft_rule not in (None, "match"):
            raise OptionError(
                f"draft_rule: {self.draft_rule} depends on how long drafts are, and so on the "
                "batch, which deterministic rules out; use match"
            )

    def _check_count(self, name: str, value: Any, *, least: int = 1) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise OptionError(f"{name}: expected a whole number of at least {least}, got {value!r}")

    def _check_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            listed = ", ".join(allowed)
            raise OptionError(f"{name}: expected one of {listed}, got {getattr(self, name)!r}")
