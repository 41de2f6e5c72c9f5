"""Train the tokenizer of `tales`: a byte-level BPE of exactly 8192 entries.

Every one of the 256 byte values is an entry of its own, so any text encodes and decodes without
loss; digits are never merged; a run of punctuation keeps the line breaks that follow it, because
`."` before an empty line ends most paragraphs of a novel.

    python -m training.tokenizer --data DATA --out OUT
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from training.data import SOURCES, Source, check_data_folder, documents

VOCABULARY = 8192
CONTEXT = 2048
END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
MASK = "<|mask|>"
PAD = "<|pad|>"
RESERVED = tuple(f"<|reserved_{i}|>" for i in range(11))
SPECIAL = (END_OF_TEXT, IM_START, IM_END, MASK, PAD, *RESERVED)

SPLIT_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)"  # English contractions
    r"| ?\p{L}[\p{L}\p{M}]*"  # a word with the blank before it
    r"| ?\p{N}"  # one digit
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # punctuation with the line breaks after it
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"  # white space
)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def sample_text(folder: Path, megabytes: float, seed: int = 0) -> Iterator[str]:
    """Slices of documents from every source, about `megabytes` in all, shared out by weight."""
    rng = random.Random(seed)
    sized: list[tuple[Source, int]] = [
        (s, sum((folder / "text" / name).stat().st_size for name in s.files)) for s in SOURCES
    ]
    total = sum(source.weight * size for source, size in sized)
    for source, size in sized:
        budget = int(megabytes * 1e6 * source.weight * size / total)
        names = list(source.files)
        for name in names:
            left = budget // len(names)
            docs = list(documents(folder, source, name))
            rng.shuffle(docs)
            slice_length = max(2_000, 2 * left // max(1, len(docs)))
            for doc in docs:
                if left <= 0:
                    break
                start = rng.randrange(max(1, len(doc) - slice_length))
                piece = doc[start : start + slice_length]
                for special in (IM_START, IM_END):
                    piece = piece.replace(special, "")
                left -= len(piece)
                yield piece


def train_tokenizer(folder: Path, megabytes: float) -> Tokenizer:
    """Byte-level BPE on a sample of the training text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_text(folder, megabytes), trainer)
    bos = tokenizer.token_to_id(END_OF_TEXT)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A $B:1",
        special_tokens=[(END_OF_TEXT, bos)],
    )
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise SystemExit(
            f"the sample gave {tokenizer.get_vocab_size()} entries instead of {VOCABULARY}: "
            "use a larger --megabytes"
        )
    return tokenizer


def check_lossless(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that has no entry for some byte or that changes some text."""
    missing = [c for c in pre_tokenizers.ByteLevel.alphabet() if tokenizer.token_to_id(c) is None]
    if missing:
        raise SystemExit(f"{len(missing)} byte values have no entry of their own")
    rng = random.Random(1)
    texts = [
        "",
        " ",
        "\n\n",
        "a  b\t\r\n c",
        "1234567.89",
        "naïve 你好 \U0001f600 \x00\x7f",
        "don't",
    ]
    texts += [
        "".join(
            chr(rng.choice([rng.randrange(32, 127), rng.randrange(1, 0xD7FF)])) for _ in range(n)
        )
        for n in range(1, 200)
    ]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if tokenizer.decode(ids, skip_special_tokens=False) != text:
            raise SystemExit(f"the tokenizer does not give back {text!r}")


def tokenizer_config() -> dict[str, object]:
    """What `tokenizer_config.json` says beside `tokenizer.json`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "mask_token": MASK,
        "additional_special_tokens": [IM_START, IM_END],
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "padding_side": "left",
        "chat_template": CHAT_TEMPLATE,
    }


def main() -> None:
    """Command line: train the tokenizer and write its two files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with text/ and eval/")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer files")
    parser.add_argument("--megabytes", type=float, default=60, help="size of the text sample")
    args = parser.parse_args()
    check_data_folder(args.data)
    tokenizer = train_tokenizer(args.data, args.megabytes)
    check_lossless(tokenizer)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out / "tokenizer.json"))
    config = json.dumps(tokenizer_config(), indent=2, ensure_ascii=False) + "\n"
    (args.out / "tokenizer_config.json").write_text(config, encoding="utf-8")
    print(f"{tokenizer.get_vocab_size()} entries written to {args.out}")


if __name__ == "__main__":
    main()
