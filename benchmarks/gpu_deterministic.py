"""Whether a request's tokens depend on its neighbours on a GPU.

    python benchmarks/gpu_deterministic.py --config config.json --out RESULT.md
        [--prompts 1000] [--batch 64] [--tokens 16]

Random weights in bfloat16, random prompts of 5 to 300 tokens, greedy: each prompt alone, then all
through batches. Once with ``deterministic`` and once, with a fifth of the prompts, without, which
shows that the comparison can fail.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import random
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from gpu_engine import random_decoder

from skimp import SamplingParams
from skimp.engine import Engine, EngineOptions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16)
    options = parser.parse_args()
    config = json.loads(options.config.read_text())
    rng = random.Random(0)
    asked = [
        [rng.randrange(1000, 100000) for _ in range(rng.randint(5, 300))]
        for _ in range(options.prompts)
    ]
    params = SamplingParams(max_tokens=options.tokens, temperature=0.0, ignore_eos=True)
    lines = [
        "# One request's tokens alone and in a batch",
        "",
        f"- date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d}; GPU: "
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}",
        f"- command: `python benchmarks/gpu_deterministic.py --config {options.config.name} "
        f"--prompts {options.prompts} --batch {options.batch} --tokens {options.tokens}`",
        f"- random weights, prompts of 5 to 300 tokens, {options.tokens} tokens each, greedy",
        "",
        "| deterministic | requests | the same alone and in the batch | alone, s | in batches, s |",
        "|---|---|---|---|---|",
    ]
    failed = False
    for deterministic in (True, False):
        torch.manual_seed(0)
        engine = Engine(
            random_decoder(config, int4=False),
            None,
            EngineOptions(
                device="cuda",
                max_batch=options.batch,
                max_context=1024,
                cache_bytes=16 << 30,
                prefix_cache=False,
                deterministic=deterministic,
            ),
        )
        if not deterministic:
            asked = asked[: len(asked) // 5]
        start = time.perf_counter()
        alone = [tokens_of(engine, [prompt], params)[0] for prompt in asked]
        between = time.perf_counter()
        batched = tokens_of(engine, asked, params)
        end = time.perf_counter()
        same = sum(a == b for a, b in zip(alone, batched))
        failed |= deterministic and same < len(asked)
        lines.append(
            f"| {'yes' if deterministic else 'no'} | {len(asked)} | {same} "
            f"| {between - start:.1f} | {end - between:.1f} |"
        )
        print(lines[-1], flush=True)
        del engine
        gc.collect()
        torch.cuda.empty_cache()
    options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(failed)


def tokens_of(
    engine: Engine, prompts: list[list[int]], params: SamplingParams
) -> list[tuple[int, ...]]:
    return [tuple(out.outputs[0].token_ids) for out in engine.generate(prompts, params)]


if __name__ == "__main__":
    sys.exit(main())
