"""Real prompts by category: how far guesses come true depends on the text.

A file is told by its name and its fields:

===================  ======================  =====================================================
file                 required field          what is asked
===================  ======================  =====================================================
``.jsonl[.xz]``      turns (a list)          the first turn (Spec-Bench, MT-Bench)
``.jsonl[.xz]``      question                the question (GSM8K)
``.jsonl[.xz]``      prompt                  the prompt, to be continued as it is
any other            UTF-8 text              the beginnings of its documents, to be continued
===================  ======================  =====================================================

A line's category is its ``category``, or else the file's name. Turns and questions go through the
model's chat template where it has one. Other fields are the file's own business.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from skimp.errors import SkimpError
from skimp.meter.lines import Line, read_lines
from skimp.text.documents import split_documents

if TYPE_CHECKING:
    from skimp.text.tokenizer import Tokenizer

STORY = 60  # tokens of a text that is to be continued
COPY = (200, 40)  # tokens of a text, and how many of its first come again
MOST_CHARACTERS = 32  # that a token can be expected to have
PASSAGES = 128  # of a text without questions, as many as there may be use for


class PromptFileError(SkimpError):
    """A file of prompts is missing, malformed, or has no prompt of what was asked for."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """``turn``: said to the model, and not to be continued by it. Of a text only the first
    ``length`` tokens are taken, and then the first ``again`` of those once more."""

    category: str
    text: str
    turn: bool = False
    length: int | None = None
    again: int = 0

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """Token ids, in the model's chat template if it is a turn and there is one."""
        if self.turn and tokenizer.chat_template is not None:
            from skimp.text.chat import encode_chat, template_for

            messages = [{"role": "user", "content": self.text}]
            return encode_chat(tokenizer, template_for(tokenizer), messages)
        ids = tokenizer.encode(self.text)[: self.length]
        return ids + ids[: self.again]


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Token ids of the prompts of each category, and a line for whatever was left out."""

    prompts: Mapping[str, tuple[tuple[int, ...], ...]]
    templated: bool  # some went through the model's chat template
    left_out: tuple[str, ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(ids) for found in self.prompts.values() for ids in found)


def read_prompts(files: Iterable[str | Path]) -> list[Prompt]:
    """All prompts of some files. Raises ``PromptFileError`` naming the file, line and field."""
    found: list[Prompt] = []
    for path in map(Path, files):
        if ".jsonl" in path.suffixes:
            own = [_prompt(line) for line in read_lines(path, PromptFileError)]
        else:
            own = _beginnings(path)
        if not own:
            raise PromptFileError(f"{path}: it holds no prompts")
        found += own
    return found


def packaged_prompts(text: str) -> list[Prompt]:
    """``copy``: passages of a text which then begin again, so that there is much to look up.
    ``story``: passages that the model continues as it likes."""
    length, again = COPY
    starts = [
        document[at : at + length * MOST_CHARACTERS]
        for document in split_documents(text)
        for at in _paragraphs(document)
        if len(document) - at >= length * MOST_CHARACTERS // 4
    ]
    passages = starts[:: -(-len(starts) // PASSAGES) or 1]
    return [
        *(Prompt(category="copy", text=p, length=length, again=again) for p in passages),
        *(Prompt(category="story", text=p, length=STORY) for p in passages),
    ]


def choose_prompts(
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    *,
    most_tokens: int,
    each: int,
    least: int = 1,
    categories: Sequence[str] | None = None,
    seed: int = 0,
) -> Chosen:
    """``each`` prompts of every category, drawn by ``seed`` among those of at most ``most_tokens``
    tokens; a category that has fewer than ``least`` is left out.

    Raises ``PromptFileError`` for one of ``categories`` that does not exist or has fewer, and if
    none is left.
    """
    by_category: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_category.setdefault(prompt.category, []).append(prompt)
    for name in categories or ():
        if name not in by_category:
            raise PromptFileError(f"category: {name!r} is none of {', '.join(by_category)}")
    chosen: dict[str, tuple[tuple[int, ...], ...]] = {}
    left_out: list[str] = []
    for name in categories or by_category:
        own = by_category[name]
        found: list[tuple[int, ...]] = []
        too_long = 0
        for prompt in random.Random(seed).sample(own, len(own)):
            ids = prompt.encode(tokenizer)
            if len(ids) <= most_tokens:
                found.append(tuple(ids))
            else:
                too_long += 1
            if len(found) == each:
                break
        if len(found) >= least:
            chosen[name] = tuple(found)
            if too_long:
                left_out.append(f"{too_long} prompts of {name} exceed {most_tokens} tokens")
            continue
        few = f"{name} has {len(found)} prompts of at most {most_tokens} tokens, not {least}"
        if categories is not None:
            raise PromptFileError(f"category: {few}")
        left_out.append(few)
    if not chosen:
        raise PromptFileError(f"prompts: {'; '.join(left_out)}")
    return Chosen(
        prompts=chosen,
        templated=tokenizer.chat_template is not None
        and any(prompt.turn for name in chosen for prompt in by_category[name]),
        left_out=tuple(left_out),
    )


def _prompt(line: Line) -> Prompt:
    name = line.path.name.removesuffix(".xz").removesuffix(".jsonl")
    category = line.text("category") if "category" in line.row else name
    if "turns" in line.row:
        return Prompt(category=category, text=line.texts("turns", least=1)[0], turn=True)
    if "question" in line.row:
        return Prompt(category=category, text=line.text("question"), turn=True)
    if "prompt" in line.row:
        return Prompt(category=category, text=line.text("prompt"))
    has = ", ".join(sorted(map(str, line.row)))[:200] or "none"
    raise line.error(f"its fields ({has}) hold no prompt; expected turns, question or prompt")


def _beginnings(path: Path) -> list[Prompt]:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptFileError(f"{path}: is not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise PromptFileError(f"{path}: cannot be read: {error.strerror}") from None
    return [
        Prompt(category=path.stem, text=document[: STORY * MOST_CHARACTERS], length=STORY)
        for document in split_documents(text)
    ]


def _paragraphs(document: str) -> list[int]:
    """Where paragraphs begin."""
    found, at = [0], document.find("\n\n")
    while at >= 0:
        found.append(at + 2)
        at = document.find("\n\n", at + 2)
    return found
