"""Prompts read from files, and drawn from them."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest
from small_checkpoint import write_model

from skimp.meter.speculation import (
    Prompt,
    PromptFileError,
    choose_prompts,
    packaged_prompts,
    read_prompts,
)
from skimp.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_layout_is_told_by_its_fields(tmp_path: Path) -> None:
    spec = write(
        tmp_path / "spec.jsonl",
        {"question_id": 1, "category": "qa", "turns": ["first", "second"], "reference": []},
        {"question_id": 2, "category": "rag", "turns": ["only"]},
    )
    math = write(tmp_path / "gsm8k.jsonl", {"question": "1 + 1?", "answer": "#### 2"})
    own = write(tmp_path / "own.jsonl", {"prompt": "go on", "category": "qa"}, {"prompt": "and on"})
    packed = tmp_path / "more.jsonl.xz"
    packed.write_bytes(lzma.compress(b'{"prompt": "far"}\n\n'))
    text = tmp_path / "novel.txt"
    text.write_text("It began.\n<|endoftext|>\nIt ended.\n")
    assert read_prompts([spec, math, own, packed, text]) == [
        Prompt(category="qa", text="first", turn=True),
        Prompt(category="rag", text="only", turn=True),
        Prompt(category="gsm8k", text="1 + 1?", turn=True),
        Prompt(category="qa", text="go on"),
        Prompt(category="own", text="and on"),
        Prompt(category="more", text="far"),
        Prompt(category="novel", text="It began.", length=60),
        Prompt(category="novel", text="It ended.", length=60),
    ]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"turns": []}, "line 2: turns: expected a list of at least 1"),
        ({"turns": "one"}, "line 2: turns: expected a list"),
        ({"turns": ["  "]}, r"line 2: turns\[0\]: is empty"),
        ({"question": 7}, "line 2: question: expected text, got int"),
        ({"prompt": "x", "category": None}, "line 2: category: expected text"),
        ({"text": "x"}, r"line 2: its fields \(text\) hold no prompt; expected turns, question"),
        (["x"], "line 2: expected an object, got list"),
    ],
)
def test_errors_name_the_file_the_line_and_the_field(
    tmp_path: Path, row: object, named: str
) -> None:
    file = write(tmp_path / "bad.jsonl", {"prompt": "fine"}, row)
    with pytest.raises(PromptFileError, match=f"bad.jsonl {named}"):
        read_prompts([file])


def test_files_that_hold_nothing_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bytes.txt").write_bytes(b"ab\xff")
    (tmp_path / "broken.jsonl").write_text("{")
    for name, problem in (
        ("empty.jsonl", "it holds no prompts"),
        ("empty.txt", "it holds no prompts"),
        ("none.jsonl", "no such file"),
        ("none.txt", "cannot be read"),
        ("bytes.txt", "not UTF-8 at byte 2"),
        ("broken.jsonl", "line 1: is not JSON"),
    ):
        with pytest.raises(PromptFileError, match=f"{name}.*{problem}"):
            read_prompts([tmp_path / name])


def test_the_packaged_text_gives_copies_and_stories(tokenizer: Tokenizer) -> None:
    text = "\n\n".join(
        f"{i:03d} a fox went for a walk and came home again." * 20 for i in range(40)
    )
    found = packaged_prompts(text)
    assert {prompt.category for prompt in found} == {"copy", "story"}
    copy, story = found[0].encode(tokenizer), found[-1].encode(tokenizer)
    assert len(copy) == 240 and copy[200:] == copy[:40]
    assert len(story) == 60


def test_a_turn_goes_through_the_template_that_the_model_has(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    turn, text = Prompt(category="a", text="Hi", turn=True), Prompt(category="a", text="Hi")
    assert turn.encode(tokenizer) == text.encode(tokenizer) == tokenizer.encode("Hi")
    chats = write_model(tmp_path / "chat")
    (chats / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}>"
    )
    own = Tokenizer.load(chats)
    assert own.decode(turn.encode(own)) == "[user]Hi>"
    assert text.encode(own) == own.encode("Hi")
    assert choose_prompts([turn], own, most_tokens=99, each=1).templated
    assert not choose_prompts([text], own, most_tokens=99, each=1).templated
    assert not choose_prompts([turn], tokenizer, most_tokens=99, each=1).templated


def test_prompts_are_drawn_by_the_seed_among_those_that_fit(tokenizer: Tokenizer) -> None:
    short = [Prompt(category="a", text=f"number {i}") for i in range(20)]
    prompts = [*short, Prompt(category="b", text="x" * 50), Prompt(category="b", text="y")]

    def choose(**options):
        return choose_prompts(prompts, tokenizer, **{"most_tokens": 20, "each": 3, **options})

    found = choose()
    assert [len(ids) for ids in found.prompts.values()] == [3, 1]
    assert found.prompts == choose().prompts != choose(seed=1).prompts
    assert found.left_out == ("1 prompts of b exceed 20 tokens",) and found.longest == 10
    assert list(choose(categories=["b"]).prompts) == ["b"]
    with pytest.raises(PromptFileError, match="category: 'c' is none of a, b"):
        choose(categories=["c"])
    few = "b has 1 prompts of at most 20 tokens, not 2"
    with pytest.raises(PromptFileError, match=f"category: {few}"):
        choose(least=2, categories=["b"])
    found = choose(least=2)
    assert list(found.prompts) == ["a"] and found.left_out == (few,)
    with pytest.raises(PromptFileError, match=r"prompts: a has 3 .*; b has 1 "):
        choose(least=4)
