"""skimp as lm-eval's model: a local task run by lm-eval gives what our own meter gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_checkpoint import write_model

from skimp.engine import Engine, EngineOptions
from skimp.errors import OptionError, SkimpError

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (the eval extra)")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from skimp.meter.harness import SkimpLM  # noqa: E402
from skimp.meter.quality import evaluate  # noqa: E402
from skimp.meter.taskfiles import read_task  # noqa: E402
from skimp.meter.tasks import run_task  # noqa: E402

WORDS = [
    "the",
    "king",
    "hurried",
    "off",
    "down",
    "the",
    "road",
    "to",
    "open",
    "parliament",
    "and",
    "nobody",
    "was",
    "at",
    "home",
]
CHOICES = [
    {
        "context": " ".join(WORDS[i % 7 : i % 7 + 6]),
        "options": [" ".join(WORDS[(i + 3 * j) % 12 :][: 1 + j]) for j in range(4)],
        "label": i % 4,
    }
    for i in range(24)
]
TASKS = {
    "skimp_choice": """
        output_type: multiple_choice
        doc_to_text: "{{context}}"
        doc_to_choice: "{{options}}"
        doc_to_target: label
        metric_list: [{metric: acc}, {metric: acc_norm}]
    """,
    "skimp_rolling": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{context}}"
        metric_list: [{metric: bits_per_byte}]
    """,
    "skimp_generate": """
        output_type: generate_until
        doc_to_text: "{{context}}"
        doc_to_target: "{{options[0]}}"
        generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
        metric_list: [{metric: exact_match}]
    """,
}


def request(kind: str, *args: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=args, idx=0)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lm(model_dir: Path) -> SkimpLM:
    return SkimpLM(Engine.load(model_dir, EngineOptions(max_batch=8)))


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "choice.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in CHOICES))
    for name, body in TASKS.items():
        lines = [line.strip() for line in body.strip().splitlines()]
        head = [
            f"task: {name}",
            "dataset_path: json",
            f"dataset_kwargs: {{data_files: {{test: {data}}}}}",
            "test_split: test",
        ]
        (folder / f"{name}.yaml").write_text("\n".join([*head, *lines]) + "\n")
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def test_a_local_task_agrees_with_our_own_meter(lm: SkimpLM, task_dir: Path) -> None:
    found = lm_eval.simple_evaluate(
        model=lm,
        tasks=["skimp_choice", "skimp_rolling", "skimp_generate"],
        task_manager=TaskManager(include_path=str(task_dir), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    own = run_task(lm.engine, read_task(task_dir / "choice.jsonl"))
    choice = found["skimp_choice"]
    assert choice["acc,none"] == pytest.approx(own.scores["accuracy"].value)
    assert choice["acc_norm,none"] == pytest.approx(own.scores["accuracy_per_byte"].value)
    assert 0 < own.scores["accuracy"].value < 1
    text = "\n<|endoftext|>\n".join(row["context"] for row in CHOICES)
    bits = evaluate(lm.engine, text).bits_per_byte
    assert found["skimp_rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-6)
    assert "exact_match,none" in found["skimp_generate"]


def test_the_model_by_name(model_dir: Path, task_dir: Path, lm: SkimpLM) -> None:
    found = lm_eval.simple_evaluate(
        model="skimp",
        model_args={"pretrained": str(model_dir), "max_context": 128},
        batch_size=4,
        tasks=["skimp_choice"],
        task_manager=TaskManager(include_path=str(task_dir), include_defaults=False),
        bootstrap_iters=0,
        limit=8,
    )
    assert found["n-samples"]["skimp_choice"]["effective"] == 8


def test_scores_are_the_engines(lm: SkimpLM) -> None:
    pairs = [("the king", " hurried"), ("the king ", "hurried"), ("", "nobody"), ("the king", "s")]
    found = lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    assert found[0] == pytest.approx(found[1])
    engine = lm.engine
    assert engine.tokenizer is not None
    for (context, text), (total, _) in zip(pairs, found):
        ids = engine.tokenizer.encode(context + text)
        count = len(engine.tokenizer.encode(text, add_special=False))
        count += context.endswith(" ")
        assert total == pytest.approx(float(engine.score(ids)[-count:].sum()), abs=1e-3)
    ids = engine.tokenizer.encode("the king")
    from skimp.decoding import SamplingParams

    out = engine.generate([ids], SamplingParams(max_tokens=1, temperature=0.0, min_tokens=1))[0]
    best = out.outputs[0].token_ids[0]
    scores = engine.score_batch([[*ids, best]], [len(ids) - 1])[0]
    assert scores.greedy.all()


def test_rolling_takes_any_length(lm: SkimpLM) -> None:
    long = " ".join(WORDS * 20)
    assert len(long) > 2 * lm.engine.max_context
    found = lm.loglikelihood_rolling(
        [request("loglikelihood_rolling", text) for text in (long, "")], disable_tqdm=True
    )
    assert found[0] < -100
    assert found[1] == 0.0


def generate(lm: SkimpLM, context: str, **options: Any) -> str:
    return lm.generate_until([request("generate_until", context, options)], disable_tqdm=True)[0]


def test_generation_honours_its_options(lm: SkimpLM) -> None:
    whole = generate(lm, "the king", max_gen_toks=20)
    assert whole == generate(lm, "the king", max_gen_toks=20, do_sample=False, temperature=0.0)
    assert whole == generate(lm, "the king", max_gen_toks=20, do_sample=False, top_p=0.3)
    assert len(whole) >= 6
    stop = whole[3:5]
    assert generate(lm, "the king", max_gen_toks=20, until=[stop]) == whole.partition(stop)[0]
    assert generate(lm, "the king", max_gen_toks=20, until=stop) == whole.partition(stop)[0]
    assert whole.startswith(generate(lm, "the king", max_gen_toks=3))
    warm = generate(lm, "the king", max_gen_toks=20, do_sample=True, temperature=2.0)
    assert warm != whole
    with pytest.raises(SkimpError, match="num_beams"):
        generate(lm, "the king", num_beams=4)


def test_a_control_token_in_until_ends_the_answer(lm: SkimpLM) -> None:
    params = lm._params({"until": ["<|im_end|>", "\n", ""]})
    assert params.stop == ("\n",)
    assert params.stop_token_ids == (257,)


def test_long_prompts_lose_their_beginning(lm: SkimpLM) -> None:
    long = " ".join(WORDS * 20)
    tail = lm._prompt(long, 10)
    assert len(tail) == lm.engine.max_context - 10
    assert tail[0] == 256  # the begin token stays
    assert generate(lm, long, max_gen_toks=10)
    with pytest.raises(SkimpError, match="max_gen_toks"):
        generate(lm, long, max_gen_toks=lm.engine.max_context)


def test_chat_templates(model_dir: Path) -> None:
    lm = SkimpLM(Engine.load(model_dir, EngineOptions(max_batch=2)))
    turns = [{"role": "user", "content": "hello"}]
    prompt = lm.apply_chat_template(turns)
    assert prompt.endswith("<|im_start|>assistant\n")
    ids = lm._prompt(prompt, 1)
    assert ids[0] == 258  # the template's own control token, and no begin token before it
    assert ids.count(258) == 2
    begun = lm.apply_chat_template(
        [*turns, {"role": "assistant", "content": "Well,"}], add_generation_prompt=False
    )
    assert begun.endswith("<|im_start|>assistant\nWell,")
    assert "im_start" in (lm.chat_template(True) or "")
    assert lm.chat_template(False) == ""
    assert lm.tokenizer_name


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_bach": 3}, "max_bach"),
        ({"batch_size": "many"}, "batch_size"),
        ({"max_batch": 0}, "max_batch"),
        ({"device": "tpu"}, "device"),
        ({"device": "cuda:1"}, "device"),
    ],
)
def test_wrong_arguments_are_refused(model_dir: Path, options: dict[str, Any], field: str) -> None:
    with pytest.raises(OptionError, match=field):
        SkimpLM(str(model_dir), **options)


def test_an_engine_takes_no_options(lm: SkimpLM) -> None:
    with pytest.raises(OptionError, match="max_context"):
        SkimpLM(lm.engine, max_context=12)


def test_the_command_line_runs_a_local_task(model_dir: Path, task_dir: Path) -> None:
    arguments = ["--model", "skimp", "--model_args", f"pretrained={model_dir}"]
    arguments += ["--tasks", "skimp_choice", "--include_path", str(task_dir), "--limit", "4"]
    command = [sys.executable, "-m", "skimp.meter.harness", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "skimp_choice" in done.stdout
