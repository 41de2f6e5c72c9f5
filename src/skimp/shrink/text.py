"""Calibration text: what steps measure activations on, and whether it is like other text."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from skimp.errors import ShrinkError
from skimp.model.checkpoint import read_json
from skimp.model.manifest import SHRINK_FILE
from skimp.shrink.recipe import Calibration

if TYPE_CHECKING:
    from torch import Tensor

    from skimp.text.tokenizer import Tokenizer

MAX_TEXT: Final = 1 << 30  # bytes
DEFAULT_SAMPLES: Final = 128
LIKE_ITSELF: Final = 1.5  # times the divergence of the calibration text's own halves
SLIGHT: Final = 0.05  # bits that never matter, however alike the halves are
LEAST: Final = 100  # tokens whose frequencies say anything
IMPRINT: Final = "calibration_text"  # in the account of how a checkpoint was made


def default_text() -> Path:
    """The calibration text that comes with skimp."""
    return Path(str(resources.files("skimp"))) / "assets" / "text" / "calibration.txt"


def calibration_ids(calibration: Calibration, tokenizer: Tokenizer) -> list[int]:
    """All tokens of the text or, in file order, of the conversations."""
    if calibration.chat is not None:
        chats = chat_documents(Path(calibration.chat), tokenizer, "calibration")
        return [token for chat in chats for token in chat]
    path = default_text() if calibration.text is None else Path(calibration.text)
    return tokenizer.encode(read_text(path, "calibration"), add_special=False)


def samples(ids: Sequence[int], calibration: Calibration, seed: int, begin: int | None) -> Tensor:
    """int64 [samples, T] pieces of ``ids``, each after the begin token if there is one.

    The text is cut into pieces that do not overlap and ``seed`` chooses among them. Raises
    ShrinkError if there are too few.
    """
    import torch

    own = calibration.tokens - (begin is not None)
    pieces = len(ids) // own
    count = calibration.samples or max(1, min(DEFAULT_SAMPLES, pieces))
    if pieces < count:
        raise ShrinkError(
            f"calibration: the text has {len(ids):,} tokens, and {count} samples of "
            f"{calibration.tokens} need {count * own:,}; give more text, or lower "
            "calibration.samples or calibration.tokens"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(pieces, generator=generator)[:count].sort().values
    cut = torch.tensor(ids[: pieces * own], dtype=torch.int64).view(pieces, own)[chosen]
    if begin is None:
        return cut
    return torch.cat((torch.full((len(cut), 1), begin), cut), dim=1)


def load_samples(
    calibration: Calibration, tokenizer: Tokenizer, seed: int, vocab_size: int
) -> Tensor:
    """The calibration tokens of a run, int64 [samples, T]."""
    ids = calibration_ids(calibration, tokenizer)
    begin = None
    if calibration.chat is None:
        framed = tokenizer.encode("a")
        plain = tokenizer.encode("a", add_special=False)
        begin = framed[0] if framed[:1] != plain[:1] else None
    found = samples(ids, calibration, seed, begin)
    top = int(found.max())
    if top >= vocab_size:
        raise ShrinkError(f"calibration: token {top} is beyond the model's {vocab_size}")
    return found


def chat_warning(calibration: Calibration, tokenizer: Tokenizer) -> str | None:
    """A line if a chat model is to be calibrated on text without its turns."""
    if calibration.chat is None and tokenizer.chat_template is not None:
        return (
            "calibration: this is a chat model and the calibration text is plain; its own "
            "conversations (calibration.chat) may represent it better"
        )
    return None


# ---- likeness ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Imprint:
    """What a checkpoint keeps of its calibration text: how often each token was in the samples'
    first half and in their second."""

    halves: tuple[Counter[int], Counter[int]]

    @classmethod
    def of(cls, tokens: Tensor) -> Imprint:
        """Of samples [samples, T], without a begin token that is common to all."""
        if len(tokens) > 1 and bool((tokens[:, 0] == tokens[0, 0]).all()):
            tokens = tokens[:, 1:]
        ids = tokens.flatten().tolist()
        return cls(halves=(Counter(ids[: len(ids) // 2]), Counter(ids[len(ids) // 2 :])))

    def as_dict(self) -> dict[str, Any]:
        lines = [" ".join(f"{k}:{n}" for k, n in sorted(half.items())) for half in self.halves]
        return {"tokens": sum(half.total() for half in self.halves), "halves": lines}

    @classmethod
    def from_dict(cls, data: Any) -> Imprint:
        """Inverse of :meth:`as_dict`; ValueError, KeyError or TypeError on anything else."""
        first, second = (
            Counter({int(k): int(n) for k, n in (pair.split(":") for pair in half.split())})
            for half in data["halves"]
        )
        if min([1, *first.values(), *second.values()]) < 1:
            raise ValueError("a token that never came")
        return cls(halves=(first, second))

    @classmethod
    def read(cls, directory: Path) -> Imprint | None:
        """Of the text that a checkpoint was calibrated on, if it was. Raises ShrinkError."""
        path = directory / SHRINK_FILE
        if not path.is_file():
            return None
        data = read_json(path).get(IMPRINT)
        try:
            return None if data is None else cls.from_dict(data)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ShrinkError(f"{path}: {IMPRINT}: is not as skimp writes it") from None

    def unlike(self, evaluation: Sequence[int]) -> str | None:
        """A warning if the evaluation text is less like the calibration text than the halves of
        the calibration text are like each other; None if it is alike.

        All are thinned to one number of tokens first, since short texts differ by chance.
        """
        first, second, other = *self.halves, Counter(evaluation)
        size = min(first.total(), second.total(), other.total())
        if size < LEAST:
            return None
        first, second, other = (_thinned(counts, size) for counts in (first, second, other))
        own = divergence(first, second)
        found = min(divergence(half, other) for half in (first, second))
        if found <= max(LIKE_ITSELF * own, own + SLIGHT):
            return None
        return (
            "it was calibrated on text that is unlike this one: their token frequencies diverge by "
            f"{found:.2f} bits, those of the calibration text's own halves by {own:.2f}"
        )


def divergence(p: Counter[int], q: Counter[int]) -> float:
    """Jensen-Shannon divergence of the token frequencies of two texts, bits: 0 the same, 1
    nothing in common."""
    n, m = p.total(), q.total()
    total = 0.0
    for token in sorted(p.keys() | q.keys()):
        x, y = p[token] / n, q[token] / m
        middle = (x + y) / 2
        total += sum(v * math.log2(v / middle) / 2 for v in (x, y) if v)
    return total


def _thinned(counts: Counter[int], size: int) -> Counter[int]:
    """``size`` of the tokens, drawn without replacement."""
    import numpy as np

    tokens = sorted(counts)
    drawn = np.random.default_rng(0).multivariate_hypergeometric(
        [counts[token] for token in tokens], size, method="marginals"
    )
    return Counter({token: int(n) for token, n in zip(tokens, drawn) if n})


# ---- files ------------------------------------------------------------------------------------


def read_text(path: Path, field: str) -> str:
    """A text file; ShrinkError, which says that ``field`` named it, if it is none."""
    try:
        if path.stat().st_size > MAX_TEXT:
            raise ShrinkError(f"{field}: {path}: more than {MAX_TEXT:,} bytes")
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ShrinkError(f"{field}: {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ShrinkError(f"{field}: {path}: not UTF-8 at byte {error.start}") from None


def chat_documents(path: Path, tokenizer: Tokenizer, field: str) -> Iterator[list[int]]:
    """Token ids of each conversation of a file with a JSON object with ``messages`` a line."""
    from skimp.errors import SkimpError
    from skimp.text.chat import encode_chat, template_for

    template = template_for(tokenizer)
    for number, line in enumerate(read_text(path, field).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
            messages = value["messages"] if isinstance(value, dict) else value
            yield encode_chat(tokenizer, template, messages, add_generation_prompt=False)
        except KeyError:
            raise ShrinkError(f"{field}: {path}: line {number}: messages: missing") from None
        except SkimpError as error:
            raise ShrinkError(f"{field}: {path}: line {number}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise ShrinkError(f"{field}: {path}: line {number}: not JSON: {error}") from None
