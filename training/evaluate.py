"""Measure a trained model: bits per byte, BLiMP, last words, next sentences, acceptance.

    python -m training.evaluate --model MODEL --data DATA --out RESULT.json [--draft DRAFT]

Bits per byte: each document (line breaks at its ends dropped) is encoded, `<|endoftext|>` goes in
front, and windows of 2048 inputs are taken every 1024. The first window of a document scores all
its 2048 targets, every later one only its last 1024, so each token is scored once and, past the
beginning of its document, with at least 1024 tokens before it. The sum of -ln p over all tokens
of all documents (the closing `<|endoftext|>` is not scored), divided by ln 2 and by the UTF-8
bytes of the documents, is the figure. Weights are the bf16 ones, computing is in float32 unless
`--dtype` says otherwise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from training.data import chat, dialogue_rows, read_json_lines, read_text, split_documents
from training.model import Llama, load_model

END = 0
IGNORE = -100
BUCKETS = (0, 128, 512, 1024, 1536, 2048)
Pair = tuple[list[int], list[int]]


@torch.no_grad()
def token_nats(model: Llama, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """-ln p of each target (zero where ignored), and whether it was the most likely one."""
    scores = model.logits(inputs).float()
    nats = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none")
    return nats.view_as(targets), scores.argmax(-1) == targets


def bits_per_byte(
    model: Llama, encoder: Tokenizer, docs: list[str], rows: int = 16, stride: int = 1024
) -> dict[str, float]:
    """Bits per byte as the head of this file defines it."""
    context = model.config.context
    device = model.cos.device
    windows: list[tuple[list[int], list[int]]] = []
    tokens = 0
    for doc in docs:
        ids = [END, *encoder.encode(doc, add_special_tokens=False).ids]
        tokens += len(ids) - 1
        scored = 1
        start = 0
        while scored < len(ids):
            stop = min(start + context, len(ids) - 1)
            skip = scored - (start + 1)
            windows.append((ids[start:stop], [IGNORE] * skip + ids[scored : stop + 1]))
            scored = stop + 1
            start += stride
    total = 0.0
    for at in range(0, len(windows), rows):
        part = windows[at : at + rows]
        width = max(len(w[0]) for w in part)
        inputs = torch.tensor([w[0] + [END] * (width - len(w[0])) for w in part], device=device)
        targets = torch.tensor([w[1] + [IGNORE] * (width - len(w[1])) for w in part], device=device)
        total += float(token_nats(model, inputs, targets)[0].double().sum())
    size = sum(len(doc.encode()) for doc in docs)
    return {
        "bits_per_byte": total / math.log(2) / size,
        "nats_per_token": total / tokens,
        "bytes": size,
        "tokens": tokens,
        "documents": len(docs),
    }


def loss_by_position(
    model: Llama, encoder: Tokenizer, docs: list[str], rows: int = 16
) -> dict[str, float]:
    """Mean nats a token by place in the context: windows of 2048, one after another."""
    context = model.config.context
    windows: list[list[int]] = []
    for doc in docs:
        ids = encoder.encode(doc, add_special_tokens=False).ids
        windows += [ids[i : i + context] for i in range(0, len(ids) - context + 1, context)]
    if not windows:
        return {}
    sums = torch.zeros(context, dtype=torch.float64)
    for at in range(0, len(windows), rows):
        targets = torch.tensor(windows[at : at + rows], device=model.cos.device)
        inputs = F.pad(targets[:, :-1], (1, 0), value=END)
        sums += token_nats(model, inputs, targets)[0].double().sum(0).cpu()
    mean = sums / len(windows)
    result = {
        f"{low}-{high - 1}": float(mean[low:high].mean())
        for low, high in itertools.pairwise(BUCKETS)
    }
    result["windows"] = len(windows)
    return result


def score_pairs(model: Llama, pairs: list[Pair], budget: int = 32768) -> list[tuple[float, bool]]:
    """For each (context, target): -ln p of the target, and whether greedy decoding gives it."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    result: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    at = 0
    while at < len(order):
        part: list[int] = []
        while at < len(order):
            length = len(pairs[order[at]][0]) + len(pairs[order[at]][1])
            if part and length * (len(part) + 1) > budget:
                break
            part.append(order[at])
            at += 1
        width = max(len(pairs[i][0]) + len(pairs[i][1]) for i in part) - 1
        inputs = torch.full((len(part), width), END)
        targets = torch.full((len(part), width), IGNORE)
        for row, i in enumerate(part):
            context, target = pairs[i]
            ids = torch.tensor(context + target)
            inputs[row, : len(ids) - 1] = ids[:-1]
            targets[row, len(context) - 1 : len(ids) - 1] = ids[len(context) :]
        device = model.cos.device
        nats, greedy = token_nats(model, inputs.to(device), targets.to(device))
        greedy |= targets.to(device) == IGNORE
        for i, total, right in zip(part, nats.sum(1).tolist(), greedy.all(1).tolist(), strict=True):
            result[i] = (total, right)
    return result


def encode_ids(encoder: Tokenizer, text: str) -> list[int]:
    """Ids of a text alone."""
    return encoder.encode(text, add_special_tokens=False).ids


def blimp(model: Llama, encoder: Tokenizer, data: Path, limit: int = 0) -> dict[str, object]:
    """Part of minimal pairs whose good sentence is the likelier, after `<|endoftext|>`."""
    rows = read_json_lines(data / "eval" / "blimp_a.jsonl.xz")
    if limit:
        rows = rows[:: max(1, len(rows) // limit)]
    pairs = [([END], encode_ids(encoder, row[key])) for row in rows
             for key in ("sentence_good", "sentence_bad")]  # fmt: skip
    nats = [total for total, _ in score_pairs(model, pairs)]
    by_field: dict[str, list[bool]] = defaultdict(list)
    for i, row in enumerate(rows):
        by_field[row["field"]].append(nats[2 * i] < nats[2 * i + 1])
    right = [x for values in by_field.values() for x in values]
    return {
        "accuracy": sum(right) / len(right),
        "pairs": len(right),
        "by_field": {name: sum(v) / len(v) for name, v in sorted(by_field.items())},
    }


def last_word(model: Llama, encoder: Tokenizer, data: Path, name: str) -> dict[str, float]:
    """Part of items whose last word greedy decoding gives, all its tokens right."""
    rows = read_json_lines(data / "eval" / f"last_word_{name}.jsonl")
    pairs = [
        ([END, *encode_ids(encoder, row["context"])], encode_ids(encoder, " " + row["target"]))
        for row in rows
    ]
    scored = score_pairs(model, pairs)
    return {
        "accuracy": sum(right for _, right in scored) / len(rows),
        "nats_per_word": sum(total for total, _ in scored) / len(rows),
        "items": len(rows),
    }


def next_sentence(model: Llama, encoder: Tokenizer, data: Path, name: str) -> dict[str, float]:
    """Four-way choice by -ln p of the option after the context, a byte and in all."""
    rows = read_json_lines(data / "eval" / f"next_sentence_{name}.jsonl")
    pairs = [
        ([END, *encode_ids(encoder, row["context"])], encode_ids(encoder, " " + option))
        for row in rows
        for option in row["options"]
    ]
    nats = [total for total, _ in score_pairs(model, pairs)]
    by_byte = by_sum = 0
    for i, row in enumerate(rows):
        four = nats[4 * i : 4 * i + 4]
        rates = [n / len(o.encode()) for n, o in zip(four, row["options"], strict=True)]
        by_byte += rates.index(min(rates)) == row["label"]
        by_sum += four.index(min(four)) == row["label"]
    return {"accuracy": by_byte / len(rows), "accuracy_unnormalised": by_sum / len(rows),
            "items": len(rows)}  # fmt: skip


@torch.no_grad()
def acceptance(target: Llama, draft: Llama, windows: Tensor, skip: int = 0, rows: int = 8) -> dict:
    """Mean over positions of sum(min(p, q)): the chance that one drafted token is accepted."""
    total = kl = 0.0
    count = 0
    for part in windows.split(rows):
        p = target.logits(part)[:, skip:].float().log_softmax(-1)
        q = draft.logits(part)[:, skip:].float().log_softmax(-1)
        total += float(torch.minimum(p, q).exp().sum(-1).double().sum())
        kl += float((p.exp() * (p - q)).sum(-1).double().sum())
        count += p.shape[0] * p.shape[1]
    return {"acceptance": total / count, "kl": kl / count, "positions": count}


def text_windows(encoder: Tokenizer, docs: list[str], context: int, limit: int) -> Tensor:
    """Windows of text one after another, each with `<|endoftext|>` first."""
    rows: list[list[int]] = []
    for doc in docs:
        ids = encode_ids(encoder, doc)
        step = context - 1
        rows += [[END, *ids[i : i + step]] for i in range(0, len(ids) - step + 1, step)]
    return torch.tensor(rows[:: max(1, len(rows) // limit)] if limit else rows)


@torch.no_grad()
def own_samples(folder: Path, prompts: Tensor, new: int, device: str, seed: int) -> Tensor:
    """Continuations that the model itself draws at temperature 1, through transformers."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype)
    model.to(device).eval()
    model.generation_config.eos_token_id = None
    return model.generate(
        prompts.to(device), attention_mask=torch.ones_like(prompts).to(device), do_sample=True,
        temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=new,
    )  # fmt: skip


def draft_report(args: argparse.Namespace, target: Llama, encoder: Tokenizer) -> dict[str, object]:
    """Acceptance of the draft on held-out text and on what the target writes itself."""
    draft = load_model(args.draft, args.device, target.dtype)
    context = 256 if args.limit else target.config.context
    result: dict[str, object] = {}
    for name, docs in held_out(args.data, args.limit).items():
        windows = text_windows(encoder, docs, context, 128)
        if not windows.numel():
            continue
        result[f"{name}_text"] = acceptance(target, draft, windows.to(args.device))
        print(name, result[f"{name}_text"], flush=True)
    for name, length in (("nothing", 1), ("children_dev", 64)):
        rows = args.sample_rows
        if length == 1:
            prompts = torch.full((rows, 1), END)
        else:
            docs = held_out(args.data, args.limit)["children_dev"]
            prompts = text_windows(encoder, docs, length, 0)
            prompts = prompts[torch.linspace(0, len(prompts) - 1, rows).long()]
        windows = own_samples(args.model, prompts, args.sample_tokens, args.device, seed=1)
        found = acceptance(target, draft, windows, skip=length - 1)
        result[f"own_samples_after_{name}"] = found
        print("own samples after", name, found, flush=True)
    return result


def held_out(data: Path, limit: int) -> dict[str, list[str]]:
    """The documents that bits per byte are measured on, cut to `limit` characters if not 0."""
    sets = {
        name: split_documents(read_text(data / "eval" / f"{name}.txt.xz"))
        for name in ("children_dev", "fiction_dev")
    }
    if (data / "text" / "dialogues_sgd.jsonl.xz").is_file():
        sets["dialogues_held_out"] = [
            chat(row["messages"]).strip("\n") for row in dialogue_rows(data, held_out=True)
        ]
    if limit:
        sets = {name: [doc[:limit] for doc in docs] for name, docs in sets.items()}
    return sets


def main() -> None:
    """Command line: measure and write a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--draft", type=Path, help="folder of a draft, to measure its acceptance")
    parser.add_argument("--data", type=Path, required=True, help="folder with eval/ and text/")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--limit", type=int, default=0, help="characters of each document; 0: all")
    parser.add_argument(
        "--parts", nargs="+", choices=("text", "tasks", "draft"), default=["text", "tasks", "draft"]
    )
    parser.add_argument("--sample-rows", type=int, default=64)
    parser.add_argument("--sample-tokens", type=int, default=512)
    args = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    model = load_model(args.model, args.device, getattr(torch, args.dtype))
    encoder = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    report: dict[str, object] = {"parameters": model.parameters_count(), "dtype": args.dtype}
    started = time.monotonic()

    def add(name: str, measure: Callable[[], object]) -> None:
        report[name] = measure()
        print(f"{time.monotonic() - started:6.1f} s", name, json.dumps(report[name]), flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    for name, docs in held_out(args.data, args.limit).items() if "text" in args.parts else ():
        add(name, partial(bits_per_byte, model, encoder, docs))
        if not name.startswith("dialogues"):
            add(f"{name}_by_position", partial(loss_by_position, model, encoder, docs))
    if "tasks" in args.parts:
        add("blimp", partial(blimp, model, encoder, args.data, args.limit))
        for name in ("children", "fiction"):
            add(f"last_word_{name}", partial(last_word, model, encoder, args.data, name))
            add(f"next_sentence_{name}", partial(next_sentence, model, encoder, args.data, name))
    if args.draft and "draft" in args.parts:
        add("draft", partial(draft_report, args, model, encoder))


if __name__ == "__main__":
    main()
