"""The engine on one GPU: steps, prompts, and a mixed load.

    python benchmarks/gpu_engine.py --configs DIR --out DIR [--models 8b 0.6b 8b-int4 8b-mla]
        [--parts decode prefill mixed]

Random weights, random prompts, greedy. "Limit" is (weight bytes + cache bytes read) over the rate
of a device copy, measured here, bytes read and written; "graph" a CUDA graph alone, replayed.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from skimp import SamplingParams
from skimp.cost import SequenceStep, step_cost
from skimp.cost.gpu import copy_rate
from skimp.engine import Engine, EngineOptions
from skimp.formats import WeightFormat, quantize
from skimp.model import families
from skimp.model.decoder import Decoder
from skimp.model.layers import Linear
from skimp.model.loading import assign, empty_decoder

MODELS = {
    "8b": "Llama-3.1-8B",
    "8b-int4": "Llama-3.1-8B",
    "8b-mla": "Llama-3.1-8B",
    "0.6b": "Qwen3-0.6B",
}
PARTS = ("decode", "prefill", "mixed")
DECODE = {
    "8b": [(1, 128), (1, 8192), (8, 1024), (32, 1024), (64, 1024), (128, 1024), (16, 8192)],
    "0.6b": [(1, 128), (1, 8192), (8, 1024), (32, 1024), (64, 1024), (128, 1024), (16, 8192)],
    "8b-int4": [(1, 128), (32, 1024), (16, 8192)],
    "8b-mla": [(1, 128), (1, 8192), (32, 1024), (128, 1024), (16, 8192)],
}
STEPS = 26  # of a stretch that is timed: 130 in all, as many as the figures compared with
PREFILL = [(1, 512), (1, 8192), (16, 2048)]
INT4 = WeightFormat(kind="int", bits=4, group_size=128)


def with_latents(config: dict) -> dict:
    """The shape as a dense ``deepseek_v3`` with latents of 512 + 64."""
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    shape = {name: v for name, v in config.items() if name not in ("head_dim", "mlp_bias")}
    return shape | {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_key_value_heads": heads,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": config["head_dim"],
        "v_head_dim": config["head_dim"],
        "first_k_dense_replace": layers,
    }


def random_decoder(config: dict, int4: bool) -> Decoder:
    """On the GPU from the start; all but the embeddings and the output in int4 if asked for."""
    spec = families.to_spec(config)
    decoder = empty_decoder(spec)
    formats = {}
    for name, parameter in list(decoder.named_parameters()):
        shape, dtype = parameter.shape, torch.bfloat16
        if "norm" in name:
            tensor = torch.ones(shape, dtype=dtype, device="cuda")
        else:
            tensor = torch.randn(shape, dtype=dtype, device="cuda") * 0.02
        assign(decoder, name, tensor)
        path = name.removesuffix(".weight")
        module = decoder.get_submodule(path) if name.endswith(".weight") else None
        if int4 and isinstance(module, Linear) and path.startswith("layers."):
            module.quantized, module.weight = quantize(tensor, INT4), None
            formats[path] = INT4
    decoder.spec = replace(spec, formats=formats)
    return decoder


def prompts(engine: Engine, count: int, length: int, rng: random.Random) -> list[list[int]]:
    return [[rng.randrange(1000, 100000) for _ in range(length)] for _ in range(count)]


def run(engine: Engine, prompts: list[list[int]], tokens: int) -> float:
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    torch.cuda.synchronize()
    start = time.perf_counter()
    engine.generate(prompts, params)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def decode(engine: Engine, batch: int, context: int, rate: float, rounds: int) -> dict:
    """Steps in which every sequence gains a token, in ``rounds`` stretches of one generation."""
    rng = random.Random(batch * context)
    run(engine, prompts(engine, batch, context, rng), 8)
    params = SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True)
    asked = [engine.add_request(p, params) for p in prompts(engine, batch, context, rng)]
    gained: set[str] = set()
    while len(gained) < batch:
        gained |= {out.request_id for out in engine.step()}
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(STEPS):
            engine.step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / STEPS * 1e3)
    for request_id in asked:
        engine.abort(request_id)
    while engine.has_unfinished():
        engine.step()
    graph_ms = replays(engine, batch)
    middle = context + rounds * STEPS // 2
    cost = step_cost(engine.work, [SequenceStep(context=middle)] * batch)
    ms, limit = statistics.median(times), cost.bytes_read / rate * 1e3
    return {
        "batch": batch,
        "context": context,
        "ms": ms,
        "least": min(times),
        "most": max(times),
        "tokens_per_s": batch / ms * 1e3,
        "graph_ms": graph_ms,
        "limit_ms": limit,
        "of_limit": limit / ms,
    }


def replays(engine: Engine, batch: int) -> float:
    """Milliseconds of a step's graph alone, over the rows of whatever step was last."""
    graph = engine.runner.backend.graph(batch)
    start, end = torch.cuda.Event(True), torch.cuda.Event(True)
    start.record()
    for _ in range(50):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 50


def prefill(engine: Engine, batch: int, context: int, rounds: int) -> dict:
    rng = random.Random(batch * context)
    run(engine, prompts(engine, batch, context, rng), 1)
    times = [run(engine, prompts(engine, batch, context, rng), 1) for _ in range(rounds)]
    rate = batch * context / statistics.median(times)
    return {"batch": batch, "context": context, "tokens_per_s": rate}


def mixed(engine: Engine, rounds: int) -> dict:
    """256 requests, prompt and output each of 100 to 1,024 tokens; the first round, which compiles
    and captures, does not count."""
    rates = []
    for index in range(rounds + 1):
        rng = random.Random(index)
        asked = [prompts(engine, 1, rng.randint(100, 1024), rng)[0] for _ in range(256)]
        params = [
            SamplingParams(max_tokens=rng.randint(100, 1024), temperature=0.0, ignore_eos=True)
            for _ in asked
        ]
        torch.cuda.synchronize()
        start = time.perf_counter()
        engine.generate(asked, params)
        took = time.perf_counter() - start
        rates.append(sum(p.max_tokens for p in params) / took)
    return {"tokens_per_s": statistics.median(rates[1:]), "first": rates[0], "rounds": rates[1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--cases", nargs="*", default=None, help="such as 1x128")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache-gb", type=int, default=48)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rate = copy_rate() * 1e9
    name = torch.cuda.get_device_name()
    print(f"{name}, copy {rate / 1e12:.3f} TB/s, torch {torch.__version__}", flush=True)
    results: dict = {"device": name, "copy": rate, "torch": torch.__version__}
    for model in options.models:
        config = json.loads((options.configs / f"{MODELS[model]}.json").read_text())
        if model == "8b-mla":
            config = with_latents(config)
        start = time.perf_counter()
        decoder = random_decoder(config, int4=model == "8b-int4")
        torch.cuda.synchronize()
        print(f"{model}: weights made in {time.perf_counter() - start:.1f} s", flush=True)
        start = time.perf_counter()
        engine = Engine(
            decoder,
            None,
            EngineOptions(
                device="cuda",
                max_batch=256,
                max_context=8192 + 512,
                cache_bytes=options.cache_gb << 30,
                prefix_cache=False,
            ),
        )
        torch.cuda.synchronize()
        print(f"{model}: bound in {time.perf_counter() - start:.1f} s", flush=True)
        found = results[model] = {"decode": [], "prefill": [], "mixed": None}
        if "decode" in options.parts:
            for batch, context in DECODE[model]:
                if options.cases is not None and f"{batch}x{context}" not in options.cases:
                    continue
                start = time.perf_counter()
                one = decode(engine, batch, context, rate, options.rounds)
                found["decode"].append(one)
                print(
                    f"{model} decode {batch} x {context}: {one['ms']:.3f} ms "
                    f"({one['least']:.3f}-{one['most']:.3f}), graph {one['graph_ms']:.3f}, "
                    f"limit {one['limit_ms']:.3f}, "
                    f"{one['of_limit']:.1%}  [{time.perf_counter() - start:.0f} s]",
                    flush=True,
                )
                if options.profile:
                    profile(engine, batch, context)
        if "prefill" in options.parts:
            for batch, context in PREFILL:
                one = prefill(engine, batch, context, options.rounds)
                found["prefill"].append(one)
                print(
                    f"{model} prefill {batch} x {context}: {one['tokens_per_s']:,.0f} tok/s",
                    flush=True,
                )
                if options.profile:
                    profile(engine, batch, context, tokens=1)
        if "mixed" in options.parts:
            found["mixed"] = mixed(engine, options.rounds)
            print(f"{model} mixed: {found['mixed']}", flush=True)
        (options.out / "engine.json").write_text(json.dumps(results, indent=1))
        del engine, decoder
        gc.collect()
        torch.cuda.empty_cache()


def profile(engine: Engine, batch: int, context: int, tokens: int = 9) -> None:
    """Where a step's time goes on the GPU, by kernel."""
    rng = random.Random(0)
    asked = prompts(engine, batch, context, rng)
    run(engine, asked, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        run(engine, asked, tokens)
    rows = sorted(seen.key_averages(), key=lambda e: -e.device_time_total)[:14]
    for row in rows:
        print(
            f"    {row.device_time_total / 1e3:9.3f} ms {row.count:6} x "
            f"{row.device_time_total / max(1, row.count):8.2f} us  {row.key[:90]}",
            flush=True,
        )


if __name__ == "__main__":
    main()
