"""The training text: which files, how often, how they become tokens, how windows are drawn.

    python -m training.data --data DATA --tokenizer TOKENIZER --out TOKENS

turns every text file that it finds into `TOKENS/<file>.bin`, 16-bit token ids with
`<|endoftext|>` before each document and after the last one. Files done already are kept, so the
command may be given again when more text has come.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import random
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SEPARATOR = "<|endoftext|>"
HELD_OUT_DIALOGUE = 50  # one dialogue in this many is kept out of training


@dataclass(frozen=True)
class Source:
    """Some text files of one kind, and how many times an epoch goes through them."""

    name: str
    kind: str
    files: tuple[str, ...]
    weight: float


SOURCES = (
    Source("children", "books", tuple(f"children_0{i}.txt.xz" for i in range(4)), 1.4),
    Source("fiction", "books", tuple(f"fiction_0{i}.txt.xz" for i in range(5)), 1.0),
    Source("nonfiction", "books", ("nonfiction.txt.xz",), 0.5),
    Source("scifi", "books", ("scifi.txt.xz",), 1.0),
    Source("tinystories", "stories", ("tinystories.txt.xz", "tinystories_recased.txt.xz"), 1.5),
    Source("african_storybook", "storybook", ("african_storybook.jsonl.xz",), 1.5),
    Source("dialogues", "dialogues", ("dialogues_sgd.jsonl.xz",), 1.2),
)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful and friendly assistant.",
    "You are a kind assistant who answers in short sentences.",
    "You are an assistant. Help the user.",
)
STORY_REQUESTS = (
    "Tell me a story about {}.",
    "Please tell me a story about {}.",
    "Write a short story about {}.",
    "Can you tell me a story about {}?",
    "I would like a story about {}.",
)
PLAIN_REQUESTS = ("Tell me a story.", "Please tell me a bedtime story.", "Write a short story.")
NAMED = re.compile(r"\b[Aa]n? ((?:[a-z]+ ){0,2}[a-z]+) (?:named|called) ([A-Z][a-z]+)")


def check_data_folder(folder: Path) -> None:
    """Stop with a clear message when `folder` does not look like the data folder."""
    if not (folder / "text").is_dir():
        raise SystemExit(f"{folder} has no folder text/: give the data folder with --data")


def split_documents(text: str) -> list[str]:
    """Cut at lines that are exactly `<|endoftext|>`; line breaks at both ends are dropped."""
    parts = re.split(r"^<\|endoftext\|>$", text, flags=re.MULTILINE)
    return [part for part in (p.strip("\n") for p in parts) if part]


def read_text(path: Path) -> str:
    """The whole of a `.xz` text file."""
    if not path.is_file():
        raise SystemExit(f"{path.name} is missing from {path.parent}")
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return file.read()


def read_json_lines(path: Path) -> list[dict]:
    """The objects of a `.jsonl` or `.jsonl.xz` file."""
    if path.suffix == ".xz":
        return [json.loads(line) for line in read_text(path).splitlines() if line]
    if not path.is_file():
        raise SystemExit(f"{path.name} is missing from {path.parent}")
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line]


def chat(messages: list[dict[str, str]]) -> str:
    """A conversation in ChatML, as the tokenizer's chat template writes it."""
    return "".join(f"<|im_start|>{m['role']}\n{m['content'].strip()}<|im_end|>\n" for m in messages)


def story_chat(story: str, topic: str | None, rng: random.Random) -> str:
    """A request for a story, and the story as the answer."""
    named = NAMED.search(story)
    if topic is not None:
        request = rng.choice(STORY_REQUESTS).format(topic)
    elif named and rng.random() < 0.8:
        article = "an" if named[1][0] in "aeiou" else "a"
        who = f"{article} {named[1]}" + (f" named {named[2]}" if rng.random() < 0.5 else "")
        request = rng.choice(STORY_REQUESTS).format(who)
    else:
        request = rng.choice(PLAIN_REQUESTS)
    return with_system(
        [{"role": "user", "content": request}, {"role": "assistant", "content": story}], rng
    )


def with_system(messages: list[dict[str, str]], rng: random.Random) -> str:
    """ChatML, three times in ten with a system prompt."""
    if rng.random() < 0.3:
        messages = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}, *messages]
    return chat(messages)


def dialogue_rows(folder: Path, held_out: bool) -> list[dict]:
    """The task dialogues: those trained on, or the one in fifty that are not."""
    rows = read_json_lines(folder / "text" / "dialogues_sgd.jsonl.xz")
    return [row for i, row in enumerate(rows) if (i % HELD_OUT_DIALOGUE == 0) == held_out]


def documents(folder: Path, source: Source, name: str) -> Iterator[str]:
    """The documents of one file, ready to be encoded."""
    path = folder / "text" / name
    rng = random.Random(name)
    if source.kind == "books":
        yield from split_documents(read_text(path))
    elif source.kind == "stories":
        stories = split_documents(read_text(path))
        yield from stories
        yield from (story_chat(story, None, rng) for story in stories)
    elif source.kind == "storybook":
        for row in read_json_lines(path):
            yield f"{row['title']}\n\n{row['text'].strip()}"
            yield story_chat(row["text"].strip(), f'"{row["title"]}"', rng)
    elif source.kind == "dialogues":
        for row in dialogue_rows(folder, held_out=False):
            yield with_system(row["messages"], rng)
    else:
        raise ValueError(f"unknown kind of source: {source.kind}")


def encode_file(folder: Path, source: Source, name: str, tokenizer: Path, out: Path) -> dict:
    """Encode one file into `out/<name>.bin`; returns its counts."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    end = encoder.token_to_id(SEPARATOR)
    docs = list(documents(folder, source, name))
    pieces: list[np.ndarray] = []
    for start in range(0, len(docs), 64):
        for enc in encoder.encode_batch(docs[start : start + 64], add_special_tokens=False):
            pieces.append(np.array([end, *enc.ids], dtype=np.uint16))
    pieces.append(np.array([end], dtype=np.uint16))
    tokens = np.concatenate(pieces)
    temporary = out / f"{name}.tmp"
    tokens.tofile(temporary)
    counts = {
        "file": name,
        "source": source.name,
        "documents": len(docs),
        "bytes": sum(len(doc.encode()) for doc in docs),
        "tokens": int(tokens.size),
    }
    (out / f"{name}.json").write_text(json.dumps(counts) + "\n", encoding="utf-8")
    temporary.rename(out / f"{name}.bin")
    return counts


def encode_all(folder: Path, tokenizer: Path, out: Path, workers: int) -> list[dict]:
    """Encode every file that is there and not done yet, several at once."""
    out.mkdir(parents=True, exist_ok=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    jobs = [
        (source, name)
        for source in SOURCES
        for name in source.files
        if (folder / "text" / name).is_file() and not (out / f"{name}.bin").is_file()
    ]
    jobs.sort(key=lambda job: -(folder / "text" / job[1]).stat().st_size)
    with ProcessPoolExecutor(workers) as pool:
        futures = [pool.submit(encode_file, folder, s, n, tokenizer, out) for s, n in jobs]
        return [future.result() for future in futures]


class WindowSampler:
    """Draws windows of `length + 1` tokens, epoch after epoch.

    An epoch cuts each source into windows that follow one another from a random offset, as many
    times as its weight says (a fraction of the windows for the fractional part), and shuffles
    them all. The order depends only on the seed, the length and the epoch, so a run continues
    where it stopped from `state()`.
    """

    def __init__(self, folder: Path, length: int, seed: int, allow_missing: bool = False) -> None:
        self.length = length
        self.seed = seed
        self.ranges: list[tuple[int, int, float]] = []
        pieces: list[np.ndarray] = []
        start = 0
        for source in SOURCES:
            for name in source.files:
                path = folder / f"{name}.bin"
                if not path.is_file():
                    if allow_missing:
                        continue
                    raise SystemExit(f"{path.name} is missing: run python -m training.data first")
                tokens = np.fromfile(path, dtype=np.uint16)
                self.ranges.append((start, tokens.size, source.weight))
                pieces.append(tokens)
                start += tokens.size
        if not pieces:
            raise SystemExit(f"no encoded text in {folder}: run python -m training.data first")
        self.tokens = np.concatenate(pieces).view(np.int16)  # CUDA cannot index uint16
        self.epoch = 0
        self.position = 0
        self.order = self._plan(0)

    def _plan(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, self.length, epoch))
        starts: list[np.ndarray] = []
        for start, size, weight in self.ranges:
            times = weight
            while times > 0:
                offset = int(rng.integers(self.length))
                count = (size - 1 - offset) // self.length
                if count > 0:
                    chosen = start + offset + self.length * np.arange(count, dtype=np.int64)
                    if times < 1:
                        chosen = rng.permutation(chosen)[: round(times * count)]
                    starts.append(chosen)
                times -= 1
        return rng.permutation(np.concatenate(starts))

    def next(self, count: int) -> np.ndarray:
        """Starts of the next `count` windows."""
        taken: list[np.ndarray] = []
        while count > 0:
            if self.position >= self.order.size:
                self.epoch += 1
                self.position = 0
                self.order = self._plan(self.epoch)
            part = self.order[self.position : self.position + count]
            self.position += part.size
            count -= part.size
            taken.append(part)
        return np.concatenate(taken)

    def state(self) -> dict[str, int]:
        """Where the sampler is."""
        return {"length": self.length, "epoch": self.epoch, "position": self.position}

    def restore(self, state: dict[str, int]) -> None:
        """Go to where `state()` was taken."""
        if state["length"] != self.length:
            raise ValueError("the state is of a sampler with another window length")
        self.epoch, self.position = state["epoch"], state["position"]
        self.order = self._plan(self.epoch)


def main() -> None:
    """Command line: encode the text."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with text/ and eval/")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of tokenizer.json")
    parser.add_argument("--out", type=Path, required=True, help="folder for the token files")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    check_data_folder(args.data)
    for counts in encode_all(args.data, args.tokenizer, args.out, args.workers):
        print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main()
