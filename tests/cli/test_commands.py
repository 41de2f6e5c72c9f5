"""Each command on a small model of random weights, in this process and in its own."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest

from skimp.cli.options import parse_count, parse_counts
from skimp.cli.output import bytes_text, ms_text

BENCH_KEYS = {
    "batch",
    "context",
    "device",
    "dtype",
    "ms_per_step",
    "tokens_per_s",
    "prefill_tokens_per_s",
    "bytes_per_step",
    "bandwidth_gb_s",
    "limit_ms",
    "fraction_of_limit",
    "predicted_ms",
}


def one_object(result) -> dict:
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def test_help_is_quick_and_lists_every_command(script) -> None:
    script("--help")  # the first start of a machine reads files
    start = time.perf_counter()
    done = script("--help")
    took = time.perf_counter() - start
    assert done.returncode == 0
    for command in ("generate", "chat", "bench", "eval", "plan", "info"):
        assert re.search(rf"^  {command} ", done.stdout, re.MULTILINE)
    assert took < 1.0  # 0.2 s on an idle machine; tests may share it


def test_help_imports_nothing_heavy(script) -> None:
    import subprocess

    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "skimp", "generate", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "rich.console", "tokenizers", "transformers"}


@pytest.mark.parametrize("command", ["generate", "chat", "bench", "eval", "plan", "info"])
def test_every_help_has_an_example(skimp, command: str) -> None:
    result = skimp(command, "--help")
    assert result.exit_code == 0
    assert f"  skimp {command}" in result.output or f"| skimp {command}" in result.output


def test_version(skimp) -> None:
    import skimp as package

    assert skimp("--version").stdout == f"skimp {package.__version__}\n"


def test_generate_json(skimp, model_dir: Path) -> None:
    args = ("generate", model_dir, "Once", "--max-tokens", 5, "--seed", 7, "--ignore-eos", "--json")
    found = one_object(skimp(*args))
    assert set(found) >= {
        "text", "token_ids", "finish_reason", "prompt_tokens", "completion_tokens", "tokens_per_s",
    }  # fmt: skip
    assert found["prompt_tokens"] == 5  # the begin token and four letters
    assert found["completion_tokens"] == len(found["token_ids"]) == 5
    assert found["finish_reason"] == "length"
    assert found["tokens_per_s"] > 0
    again = one_object(skimp(*args))
    assert (again["text"], again["token_ids"]) == (found["text"], found["token_ids"])


def test_generate_streams_the_same_text_and_a_speed_line(skimp, model_dir: Path) -> None:
    args = ("generate", model_dir, "Once", "--max-tokens", 8, "--temperature", 0, "--ignore-eos")
    plain = skimp(*args)
    assert plain.exit_code == 0
    assert plain.stdout == one_object(skimp(*args, "--json"))["text"] + "\n"
    assert re.search(r"\[8 tokens, .* tokens/s generating, .* predicted, .* limit\]", plain.stderr)
    assert skimp(*args, "--quiet").stderr == ""


def test_generate_reads_standard_input(skimp, model_dir: Path) -> None:
    args = ("--max-tokens", 4, "--temperature", 0, "--json")
    piped = one_object(skimp("generate", model_dir, "-", *args, input="Once upon"))
    assert (
        piped["token_ids"]
        == one_object(skimp("generate", model_dir, "Once upon", *args))["token_ids"]
    )


def test_generate_samples_and_logprobs(skimp, model_dir: Path) -> None:
    found = one_object(
        skimp(
            "generate", model_dir, "Once", "--n", 3, "--seed", 1, "--max-tokens", 4, "--ignore-eos",
            "--json", "--logprobs", 2, "--prompt-logprobs", 0,
        )
    )  # fmt: skip
    assert [o["index"] for o in found["outputs"]] == [0, 1, 2]
    assert len(found["logprobs"]) == 4
    assert len(found["prompt_logprobs"]) == 5
    assert found["completion_tokens"] == 12
    text = skimp("generate", model_dir, "Once", "--n", 2, "--max-tokens", 4).stdout
    assert "[1 of 2]" in text
    assert "[2 of 2]" in text


def test_generate_without_max_tokens_stops_at_the_end_of_the_context(
    skimp, model_dir: Path
) -> None:
    found = one_object(
        skimp("generate", model_dir, "x" * 240, "--json", "--ignore-eos", "--temperature", 0)
    )
    assert found["prompt_tokens"] + found["completion_tokens"] <= 256
    assert found["finish_reason"] == "length"


def test_bench_prints_one_object_for_one_case(skimp, model_dir: Path) -> None:
    found = one_object(
        skimp("bench", model_dir, "--context", 20, "--new-tokens", 4, "--rounds", 2, "--json")
    )
    assert set(found) >= BENCH_KEYS
    assert (found["batch"], found["context"]) == (1, 20)
    assert found["samples"] == 4  # of each round the later half
    assert found["limit_ms"] == pytest.approx(
        found["bytes_per_step"] / found["bandwidth_gb_s"] / 1e6, rel=1e-3
    )
    assert found["fraction_of_limit"] == pytest.approx(found["limit_ms"] / found["ms_per_step"])
    assert found["tokens_per_s"] == pytest.approx(1e3 / found["ms_per_step"])


def test_bench_prints_one_object_for_several_cases(skimp, config_file: Path) -> None:
    found = one_object(
        skimp(
            "bench", "--random-weights", config_file, "--batch", "1,3", "--context", "8,70",
            "--new-tokens", 3, "--rounds", 1, "--token-budget", 32, "--json",
        )
    )  # fmt: skip
    assert [(r["batch"], r["context"]) for r in found["results"]] == [
        (1, 8), (1, 70), (3, 8), (3, 70),
    ]  # fmt: skip
    assert found["results"][3]["bytes_per_step"] > found["results"][0]["bytes_per_step"]


def test_bench_table(skimp, model_dir: Path) -> None:
    result = skimp(
        "bench", model_dir, "--batch", "1,2", "--context", 8, "--new-tokens", 3, "--rounds", 1
    )
    assert result.exit_code == 0, result.output
    assert "1 x 8" in result.stdout
    assert "2 x 8" in result.stdout
    assert "predicted" in result.stdout


def test_bench_of_the_largest_batch(skimp, model_dir: Path) -> None:
    common = ("bench", model_dir, "--context", "8,40", "--new-tokens", 3, "--rounds", 1)
    asked = (*common, "--batch", "1,max", "--cache-bytes", "64k")
    result = skimp(*asked)
    assert result.exit_code == 0, result.output
    assert "max: as many sequences as 65.5 kB of cache hold\n" in result.stdout
    for found in one_object(skimp(*asked, "--json"))["results"][2:]:
        assert found["asked_batch"] == "max" and found["batch_limited_by"] == "cache_bytes"
        assert found["batch"] > 1 and found["cache_bytes_held"] <= 64 << 10
        assert f"max {found['batch']} x {found['context']}  " in result.stdout
    limited = skimp(*common, "--batch", "max", "--cache-bytes", "1m", "--token-budget", 9)
    assert "max 9 x 8: no more because of token_budget 9; max 9 x 40: no" in limited.stdout
    refused = skimp(*common, "--batch", "max")
    assert refused.exit_code == 2 and "batch: max needs the cache_bytes" in refused.stderr


def test_eval(skimp, model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("The fox ran.\n<|endoftext|>\n" + "A long tale. " * 60)
    found = one_object(skimp("eval", model_dir, "--text", file, "--json"))
    assert set(found) >= {"bits_per_byte", "ci95", "tokens", "bytes"}
    # Random weights know next to nothing: about log2 of the vocabulary for each byte.
    assert 7.5 < found["bits_per_byte"] < 8.6
    assert found["ci95"][0] <= found["bits_per_byte"] <= found["ci95"][1]
    assert found["bytes"] == found["tokens"] == 12 + 13 * 60
    short = one_object(skimp("eval", model_dir, "--text", file, "--json", "--context", 32))
    assert short["bits_per_byte"] == pytest.approx(found["bits_per_byte"], rel=0.05)
    assert "bits per byte" in skimp("eval", model_dir, "--text", file).stdout


def test_plan_of_a_config_alone(skimp, config_file: Path) -> None:
    args = ("plan", config_file, "--hardware", "h100", "--context", 128, "--batch", 4)
    found = one_object(skimp(*args, "--json"))
    assert found["predicted"] is True
    names = [s["name"] for s in found["shortcuts"]]
    assert names == [
        "GQA", "MLA", "local/global", "int8 weights", "int4 weights", "fp8 weights", "int8 cache",
        "int4 cache", "speculation", "block diffusion",
    ]  # fmt: skip
    total = sum(t["ms"] for t in found["terms"]) + found["overhead_ms"]
    assert total == pytest.approx(found["as_it_is"]["ms_per_step"])
    text = skimp(*args).stdout
    assert text.startswith("PREDICTED, not measured")
    assert "Accuracy is not predicted" in text


def test_plan_of_a_model_on_this_machine(skimp, model_dir: Path) -> None:
    result = skimp("plan", model_dir, "--context", 64)
    assert result.exit_code == 0, result.output
    assert "Memory: weights" in result.stdout


def test_info_and_plan_of_latents_and_experts(skimp, tmp_path: Path) -> None:
    """Every command that describes a model knows every kind of layer."""
    config = {
        "model_type": "deepseek_v3",
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 24,
        "q_lora_rank": None,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "max_position_embeddings": 256,
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    found = one_object(skimp("info", file, "--json"))
    assert found["mixers"] == {"4 heads, latents of 24 + 8, the whole past": 3}
    assert found["cache_bytes_per_token"] == 3 * (24 + 8) * 4
    assert "latents of 24 + 8" in skimp("info", file).stdout
    planned = one_object(skimp("plan", file, "--hardware", "h100", "--json"))
    refused = {s["name"] for s in planned["shortcuts"] if "not_applicable" in s}
    assert {"GQA", "MLA", "local/global"} <= refused


def test_info(skimp, model_dir: Path, config_file: Path) -> None:
    found = one_object(skimp("info", model_dir, "--json"))
    assert found["parameters"] == 260 * 32 + 2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64 + 64) + 32
    assert found["cache_bytes_per_token"] == 2 * 2 * 2 * 8 * 4
    assert {"backend", "isa", "threads"} <= set(found)
    text = skimp("info", config_file).stdout
    assert "4 heads, 2 KV heads of 8" in text


def test_chat_over_a_pipe(skimp, model_dir: Path) -> None:
    args = ("chat", model_dir, "--max-tokens", 4, "--temperature", 0, "--system", "Be brief.")
    result = skimp(*args, input="Hello\n\n/reset\nHello\n/help\n/what\n/quit\nnever read\n")
    assert result.exit_code == 0, result.output
    answers = result.stdout.splitlines()
    assert len(answers) >= 2
    # A conversation that was forgotten begins again alike.
    half = len(answers) // 2
    assert answers[:half] == answers[half:]
    assert "forgotten" in result.stderr
    assert "no command /what" in result.stderr


def test_chat_drops_the_oldest_turns(skimp, model_dir: Path) -> None:
    turns = "\n".join(f"turn {i} {'x' * 40}" for i in range(6))
    result = skimp("chat", model_dir, "--max-tokens", 4, "--temperature", 0, input=turns)
    assert result.exit_code == 0, result.output
    assert "no longer fit the context" in result.stderr


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1), ("32k", 32768), ("1M", 1 << 20), (" 4_096 ", 4096)]
)
def test_counts(text: str, value: int) -> None:
    assert parse_count(text, "context") == value


@pytest.mark.parametrize("text", ["", "k", "0", "-1", "1.5k", "1g", "٣", "9" * 40])
def test_bad_counts(text: str) -> None:
    with pytest.raises(ValueError, match="context"):
        parse_count(text, "context")


def test_lists_of_counts() -> None:
    assert parse_counts(["1,8", "8", "1k"], "batch") == [1, 8, 1024]


def test_figures_are_short() -> None:
    assert bytes_text(999) == "999 B"
    assert bytes_text(1.5e9) == "1.5 GB"
    assert ms_text(0.0012345) == "1.23"
    assert ms_text(12.3456) == "12,346"
