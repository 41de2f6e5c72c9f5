"""Check a packaged model against transformers: same weights, same tokens, same bits per byte.

    python -m training.verify --model MODEL --data DATA

Bits per byte of the first characters of each held-out document are measured twice, with the model
of this folder and with transformers' own, both in float32, exactly as `evaluate.py` does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.evaluate import bits_per_byte, held_out
from training.model import Config, load_model
from training.tokenizer import check_lossless


class Foreign(nn.Module):
    """A transformers model with the face that `evaluate.py` asks for."""

    def __init__(self, folder: Path, config: Config) -> None:
        super().__init__()
        self.inner = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
        self.config = config
        self.cos = torch.empty(0)

    def logits(self, tokens: Tensor) -> Tensor:
        """Scores of the next token after every position."""
        return self.inner(tokens, use_cache=False).logits


def main() -> None:
    """Command line: compare and stop with an error where the two differ."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--data", type=Path, required=True, help="folder with eval/")
    parser.add_argument("--limit", type=int, default=20000, help="characters of each document")
    args = parser.parse_args()
    own = load_model(args.model, "cpu")
    foreign = Foreign(args.model, own.config)
    encoder = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    check_lossless(encoder)
    fast = AutoTokenizer.from_pretrained(str(args.model))
    failed = False
    for name, docs in held_out(args.data, args.limit).items():
        if name.startswith("dialogues"):
            continue
        for doc in docs:
            ids = encoder.encode(doc, add_special_tokens=False).ids
            failed |= fast(doc, add_special_tokens=False).input_ids != ids
        mine = bits_per_byte(own, encoder, docs, rows=2)["bits_per_byte"]
        theirs = bits_per_byte(foreign, encoder, docs, rows=2)["bits_per_byte"]  # type: ignore[arg-type]
        failed |= abs(mine - theirs) > 1e-4
        print(f"{name}: {mine:.6f} here, {theirs:.6f} with transformers", flush=True)
    if failed:
        raise SystemExit("the packaged model and transformers disagree")
    print("they agree")


if __name__ == "__main__":
    main()
