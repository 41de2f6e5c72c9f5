"""What low-bit caches cost the embedded model, and where a Hadamard turn pays.

    python benchmarks/cache_bits.py -o benchmarks/results/DATE-cache-bits

Every cache reads the same text through the engine; bits per byte are set against those of a
full-precision cache of the same weights, with the interval of the paired bootstrap over passages.

A small model has no outliers in its keys, large ones have: a few dimensions ten times the rest
(KIVI, Liu et al. 2024). So the same caches are also measured on a copy of the model whose function
is the same, but in which ``--outlier-pairs`` rotary pairs of dimensions of every key head are
``--outliers`` times as large, and of the queries as much smaller. Powers of two do that without any
rounding. Rows of such copies are labelled "planted". Writes OUT.md and OUT.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skimp.engine import Engine, EngineOptions
from skimp.kernels.native.library import library
from skimp.kernels.ops import AttentionParams, StepInputs
from skimp.kernels.plain import PlainOps
from skimp.meter.divergence import Comparison, compare_quality
from skimp.meter.quality import split_documents
from skimp.model.decoder import Decoder
from skimp.model.loading import load_decoder
from skimp.model.locate import locate_model
from skimp.model.mixers.attention import Attention
from skimp.shrink.capture import whole_text
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


class KeySizes(PlainOps):
    """Remembers how large each dimension of the keys is: float [kv_heads, head_dim] a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[Tensor] = []

    def attention(self, qkv: Tensor, params: AttentionParams, step: StepInputs) -> Tensor:
        spec = params.spec
        keys = qkv[:, spec.q_dim : spec.q_dim + spec.kv_dim].float()
        keys = keys.unflatten(1, (spec.num_kv_heads, spec.head_dim))
        self.layers.append(keys.square().mean(0).sqrt())
        return super().attention(qkv, params, step)


@torch.inference_mode()
def outlier_ratio(args: argparse.Namespace, factor: float, text: str) -> float:
    """Root mean square of a key head's largest dimension over that of its median one: the median
    over all heads."""
    path = locate_model(args.model)
    decoder = load_decoder(path)
    plant_outliers(decoder, args.outlier_pairs, factor)
    ids = Tokenizer.load(path).encode(split_documents(text)[0])[:1024]
    ops = KeySizes()
    decoder.bind(ops, max_positions=len(ids))
    decoder(whole_text(torch.tensor(ids, dtype=torch.int32)), ops)
    sizes = torch.cat(ops.layers)
    return float((sizes.amax(-1) / sizes.median(-1).values).median())


def name_of(cache: dict[str, Any]) -> str:
    parts = [cache["cache_dtype"]]
    if cache.get("cache_hadamard"):
        parts.append("Hadamard")
    if cache.get("cache_recent"):
        parts.append(f"newest {cache['cache_recent']} full")
    return ", ".join(parts)


def engine(args: argparse.Namespace, factor: float, cache: dict[str, Any]) -> Engine:
    path = locate_model(args.model)
    decoder = load_decoder(path)
    plant_outliers(decoder, args.outlier_pairs, factor)
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


def markdown(report: dict[str, Any]) -> list[str]:
    limit = "" if report["max_bytes"] is None else f" --max-bytes {report['max_bytes']}"
    dims = 2 * report["outlier_pairs"]
    ratios = ", ".join(f"{kind} {x:.1f}" for kind, x in report["outlier_ratio"].items())
    return [
        f"# What low-bit caches cost: {report['model']}, {report['dtype']}",
        "",
        f"`python benchmarks/cache_bits.py{limit} -o ...`: {report['tokens']:,} tokens, "
        f"{report['bytes']:,} bytes in {report['documents']} documents of {report['text']}, "
        f"context {report['context']}; {report['device']}; PyTorch {report['torch']}.",
        "",
        f"A full-precision cache holds {report['full_cache_bytes_per_token']:,} bytes a token. "
        "Each row differs from it in the cache alone; intervals of differences are those of the "
        "paired bootstrap over passages. Newest tokens at full precision are a fixed amount a "
        "sequence and not in the bytes a token.",
        "",
        f'"Planted": the same function, but {dims} of the dimensions of every key head are '
        "multiplied by that factor, and those of the queries divided by it. Nobody trained such a "
        "model: it stands for larger ones, whose keys have a few large dimensions. How many times "
        "the median dimension of a key head the largest one is (root mean squares; the median over "
        f"heads): {ratios}.",
        "",
        *table(report["rows"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--model", default="tales")
    parser.add_argument("--text", type=Path, default=ASSETS / "text/evaluation.txt")
    parser.add_argument("--max-bytes", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--outlier-pairs", type=int, default=2)
    parser.add_argument("--outliers", type=float, nargs="*", default=[4.0, 16.0])
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8")
    kinds = {"as it is": 1.0} | {f"planted x{x:g}": x for x in args.outliers}
    rows = []
    for kind, factor in kinds.items():
        base = engine(args, factor, {})
        for cache in CACHES:
            other = engine(args, factor, cache)
            found = compare_quality(base, other, text, max_bytes=args.max_bytes)
            rows.append(row(kind, cache, other, found))
            print("\n".join(table(rows)[-1:]), flush=True)
        full = base.work.cache_bytes_per_token
    report = {
        "model": args.model,
        "text": args.text.name,
        "tokens": found.base.tokens,
        "documents": found.base.documents,
        "bytes": found.base.bytes,
        "max_bytes": args.max_bytes,
        "context": found.base.context,
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": f"cpu, native kernels, {library().isa()}",
        "torch": torch.__version__,
        "full_cache_bytes_per_token": full,
        "outlier_pairs": args.outlier_pairs,
        "outlier_ratio": {kind: outlier_ratio(args, x, text) for kind, x in kinds.items()},
        "rows": rows,
    }
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    args.out.with_suffix(".md").write_text("\n".join(markdown(report)) + "\n")


if __name__ == "__main__":
    main()
