"""Tasks against brute force on a tiny model, and their files against what may be wrong in them."""

from __future__ import annotations

import json
import lzma
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from meter_models import Bytes, noisy_decoder, plain_logits, tiny_engine

from skimp.engine import Engine
from skimp.errors import SkimpError
from skimp.meter.continuations import encode_continuation, score_continuations
from skimp.meter.score import mean, share, wilson
from skimp.meter.taskfiles import TaskFileError, last_number, read_task
from skimp.meter.tasks import Generation, paired_score, run_task

WORDS = ["king", "road", "home", "open", "nobody", "down", "hurry", "at", "was", "a"]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(lzma.compress(data) if path.suffix == ".xz" else data)
    return path


def logprob(context: str, text: str) -> tuple[float, bool]:
    """By one forward over the whole: the sum, and whether each token is the likeliest."""
    before = Bytes().encode(context) or [0]
    after = Bytes().encode(text)
    rows = plain_logits(noisy_decoder(), [*before, *after]).log_softmax(-1)
    picked = [rows[len(before) - 1 + i] for i in range(len(after))]
    return (
        sum(float(row[token]) for row, token in zip(picked, after)),
        all(int(row.argmax()) == token for row, token in zip(picked, after)),
    )


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine()


def phrase(seed: int, count: int) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, count))


def test_minimal_pairs(engine: Engine, tmp_path: Path) -> None:
    rows = [
        {
            "sentence_good": phrase(i, 4),
            "sentence_bad": phrase(100 + i, 4),
            "UID": f"paradigm {i % 3}",
            "field": "syntax" if i % 2 else "morphology",
        }
        for i in range(24)
    ]
    result = run_task(engine, read_task(write(tmp_path / "blimp.jsonl.xz", rows)))
    right = [logprob("", r["sentence_good"])[0] > logprob("", r["sentence_bad"])[0] for r in rows]
    assert 0 < sum(right) < 24
    assert result.scores["accuracy"].value == sum(right) / 24
    assert result.outcomes["accuracy"] == tuple(map(float, right))
    assert result.scores["accuracy"].chance == 0.5
    assert set(result.groups) == {"UID", "field"}
    for index in range(3):
        part = result.groups["UID"][f"paradigm {index}"]
        assert (part.value, part.n) == (sum(right[index::3]) / 8, 8)


@pytest.mark.parametrize("counts", [(4,), (2, 3, 5)])
def test_choices(engine: Engine, tmp_path: Path, counts: tuple[int, ...]) -> None:
    rows = []
    for i in range(20):
        options = [phrase(1000 + 10 * i + j, 1 + j) for j in range(counts[i % len(counts)])]
        context = "" if i == 3 else phrase(i, 12) + " " * (i % 2)
        rows.append({"context": context, "options": options, "label": i % len(options)})
    result = run_task(engine, read_task(write(tmp_path / "next.jsonl", rows)))
    raw, per_byte = [], []
    for row in rows:
        gap = " " if row["context"] else ""  # a blank belongs to what follows it
        sums = [logprob(row["context"].rstrip(), gap + option)[0] for option in row["options"]]
        raw.append(int(np.argmax(sums)) == row["label"])
        sizes = [len(option) for option in row["options"]]
        per_byte.append(int(np.argmax(np.array(sums) / sizes)) == row["label"])
    assert raw != per_byte
    assert result.outcomes["accuracy"] == tuple(map(float, raw))
    assert result.outcomes["accuracy_per_byte"] == tuple(map(float, per_byte))
    chance = sum(1 / len(row["options"]) for row in rows) / 20
    assert result.scores["accuracy"].chance == pytest.approx(chance)
    assert result.cut == 0


def test_last_words(engine: Engine, tmp_path: Path) -> None:
    rows = [{"context": phrase(i, 6), "target": WORDS[i % 10]} for i in range(8)]
    found = run_task(engine, read_task(write(tmp_path / "words.jsonl", rows)))
    want = [logprob(row["context"], " " + row["target"]) for row in rows]
    assert found.outcomes["accuracy"] == tuple(float(greedy) for _, greedy in want)
    np.testing.assert_allclose(found.outcomes["logprob"], [s for s, _ in want], atol=1e-3)
    low, high = found.scores["logprob"].ci95
    assert low < found.scores["logprob"].value < high


def test_a_continuation_is_greedy_when_generation_writes_it(engine: Engine) -> None:
    from skimp.decoding import SamplingParams

    for seed in range(5):
        prompt = Bytes().encode(phrase(seed, 5))
        out = engine.generate([prompt], SamplingParams(max_tokens=4, temperature=0.0))[0]
        written = out.outputs[0].token_ids
        whole = engine.score_batch([[*prompt, *written]], [len(prompt) - 1])[0]
        assert whole.greedy.all()
        other = [*written[:-1], written[-1] % 300 + 1]
        assert not engine.score_batch([[*prompt, *other]], [len(prompt) - 1])[0].greedy.all()


class Scripted:
    """Answers each question with a text of the test's own."""

    def __init__(self, answers: dict[str, str], max_context: int = 4096) -> None:
        self.answers, self.max_context = answers, max_context
        self.tokenizer = Bytes()
        self.prompts: list[str] = []
        self.options = type("Options", (), {"max_batch": 2})
        self.params: list[Any] = []

    def generate(self, prompts: list[list[int]], params: Any) -> list[Any]:
        found = []
        for prompt in prompts:
            text = Bytes().decode(prompt)
            self.prompts.append(text)
            self.params.append(params)
            question = text.rpartition("Question: ")[2].partition("\n")[0]
            answer = type("Answer", (), {"text": self.answers[question], "finish_reason": "stop"})
            found.append(type("Output", (), {"outputs": [answer], "error": None}))
        return found


def problems(count: int) -> list[dict[str, Any]]:
    return [
        {"question": f"what is {i} thousand?", "answer": f"it is <<{i}*1000>>\n#### {i},000"}
        for i in range(count)
    ]


def test_generated_answers_are_matched_by_their_number(tmp_path: Path) -> None:
    said = [" #### 0 and 7", " that is $1,000.", " 2000.00", " 3", " none", " 5,000\n#### 6"]
    script = Scripted({row["question"]: text for row, text in zip(problems(6), said)})
    task = read_task(write(tmp_path / "sums.jsonl", problems(6)))
    result = run_task(script, task)  # type: ignore[arg-type]
    assert result.outcomes["accuracy"] == (1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
    assert script.prompts[1] == "Question: what is 1 thousand?\nAnswer:"
    assert script.params[0].stop == ("Question:",)
    assert script.params[0].temperature == 0.0
    assert result.notes["unfinished"] == 0


def test_examples_come_from_items_that_are_not_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "sums.jsonl", problems(6))
    script = Scripted({row["question"]: " 1" for row in problems(6)})
    result = run_task(script, read_task(path), generation=Generation(shots=2))  # type: ignore[arg-type]
    assert result.n == 4
    shown = "\n\n".join(
        f"Question: {row['question']}\nAnswer: {row['answer']}" for row in problems(2)
    )
    assert all(p.startswith(shown + "\n\nQuestion: ") for p in script.prompts)
    drawn = read_task(path, max_items=3, seed=5)
    result = run_task(script, drawn, generation=Generation(shots=2))  # type: ignore[arg-type]
    assert result.n == 3
    asked = {problem.question for problem in drawn.items}
    assert not any(q in script.prompts[-1].rpartition("\n\n")[0] for q in asked)
    with pytest.raises(TaskFileError, match="shots: 6"):
        run_task(script, read_task(path), generation=Generation(shots=6))  # type: ignore[arg-type]


def test_a_prompt_that_does_not_fit_names_its_line(tmp_path: Path) -> None:
    rows = [*problems(2), {"question": "x" * 300, "answer": "1"}]
    task = read_task(write(tmp_path / "sums.jsonl", rows))
    with pytest.raises(TaskFileError, match=r"sums line 3.*context of 400"):
        run_task(Scripted({}, max_context=400), task)  # type: ignore[arg-type]


def test_generation_through_an_engine(engine: Engine, tmp_path: Path) -> None:
    task = read_task(write(tmp_path / "sums.jsonl", problems(5)))
    result = run_task(engine, task, generation=Generation(max_tokens=8))
    assert result.n == 5
    assert 0 <= result.notes["unfinished"] <= 5


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", "18"),
        ("so 3 and then 4.50", "4.50"),
        ("#### -1,234.5 of 9", "-1234.5"),
        ("it costs $72.", "72"),
        ("-$5", "-5"),
        ("half is .5", "0.5"),
        ("none at all", None),
        ("7 #### none", None),
    ],
)
def test_numbers_are_found(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"template": "no mark"}, "template"),
        ({"template": "{question}{question}"}, "template"),
        ({"shots": -1}, "shots"),
    ],
)
def test_generation_refuses(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Generation(**change)


# ---- continuations


def test_one_context_is_computed_once() -> None:
    engine = tiny_engine(max_batch=4)
    context = phrase(1, 30)
    items = [encode_continuation(engine, context, " " + word) for word in WORDS]
    rows = []
    run = engine.runner.run

    def counted(work: Any, **kwargs: Any) -> Any:
        rows.append(sum(w.num_tokens for w in work))
        return run(work, **kwargs)

    engine.runner.run = counted
    score_continuations(engine, items)
    size = len(items[0].tokens)
    assert sum(rows) < 1.2 * size + 10 * 32


def test_a_long_context_loses_its_beginning(engine: Engine) -> None:
    item = encode_continuation(engine, "a" * 200 + "b" * 200, "cde")
    assert item.cut
    assert len(item.tokens) == engine.max_context - 1
    assert item.tokens[-4:] == tuple(Bytes().encode("bcde"))
    assert item.tokens[item.start :] == tuple(Bytes().encode("cde"))
    with pytest.raises(ValueError, match="300 tokens do not fit"):
        encode_continuation(engine, "a", "c" * 300)
    with pytest.raises(ValueError, match="255 tokens do not fit"):
        encode_continuation(engine, "", "c" * 255)


def test_blanks_of_the_context_belong_to_what_follows(engine: Engine) -> None:
    one, two = (encode_continuation(engine, *pair) for pair in (("a  ", "b"), ("a", "  b")))
    assert one == two
    assert one.start == 1


# ---- intervals


def test_wilson_by_hand_and_at_the_ends() -> None:
    low, high = wilson(50, 100)
    assert (low, high) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert wilson(0, 10) == (0.0, pytest.approx(0.27753, abs=1e-4))
    assert wilson(10, 10) == pytest.approx((0.72247, 1.0), abs=1e-4)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_wilson_covers(p: float) -> None:
    covered = 0.0
    for right in range(61):
        low, high = wilson(right, 60)
        if low <= p <= high:
            covered += math.comb(60, right) * p**right * (1 - p) ** (60 - right)
    assert 0.92 < covered < 0.99


def test_shares_and_means() -> None:
    score = share([True, False, True, True], 0.25)
    assert (score.value, score.n, score.chance) == (0.75, 4, 0.25)
    assert score.as_dict()["ci95"] == list(wilson(3, 4))
    score = mean([1.0, 2.0, 3.0, 6.0] * 10)
    assert score.value == 3.0
    assert score.ci95[0] < 3.0 < score.ci95[1]


def test_two_models_over_the_same_items(tmp_path: Path) -> None:
    rows = [{"context": phrase(i, 6), "target": WORDS[i % 10]} for i in range(12)]
    task = read_task(write(tmp_path / "words.jsonl", rows))
    base, other = (run_task(tiny_engine(noise), task) for noise in (0.0, 0.05))
    gap = paired_score(base, other, "logprob")
    assert gap.value == pytest.approx(other.scores["logprob"].value - base.scores["logprob"].value)
    assert gap.ci95[0] <= gap.value <= gap.ci95[1]
    assert paired_score(base, base, "logprob").ci95 == (0.0, 0.0)
    with pytest.raises(ValueError, match="same items"):
        paired_score(
            base,
            run_task(tiny_engine(), read_task(tmp_path / "words.jsonl", max_items=3)),
            "logprob",
        )


# ---- files

PAIR = {"sentence_good": "a b", "sentence_bad": "b a"}
CHOICE = {"context": "a", "options": ["b", "c"], "label": 1}
WORD = {"context": "a", "target": "b"}
SUM = {"question": "1 + 1?", "answer": "#### 2"}


@pytest.mark.parametrize(
    ("row", "kind"),
    [(PAIR, "minimal-pair"), (CHOICE, "choice"), (WORD, "last-word"), (SUM, "generate")],
)
@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.xz"])
def test_kinds_are_told_by_fields(
    tmp_path: Path, row: dict[str, Any], kind: str, name: str
) -> None:
    task = read_task(write(tmp_path / name, [row, {**row, "further": [1]}]))
    assert (task.name, task.kind, len(task.items)) == ("t", kind, 2)


def test_a_kind_may_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [{**CHOICE, "target": "d"}])
    assert read_task(path).kind == "choice"
    assert read_task(path, kind="last-word").kind == "last-word"
    with pytest.raises(TaskFileError, match=r"t\.jsonl line 1: answer: is missing"):
        read_task(path, kind="generate")
    with pytest.raises(TaskFileError, match="kind: 'quiz'"):
        read_task(path, kind="quiz")


def test_items_are_drawn_by_seed_and_keep_their_order(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", problems(40))
    drawn = read_task(path, max_items=10, seed=1)
    lines = [problem.line for problem in drawn.items]
    assert lines == sorted(lines)
    assert len(set(lines)) == 10
    assert drawn == read_task(path, max_items=10, seed=1)
    assert drawn.items != read_task(path, max_items=10, seed=2).items
    assert not set(lines) & {problem.line for problem in drawn.spare}
    assert len(read_task(path, max_items=99).items) == 40
    with pytest.raises(TaskFileError, match="max_items"):
        read_task(path, max_items=0)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([PAIR, {**PAIR, "sentence_bad": 3}], "line 2: sentence_bad: expected text, got int"),
        ([{**PAIR, "UID": None}], "line 1: UID: expected text"),
        ([{**PAIR, "sentence_good": "  "}], "line 1: sentence_good: is empty"),
        ([PAIR, {"sentence_good": "a"}], "line 2: sentence_bad: is missing"),
        ([{**CHOICE, "label": 2}], "line 1: label: expected a whole number from 0 to 1, got 2"),
        ([{**CHOICE, "label": -1}], "line 1: label"),
        ([{**CHOICE, "label": True}], "line 1: label"),
        ([{**CHOICE, "label": "1"}], "line 1: label"),
        ([{**CHOICE, "options": ["b"]}], "line 1: options: expected a list of at least 2"),
        ([{**CHOICE, "options": "bc"}], "line 1: options"),
        ([{**CHOICE, "options": ["b", ""]}], r"line 1: options\[1\]: is empty"),
        ([CHOICE, CHOICE, {**CHOICE, "context": None}], "line 3: context: expected text"),
        ([{**WORD, "context": ""}], "line 1: context: is empty"),
        ([{**WORD, "target": "\ud800"}], "line 1: target: holds a lone surrogate"),
        ([{**SUM, "answer": "none"}], "line 1: answer: holds no number"),
        ([{**SUM, "question": ["a"]}], "line 1: question: expected text, got list"),
        ([{"text": "a"}], r"line 1: its fields \(text\) tell no kind"),
        ([], "holds no items"),
    ],
)
def test_malformed_items_are_refused(tmp_path: Path, rows: list[Any], says: str) -> None:
    path = write(tmp_path / "t.jsonl", rows)
    with pytest.raises(TaskFileError, match=says) as caught:
        read_task(path)
    assert "t.jsonl" in str(caught.value)
    assert isinstance(caught.value, SkimpError)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("t.jsonl", b'{"context": "a", "target": "b"}\n\n{"context"', "line 3: is not JSON"),
        ("t.jsonl", b"[1]\n", "line 1: expected an object, got list"),
        ("t.jsonl", b"\xff\n", "line 1: is not UTF-8 at byte 0"),
        ("t.jsonl", b"[" * 100_000, "line 1: is not JSON"),
        ("t.jsonl", b"x" * (1 << 20) + b"yy", "line 1: is too long"),
        ("t.jsonl.xz", b"not xz", "damaged"),
        ("t.jsonl.xz", lzma.compress(json.dumps(WORD).encode())[:-9], "damaged"),
        ("t.json", b"{}", "named .jsonl"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(TaskFileError, match=says):
        read_task(tmp_path / name)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskFileError, match=r"none.jsonl: no such file"):
        read_task(tmp_path / "none.jsonl")
