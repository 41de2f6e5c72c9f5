"""Train `tales` from nothing on the encoded text.

    python -m training.train --tokens TOKENS --data DATA --tokenizer TOKENIZER --work WORK \
        --total 1.2e9

The run stops by itself after `--seconds` and goes on from `WORK/state.pt` when the same command
is given again; the weights so far are written to `WORK/model` at every stop.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from training.data import SEPARATOR, WindowSampler, read_text, split_documents
from training.model import CONFIGS, Llama, save_model
from training.optim import Optimizer, rate_factor

COLUMNS = ("step", "tokens", "context", "seconds", "rate", "loss", "children_bpb", "fiction_bpb")
END = 0  # id of <|endoftext|>


def window_batch(tokens: Tensor, starts: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Windows of `length + 1` tokens; every second one begins with `<|endoftext|>`."""
    at = starts[:, None] + torch.arange(length + 1, device=tokens.device)
    batch = tokens[at].long()
    marked = torch.rand(len(starts), generator=generator) < 0.5
    batch[marked.to(batch.device), 0] = END
    return batch


class DevText:
    """The two development files, for a quick look at bits per byte during training.

    Windows follow one another without overlap, each begins with `<|endoftext|>`, and documents
    run on: `evaluate.py` measures more carefully.
    """

    def __init__(self, data: Path, tokenizer: Path, device: str, limit: int) -> None:
        from tokenizers import Tokenizer

        encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        if encoder.token_to_id(SEPARATOR) != END:
            raise SystemExit(f"{SEPARATOR} is not entry {END} of the tokenizer")
        self.sets: dict[str, tuple[Tensor, float]] = {}
        for name in ("children", "fiction"):
            text = "\n\n".join(split_documents(read_text(data / "eval" / f"{name}_dev.txt.xz")))
            ids = encoder.encode(text[: limit or None], add_special_tokens=False).ids
            size = len(text[: limit or None].encode()) / len(ids)
            self.sets[name] = (torch.tensor(ids, device=device), size)

    @torch.no_grad()
    def bits_per_byte(self, model: Llama, length: int, rows: int = 32) -> dict[str, float]:
        """Approximate bits per byte of each set."""
        result = {}
        for name, (ids, size) in self.sets.items():
            count = ids.numel() // length
            targets = ids[: count * length].view(count, length)
            inputs = F.pad(targets[:, :-1], (1, 0), value=END)
            total = sum(
                float(model(inputs[i : i + rows], targets[i : i + rows]))
                * len(inputs[i : i + rows])
                for i in range(0, count, rows)
            )
            result[name] = total / count / math.log(2) / size
        return result


class Run:
    """The state of a training run and the files it keeps."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work: Path = args.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.cuda = args.device.startswith("cuda")
        torch.set_float32_matmul_precision("high")
        if args.attention == "cudnn":
            torch.backends.cuda.enable_flash_sdp(False)
            torch.backends.cuda.enable_mem_efficient_sdp(False)
        dtype = torch.bfloat16 if self.cuda else torch.float32
        self.model = Llama(CONFIGS[args.config], dtype).to("cpu")
        self.model.initialise(args.seed)
        self.model.to(args.device)
        self.optimizer = Optimizer(
            self.model, args.matrix_rate, args.other_rate, args.decay, compiled=self.cuda
        )
        self.step = self.seen = 0
        self.seconds = 0.0
        self.sampler_state: dict[str, int] | None = None
        self.generator = torch.Generator().manual_seed(args.seed)
        self.state_path = self.work / "state.pt"
        if self.state_path.is_file():
            self.restore()

    def restore(self) -> None:
        """Go on from the saved state."""
        state = torch.load(self.state_path, map_location=self.args.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.restore(state["optimizer"])
        self.step, self.seen = state["step"], state["seen"]
        self.seconds, self.sampler_state = state["seconds"], state["sampler"]
        self.generator.set_state(state["generator"].cpu())
        print(f"going on after step {self.step}, {self.seen / 1e6:.1f} M tokens", flush=True)

    def save(self, sampler: WindowSampler) -> None:
        """Write the state, and the weights so far as a model folder."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state(),
            "step": self.step,
            "seen": self.seen,
            "seconds": self.seconds,
            "sampler": sampler.state(),
            "generator": self.generator.get_state(),
        }
        temporary = self.work / "state.tmp"
        torch.save(state, temporary)
        temporary.rename(self.state_path)
        save_model(self.model, self.work / "model")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(self.args.tokenizer / name, self.work / "model" / name)

    def log(self, row: dict[str, object]) -> None:
        """Add a row to `curve.csv` and print it."""
        path = self.work / "curve.csv"
        fresh = not path.is_file()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerow(row)
        print(json.dumps(row), flush=True)


def train(args: argparse.Namespace) -> bool:
    """Train until the end or until the time is up; says whether the run is complete."""
    run = Run(args)
    dev = DevText(args.data, args.tokenizer, args.device, args.dev_limit)
    loss_of = torch.compile(run.model, dynamic=False) if run.cuda else run.model
    started = time.monotonic()
    before = run.seconds
    sampler: WindowSampler | None = None
    tokens = torch.empty(0)
    losses: list[Tensor] = []
    batch_tokens: int = args.batch
    total_steps = int(args.total) // batch_tokens

    def elapsed() -> float:
        return time.monotonic() - started

    while run.step < total_steps and not (args.seconds and elapsed() > args.seconds):
        length = args.short if run.step < args.short_part * total_steps else args.context
        if sampler is None or sampler.length != length:
            sampler = WindowSampler(args.tokens, length, args.seed, args.allow_missing)
            if run.sampler_state and run.sampler_state["length"] == length:
                sampler.restore(run.sampler_state)
            if not tokens.numel():
                tokens = torch.from_numpy(sampler.tokens).to(args.device)
                print(f"{tokens.numel() / 1e6:.1f} M tokens of text", flush=True)
        starts = torch.from_numpy(sampler.next(batch_tokens // length)).to(args.device)
        batch = window_batch(tokens, starts, length, run.generator)
        loss = loss_of(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        loss.backward()
        factor = rate_factor(run.step / total_steps, flat=args.flat)
        run.optimizer.step(factor)
        losses.append(loss.detach())
        run.step += 1
        run.seen += batch_tokens
        if run.step % args.log_every == 0 or run.step == total_steps:
            mean = float(torch.stack(losses).mean())
            losses.clear()
            if not math.isfinite(mean):
                raise SystemExit(f"the loss is {mean} at step {run.step}: lower the rates")
            run.seconds = before + elapsed()
            row: dict[str, object] = {
                "step": run.step,
                "tokens": run.seen,
                "context": length,
                "seconds": round(run.seconds, 1),
                "rate": round(args.matrix_rate * factor, 7),
                "loss": round(mean, 4),
            }
            if run.step % args.dev_every == 0 or run.step == total_steps:
                for name, value in dev.bits_per_byte(run.model, length).items():
                    row[f"{name}_bpb"] = round(value, 4)
            run.log(row)
    run.seconds = before + elapsed()
    if sampler is not None:
        run.save(sampler)
    complete = run.step >= total_steps
    print(
        f"{'complete' if complete else 'stopped'} at step {run.step} of {total_steps}", flush=True
    )
    return complete


def main() -> None:
    """Command line: train."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=Path, required=True, help="folder made by training.data")
    parser.add_argument("--data", type=Path, required=True, help="folder with eval/")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of tokenizer.json")
    parser.add_argument("--work", type=Path, required=True, help="folder for state, log, weights")
    parser.add_argument("--config", choices=sorted(CONFIGS), default="tales")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--attention", choices=("flash", "cudnn"), default="flash")
    parser.add_argument("--total", type=float, default=1.2e9, help="tokens of the whole run")
    parser.add_argument("--batch", type=int, default=131072, help="tokens of a step")
    parser.add_argument("--short", type=int, default=1024, help="context at first")
    parser.add_argument("--short-part", type=float, default=0.6, help="part of the run it is used")
    parser.add_argument("--context", type=int, default=2048, help="context afterwards")
    parser.add_argument("--matrix-rate", type=float, default=3e-3, help="peak rate of Muon")
    parser.add_argument("--other-rate", type=float, default=3e-3, help="peak rate of AdamW")
    parser.add_argument("--decay", type=float, default=0.1, help="weight decay, times the rate")
    parser.add_argument("--flat", type=float, default=0.4, help="part before the rates go down")
    parser.add_argument("--seconds", type=float, default=0, help="stop after this time; 0: never")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--dev-every", type=int, default=500)
    parser.add_argument("--dev-limit", type=int, default=0, help="characters of each dev text")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--allow-missing", action="store_true", help="train on the files there are")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
