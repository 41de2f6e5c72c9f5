"""How long a model takes from nothing to its first tokens on a GPU.

    python benchmarks/gpu_start.py --config config.json --work DIR --out RESULT.md [--rounds 5]

A checkpoint of random weights is written to DIR; then processes of their own load it, answer one
prompt of 128 tokens with 16 and say when. "no kernels" starts with an empty cache of compiled
kernels, "again" is as a later start on the same machine finds it, "from disk" with files that were
dropped from memory first.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src"
STAGES = ("imported", "weights mapped", "on the GPU", "first token", "16 tokens")
PROMPT, TOKENS = 128, 16


def child(model: Path, began: float) -> None:
    """Print the seconds since ``began`` at which each stage was over."""
    sys.path.insert(0, str(SOURCE))
    import torch

    from skimp import SamplingParams
    from skimp.engine import Engine, EngineOptions
    from skimp.model.loading import load_decoder

    times = [time.time() - began]
    decoder = load_decoder(model)
    times.append(time.time() - began)
    engine = Engine(decoder, None, EngineOptions(device="cuda", max_context=8192))
    torch.cuda.synchronize()
    times.append(time.time() - began)
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    engine.add_request(list(range(1000, 1000 + PROMPT)), params)
    seen = 0
    while engine.has_unfinished():
        for output in engine.step():
            if not seen:
                times.append(time.time() - began)
            seen = len(output.outputs[0].token_ids)
    assert seen == TOKENS
    times.append(time.time() - began)
    print(json.dumps(times))


def write_model(config: Path, directory: Path) -> None:
    sys.path.insert(0, str(SOURCE))
    from gpu_engine import random_decoder

    from skimp.model.saving import save_checkpoint

    decoder = random_decoder(json.loads(config.read_text()), int4=False)
    save_checkpoint(directory, decoder.spec, decoder)


def drop_from_memory(directory: Path) -> None:
    for file in directory.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def start(model: Path, kernels: Path) -> list[float]:
    environment = os.environ | {"TRITON_CACHE_DIR": str(kernels)}
    command = [sys.executable, __file__, "--child", str(model), "--began", repr(time.time())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    times: list[float] = json.loads(done.stdout.splitlines()[-1])
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.began)
        return
    if options.make:
        write_model(options.config, options.make)
        return
    model = options.work / "model"
    if not model.exists():
        # In a process of its own, which gives the GPU's memory back.
        command = [sys.executable, __file__, "--config", str(options.config), "--make", str(model)]
        subprocess.run(command, check=True)
    import torch

    size = sum(file.stat().st_size for file in model.iterdir())
    lines = [
        "# From nothing to the first tokens on a GPU",
        "",
        f"- date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d}; GPU: "
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}",
        f"- command: `python benchmarks/gpu_start.py --config {options.config.name} --work DIR "
        f"--rounds {options.rounds}`",
        f"- random weights, {size / 1e9:.1f} GB of files; seconds since the process was started, "
        f"median (least-most); a prompt of {PROMPT} tokens, answered with {TOKENS}",
        "",
        f"| start | rounds | {' | '.join(STAGES)} |",
        "|---|---|" + "---|" * len(STAGES),
    ]
    kernels = Path(tempfile.mkdtemp())

    def case(name: str, rounds: int, *, drop: bool = False) -> None:
        times = []
        for _ in range(rounds):
            if drop:
                drop_from_memory(model)
            times.append(start(model, kernels))
        cells = [
            f"{statistics.median(stage):.2f} ({min(stage):.2f}-{max(stage):.2f})"
            for stage in zip(*times)
        ]
        lines.append(f"| {name} | {rounds} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)

    case("no kernels", 1)
    case("again", options.rounds)
    case("from disk", 1, drop=True)
    options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
