"""The recipe step: what may be said, what is refused, and what it will take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from skimp.errors import ShrinkError, shown
from skimp.shrink.fold import require_dense
from skimp.shrink.heal.schedule import Part, Schedule
from skimp.shrink.step import Axis, Need, Tensors, Whole

if TYPE_CHECKING:
    from skimp.model.spec import ModelSpec

SELF = "self"  # the text that the original writes
LEAST_ROWS = 2048  # of a forward, where the batch has as many
SAVES, MEASUREMENTS = 20, 20  # of a run, unless the recipe says how often
OFTEN = ("layers.*",)  # what adapters stand beside, unless the recipe says


class _Fields(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Lora(_Fields):
    """Two factors of ``rank`` beside each matrix train in its place, times ``alpha`` / rank."""

    rank: int = Field(ge=1, le=4096)
    alpha: float = Field(gt=0)


class Long(_Fields):
    """A second part, on longer pieces."""

    tokens: int = Field(ge=1)
    length: int = Field(ge=2)


class Layerwise(_Fields):
    """A first part, in which each changed mixer learns what the original's makes of the same
    inputs."""

    tokens: int = Field(ge=1)
    lr: float = Field(gt=0)


class Stop(_Fields):
    """A part ends when ``window`` measurements lowered the held-out KL by less than the share
    ``slope``."""

    slope: float = Field(gt=0, lt=1)
    window: int = Field(ge=1)


class Heal(BaseModel):
    """Trains the model, as the steps before left it, on KL(original || model).

    ``tokens`` is the budget, ``batch`` the tokens of an optimiser step, ``length`` the longest
    sequence, ``micro_batch`` the tokens of a forward (default: some 2,048). ``text`` is a file,
    plain or .jsonl, or ``self``, ``self_tokens`` tokens that the original itself writes; ``chat`` a
    file of conversations. ``train`` and ``frozen`` are shell patterns over names such as
    ``layers.3.mixer.q_proj``. ``warmup`` is a share of the steps, ``final`` one of the rate.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str] = "heal"
    axis: ClassVar[Axis] = "weights"
    lossy: ClassVar[bool] = True

    tokens: int = Field(ge=1)
    text: str | None = None
    chat: str | None = None
    length: int = Field(default=512, ge=2)
    batch: int = Field(default=4096, ge=2)
    micro_batch: int | None = Field(default=None, ge=2)
    lr: float = Field(default=1e-4, gt=0)
    schedule: Schedule = "cosine"
    warmup: float = Field(default=0.05, ge=0, le=1)
    final: float = Field(default=0.1, ge=0, le=1)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    train: tuple[str, ...] | None = None
    frozen: tuple[str, ...] = ()
    lora: Lora | None = None
    keep_zeros: bool = False
    layerwise: Layerwise | None = None
    long: Long | None = None
    stop: Stop | None = None
    self_tokens: int | None = Field(default=None, ge=64)
    held_out: int | None = Field(default=None, ge=2)
    measure_every: int | None = Field(default=None, ge=1)
    save_every: int | None = Field(default=None, ge=1)
    compute: Literal["float32", "bfloat16"] | None = None
    device: Literal["cpu", "cuda"] = "cpu"

    _paths: dict[str, Path] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.text is not None and self.chat is not None:
            raise ValueError("chat: text is given too, and only one of them can be")
        if self.batch < self.longest:
            raise ValueError(
                f"batch: {self.batch} tokens a step hold no sequence of {self.longest}"
            )
        if self.micro_batch is not None and not self.longest <= self.micro_batch <= self.batch:
            raise ValueError(
                f"micro_batch: between the longest sequence ({self.longest}) and batch "
                f"({self.batch}), not {self.micro_batch}"
            )
        if self.long is not None and self.long.length <= self.length:
            raise ValueError(f"long.length: more than length ({self.length})")
        if self.self_tokens is not None and self.text != SELF:
            raise ValueError(f"self_tokens: how much of its own text, but text is not {SELF}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas: two numbers from 0 up to, but not, 1")
        return self

    # ---- what follows from the fields -------------------------------------------------------

    @property
    def longest(self) -> int:
        return self.length if self.long is None else max(self.length, self.long.length)

    @property
    def rows(self) -> int:
        """Of a forward."""
        return self.micro_batch or min(self.batch, max(self.longest, LEAST_ROWS))

    @property
    def computes_in(self) -> Literal["float32", "bfloat16"]:
        return self.compute or ("bfloat16" if self.device == "cuda" else "float32")

    def parts(self) -> list[Part]:
        found = []
        if self.layerwise is not None:
            steps = math.ceil(self.layerwise.tokens / self.batch)
            lr = self.layerwise.lr
            found.append(Part(name="layerwise", steps=steps, length=self.length, lr=lr))
        steps = math.ceil(self.tokens / self.batch)
        found.append(Part(name="heal", steps=steps, length=self.length, lr=self.lr))
        if self.long is not None:
            steps, length = math.ceil(self.long.tokens / self.batch), self.long.length
            found.append(Part(name="long", steps=steps, length=length, lr=self.lr))
        return found

    @property
    def steps(self) -> int:
        return sum(part.steps for part in self.parts())

    @property
    def saves_at(self) -> int:
        return self.save_every or max(1, self.steps // SAVES)

    @property
    def measures_at(self) -> int:
        return self.measure_every or max(1, self.steps // MEASUREMENTS)

    def trained(self, spec: ModelSpec) -> list[str]:
        """The parameters that train. Raises ShrinkError naming a pattern that is in vain."""
        from skimp.model.loading import parameter_shapes

        shapes = parameter_shapes(spec)
        patterns = self.train or (("*",) if self.lora is None else OFTEN)
        for field, given in (("train", patterns), ("frozen", self.frozen)):
            for pattern in given:
                if not any(_called(name, pattern) for name in shapes):
                    raise ShrinkError(f"{field}: no parameter is called {shown(pattern)}")
        names = [
            name
            for name, shape in shapes.items()
            if any(_called(name, pattern) for pattern in patterns)
            and not any(_called(name, pattern) for pattern in self.frozen)
            and (self.lora is None or len(shape) == 2)
        ]
        if not names:
            what = "parameter" if self.lora is None else "matrix"
            raise ShrinkError(f"train: these patterns leave no {what} to train")
        return names

    # ---- what the pipeline asks -----------------------------------------------------------

    def need_beside(self, spec: ModelSpec, original: ModelSpec) -> Need:
        from skimp.shrink.heal.memory import footprint

        require_dense(spec, self.kind)
        if spec.vocab_size != original.vocab_size:
            raise ShrinkError(
                f"vocab_size: {spec.vocab_size} tokens, and {original.vocab_size} in the original, "
                "which it is to be healed towards"
            )
        limit = min(spec.max_positions, original.max_positions)
        for field, length in (("length", self.length), ("long.length", self.longest)):
            if length > limit:
                raise ShrinkError(f"{field}: {length} tokens, and the model has {limit} positions")
        if self.layerwise is not None and spec.num_layers != original.num_layers:
            raise ShrinkError(
                f"layerwise: the model has {spec.num_layers} layers and the original "
                f"{original.num_layers}, so they have no mixers to compare"
            )
        self._check_device()
        need = footprint(self, spec, original)
        tokens = sum(part.steps for part in self.parts()) * self.batch
        return Need(
            extra_bytes=need.memory_bytes,
            disk_bytes=need.disk_bytes,
            ticks=self.steps,
            work=f"trains {need.numbers:,} numbers on {tokens:,} tokens in {self.steps:,} steps, "
            f"in {self.computes_in} on {self.device}",
        )

    def _check_device(self) -> None:
        import torch

        if self.device == "cuda" and not torch.cuda.is_available():
            raise ShrinkError("device: cuda is not to be had on this machine")

    def planned_spec(self, spec: ModelSpec) -> ModelSpec:
        return spec

    def output_spec(self, spec: ModelSpec, state: Mapping[str, Any]) -> ModelSpec:
        return spec

    def located(self, folder: Path) -> Heal:
        for field in ("text", "chat"):
            given = getattr(self, field)
            if given is None or (field, given) == ("text", SELF):
                continue
            if not given or "\0" in given:
                raise ValueError(f"{field}: {shown(given)} is not a file name")
            path = folder / Path(given).expanduser()
            if not path.is_file():
                raise ValueError(f"{field}: {path}: no such file")
            self._paths[field] = path
        return self

    def path(self, field: str) -> Path | None:
        """The file that ``text`` or ``chat`` names."""
        return self._paths.get(field)

    def files(self) -> tuple[Path, ...]:
        from skimp.shrink.text import default_text

        if self.text == SELF:
            return ()
        return tuple(self._paths.values()) or (default_text(),)

    def check_files(self, spec: ModelSpec, directory: Path) -> None:
        from skimp.shrink.heal.train import read_texts

        if self.text != SELF:
            read_texts(self, spec, directory)

    def work(self, whole: Whole) -> Tensors:
        from skimp.shrink.heal.train import Healer

        return Healer(self, whole).run()


def _called(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern)
