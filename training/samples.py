"""Let a packaged model write, through transformers, so that a person can look at the result.

python -m training.samples --model MODEL
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

STORIES = (
    "Once upon a time",
    "One day, a little girl named Lily",
    "CHAPTER I\n\nThe old house stood",
)
QUESTIONS = (
    "I'd like to book a table for two tonight",
    "Can you find me a bus to San Diego for tomorrow?",
    "Tell me a story about a little dog named Max.",
)


def main() -> None:
    """Command line: print stories and answers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--tokens", type=int, default=160, help="new tokens at most")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    tokenizer: Any = AutoTokenizer.from_pretrained(str(args.model))
    model: Any = AutoModelForCausalLM.from_pretrained(str(args.model), dtype=torch.float32)
    model.eval()
    prompts = [(text, tokenizer(text).input_ids) for text in STORIES]
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        prompts.append((f"[user] {question}\n[assistant] ", ids["input_ids"]))
    for shown, ids in prompts:
        torch.manual_seed(args.seed)
        batch = torch.tensor([ids])
        for label, sampling in (
            ("greedy", {"do_sample": False}),
            ("sampled", {"do_sample": True, "temperature": args.temperature, "top_p": 0.95}),
        ):
            output = model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=args.tokens,
                **sampling,
            )
            text = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
            print(f"--- {label}\n{shown}{text}\n", flush=True)


if __name__ == "__main__":
    main()
