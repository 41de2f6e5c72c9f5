"""What low-bit caches cost the embedded model, and where a Hadamard turn pays.

    python benchmarks/cache_bits.py -o benchmarks/results/DATE-cache-bits

Every cache reads the same text through the engine; bits per byte are set against those of a
full-precision cache of the same weights, with the interval of the paired bootstrap over passages.

A small model has no outliers in its keys, large ones have: a few dimensions ten times the rest
(KIVI, Liu et al. 2024). So the same caches are also measured on a copy of the model whose function
is the same, but in which ``--outlier-pairs`` rotary pairs of dimensions of every key head are
``--outlier-factor`` times as large, and of the queries as much smaller. Powers of two do that
without any rounding. Rows of this copy are labelled "planted outliers". Writes OUT.md and OUT.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from skimp.engine import Engine, EngineOptions
from skimp.kernels.native.library import describe
from skimp.meter.divergence import Comparison, compare_quality
from skimp.model.decoder import Decoder
from skimp.model.loading import load_decoder
from skimp.model.locate import locate_model
from skimp.model.mixers.attention import Attention
from skimp.text import Tokenizer

ASSETS = Path(__file__).parents[1] / "src/skimp/assets"
CACHES: list[dict[str, Any]] = [
    {"cache_dtype": "int8"},
    {"cache_dtype": "fp8"},
    {"cache_dtype": "int4", "cache_recent": 0, "cache_hadamard": True},
    {"cache_dtype": "int4", "cache_recent": 0, "cache_hadamard": False},
    {"cache_dtype": "int4", "cache_recent": 64, "cache_hadamard": True},
    {"cache_dtype": "int4", "cache_recent": 64, "cache_hadamard": False},
]


def plant_outliers(decoder: Decoder, pairs: int, factor: float) -> None:
    """Scale the last rotary pairs of every key head up, of the queries down; in place."""
    for layer in decoder.layers:
        mixer = layer.mixer
        assert isinstance(mixer, Attention) and mixer.q_norm is None
        dim = mixer.spec.head_dim
        scale = torch.ones(2, dim // 2)
        scale[:, dim // 2 - pairs :] = factor
        for linear, by in ((mixer.q_proj, 1 / scale), (mixer.k_proj, scale)):
            assert linear.weight is not None and linear.bias is None
            with torch.no_grad():
                linear.weight.unflatten(0, (-1, dim)).mul_(by.view(dim, 1).to(linear.weight.dtype))


def name_of(cache: dict[str, Any]) -> str:
    parts = [cache["cache_dtype"]]
    if cache.get("cache_hadamard"):
        parts.append("Hadamard")
    if cache.get("cache_recent"):
        parts.append(f"newest {cache['cache_recent']} full")
    return ", ".join(parts)


def engine(args: argparse.Namespace, planted: bool, cache: dict[str, Any]) -> Engine:
    path = locate_model(args.model)
    decoder = load_decoder(path)
    if planted:
        plant_outliers(decoder, args.outlier_pairs, args.outlier_factor)
    options = EngineOptions(max_batch=1, prefix_cache=False, threads=args.threads, **cache)
    return Engine(decoder, Tokenizer.load(path), options)


def row(kind: str, cache: dict[str, Any], other: Engine, found: Comparison) -> dict[str, Any]:
    return {
        "model": kind,
        "cache": name_of(cache),
        "options": cache,
        "backend": other.backend_name,
        "cache_bytes_per_token": other.work.cache_bytes_per_token,
        "bits_per_byte": found.other.bits_per_byte,
        "base_bits_per_byte": found.base.bits_per_byte,
        "difference": found.paired.as_dict(),
        "relative": found.paired.bits_per_byte / found.base.bits_per_byte,
        "kl": found.divergence.as_dict(),
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| model | cache | bytes a token | bits per byte | difference, 95 % | relative | KL, nats "
        "a token, 95 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        low, high = r["difference"]["ci95"]
        kl_low, kl_high = r["kl"]["ci95"]
        noise = " (inside the noise)" if r["difference"]["inside_noise"] else ""
        lines.append(
            f"| {r['model']} | {r['cache']} | {r['cache_bytes_per_token']:,} "
            f"| {r['bits_per_byte']:.4f} "
            f"| {r['difference']['bits_per_byte']:+.4f} [{low:+.4f}, {high:+.4f}]{noise} "
            f"| {r['relative']:+.2%} | {r['kl']['kl']:.5f} [{kl_low:.5f}, {kl_high:.5f}] |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--model", default="tales")
    parser.add_argument("--text", type=Path, default=ASSETS / "text/evaluation.txt")
    parser.add_argument("--max-bytes", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--outlier-pairs", type=int, default=2)
    parser.add_argument("--outlier-factor", type=float, default=16.0)
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8")
    kinds = {"as it is": False, "planted outliers": True}
    rows = []
    for kind, planted in kinds.items():
        base = engine(args, planted, {})
        for cache in CACHES:
            other = engine(args, planted, cache)
            found = compare_quality(base, other, text, max_bytes=args.max_bytes)
            rows.append(row(kind, cache, other, found))
            print("\n".join(table(rows)[-1:]), flush=True)
        full = base.work.cache_bytes_per_token
    report = {
        "model": args.model,
        "text": args.text.name,
        "tokens": found.base.tokens,
        "documents": found.base.documents,
        "context": found.base.context,
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": f"cpu, native {describe()}",
        "torch": torch.__version__,
        "full_cache_bytes_per_token": full,
        "outlier_pairs": args.outlier_pairs,
        "outlier_factor": args.outlier_factor,
        "rows": rows,
    }
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    head = [
        f"# Low-bit caches: {args.model}, {report['dtype']}",
        "",
        f"`python benchmarks/cache_bits.py`: {report['tokens']:,} tokens in "
        f"{report['documents']} documents of {args.text.name}, context {report['context']}; "
        f"{report['device']}; PyTorch {report['torch']}. A full-precision cache holds {full:,} "
        "bytes a token; each row differs from it in the cache alone, and the interval is that of "
        "the paired bootstrap over passages.",
        "",
        f'"Planted outliers": the same function, but {2 * args.outlier_pairs} of the '
        f"dimensions of every key head are {args.outlier_factor:g} times as large and those of the "
        "queries as much smaller. The model is one that nobody trained; it stands for the keys of "
        "large models, which have such dimensions.",
        "",
    ]
    args.out.with_suffix(".md").write_text("\n".join(head + table(rows)) + "\n")


if __name__ == "__main__":
    main()
