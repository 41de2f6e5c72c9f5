"""Teach `tales-draft` to guess what `tales` would say.

    python -m training.distill --teacher MODEL --tokens TOKENS --data DATA --work WORK --seconds 150

The loss is (1 - a) KL(p || q) + a TV(p, q) over the whole vocabulary at every position, p being
the teacher. TV, the total variation, is exactly one minus the chance that a drafted token is
accepted at temperature 1; on its own it learns slowly from a fresh start, so a goes from 0 to
`--tv` between 30% and 60% of the run.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from training.data import WindowSampler
from training.evaluate import acceptance, held_out, text_windows
from training.model import CONFIGS, Llama, load_model, save_model
from training.optim import Optimizer, rate_factor
from training.train import window_batch

COLUMNS = ("step", "tokens", "seconds", "mix", "kl", "text_acceptance", "children_acceptance")


class Pupil(nn.Module):
    """The draft together with the loss against the teacher's scores."""

    def __init__(self, draft: Llama) -> None:
        super().__init__()
        self.draft = draft

    def forward(
        self, tokens: Tensor, teacher: Tensor, mix: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, KL divergence, total variation; each the mean over positions."""
        log_q = self.draft.logits(tokens).float().log_softmax(-1)
        log_p = teacher.float().log_softmax(-1)
        p = log_p.exp()
        kl = (p * (log_p - log_q)).sum(-1).mean()
        tv = 0.5 * (p - log_q.exp()).abs().sum(-1).mean()
        return (1 - mix) * kl + mix * tv, kl.detach(), tv.detach()


def mix_factor(done: float) -> float:
    """How far the change from KL to TV is."""
    return min(1.0, max(0.0, (done - 0.3) / 0.3))


def distill(args: argparse.Namespace) -> None:
    """Train the draft and write its folder."""
    cuda = args.device.startswith("cuda")
    dtype = torch.bfloat16 if cuda else torch.float32
    torch.set_float32_matmul_precision("high")
    teacher = load_model(args.teacher, args.device, dtype)
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    draft = Llama(CONFIGS[args.config], dtype)
    draft.initialise(args.seed)
    draft.to(args.device)
    optimizer = Optimizer(draft, args.matrix_rate, args.other_rate, args.decay, compiled=cuda)
    pupil = Pupil(draft)
    scores_of: Callable[[Tensor], Tensor] = teacher.logits
    loss_of: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = pupil
    if cuda:
        scores_of = torch.compile(teacher.logits, dynamic=False)
        loss_of = torch.compile(pupil, dynamic=False)
    length = draft.config.context if not args.length else args.length
    sampler = WindowSampler(args.tokens, length, args.seed + 100, args.allow_missing)
    tokens = torch.from_numpy(sampler.tokens).to(args.device)
    encoder = Tokenizer.from_file(str(args.teacher / "tokenizer.json"))
    dev = text_windows(encoder, held_out(args.data, 0)["children_dev"], length, args.dev_windows)
    dev = dev.to(args.device)
    generator = torch.Generator().manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    log = (args.work / "curve.csv").open("w", newline="", encoding="utf-8")
    writer = csv.DictWriter(log, COLUMNS, lineterminator="\n")
    writer.writeheader()
    step = seen = 0
    done = 0.0
    sums = torch.zeros(3, device=args.device)
    since = 0
    started = 0.0
    while done < 1:
        starts = torch.from_numpy(sampler.next(args.batch // length)).to(args.device)
        batch = window_batch(tokens, starts, length, generator)[:, :-1].contiguous()
        with torch.no_grad():
            scores = scores_of(batch)
        mix = torch.tensor(args.tv * mix_factor(done), device=args.device)
        loss, kl, tv = loss_of(batch, scores, mix)
        loss.backward()
        optimizer.step(rate_factor(done, flat=args.flat))
        sums += torch.stack((loss.detach(), kl, 1 - tv))
        since += 1
        step += 1
        seen += args.batch
        if step == 1:  # compiling is over: the clock starts here
            loss.item()
            started = time.monotonic()
        spent = time.monotonic() - started
        done = max(seen / args.total, spent / args.seconds if args.seconds else 0.0)
        if step % args.log_every == 0 or done >= 1:
            means = (sums / since).tolist()
            spent = time.monotonic() - started
            row: dict[str, object] = {
                "step": step, "tokens": seen, "seconds": round(spent, 1),
                "mix": round(float(mix), 3), "kl": round(means[1], 4),
                "text_acceptance": round(means[2], 4),
            }  # fmt: skip
            if step % (5 * args.log_every) == 0 or done >= 1:
                found = acceptance(teacher, draft, dev)
                row["children_acceptance"] = round(found["acceptance"], 4)
            writer.writerow(row)
            log.flush()
            print(json.dumps(row), flush=True)
            sums.zero_()
            since = 0
    log.close()
    save_model(draft, args.work / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(args.teacher / name, args.work / "model" / name)


def main() -> None:
    """Command line: distil."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", type=Path, required=True, help="model folder of the teacher")
    parser.add_argument("--tokens", type=Path, required=True, help="folder made by training.data")
    parser.add_argument("--data", type=Path, required=True, help="folder with eval/")
    parser.add_argument("--work", type=Path, required=True, help="folder for log and weights")
    parser.add_argument("--config", choices=sorted(CONFIGS), default="tales-draft")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--total", type=float, default=5e8, help="tokens at most")
    parser.add_argument("--seconds", type=float, default=0, help="end after this time; 0: --total")
    parser.add_argument("--batch", type=int, default=65536, help="tokens of a step")
    parser.add_argument("--length", type=int, default=0, help="context; 0: the whole")
    parser.add_argument("--matrix-rate", type=float, default=5e-3, help="peak rate of Muon")
    parser.add_argument("--other-rate", type=float, default=5e-3, help="peak rate of AdamW")
    parser.add_argument("--decay", type=float, default=0.02, help="weight decay, times the rate")
    parser.add_argument("--flat", type=float, default=0.4, help="part before the rates go down")
    parser.add_argument("--tv", type=float, default=0.9, help="share of TV in the loss at the end")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--dev-windows", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--allow-missing", action="store_true", help="use the files there are")
    distill(parser.parse_args())


if __name__ == "__main__":
    main()
