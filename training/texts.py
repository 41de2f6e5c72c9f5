"""Cut the two small texts packaged with skimp: one to calibrate on, one to evaluate on.

    python -m training.texts --data DATA --out OUT

`calibration.txt` comes from books that `tales` was trained on, `evaluation.txt` from books that
it never saw. Both hold public-domain text only, whole paragraphs, the excerpts separated by
`<|endoftext|>` lines. The books are old: excerpts with words that insult a people are passed over.
"""

from __future__ import annotations

import argparse
import random
import re
from pathlib import Path

from training.data import SEPARATOR, check_data_folder, read_text, split_documents

CALIBRATION = (
    *((f"text/children_0{i}.txt.xz", 3) for i in range(4)),
    *((f"text/fiction_0{i}.txt.xz", 2) for i in range(5)),
    ("text/nonfiction.txt.xz", 4),
    ("text/scifi.txt.xz", 4),
)
EVALUATION = (("eval/children_dev.txt.xz", 4), ("eval/fiction_dev.txt.xz", 5))
PASSED_OVER = re.compile(
    r"nigg|negro|dark(?:y|ie)|\bcoon|squaw|chinam[ae]n|\bjaps?\b|injun|redskin|half-?breed|savage"
    r"|papoose|\bjew|gypsy|gipsy|heathen|\bslave|mulatto|wench|\bwhipp",
    re.IGNORECASE,
)


def excerpt(doc: str, size: int, rng: random.Random) -> str | None:
    """Whole paragraphs of about `size` bytes from inside a document."""
    paragraphs = [p for p in doc.split("\n\n") if p.strip()]
    for _ in range(40):
        at = rng.randrange(len(paragraphs) // 20, max(1, len(paragraphs) * 19 // 20) + 1)
        taken: list[str] = []
        length = 0
        while at < len(paragraphs) and length < size:
            taken.append(paragraphs[at].strip("\n"))
            length += len(taken[-1].encode()) + 2
            at += 1
        text = "\n\n".join(taken)
        prose = sum(c.isdigit() for c in text) < len(text) / 200  # an index is no prose
        if prose and 0.9 * size <= length <= 1.25 * size and not PASSED_OVER.search(text):
            return text
    return None


def collect(data: Path, plan: tuple[tuple[str, int], ...], size: int, seed: int) -> str:
    """The excerpts that the plan asks for, each followed by a separator line."""
    rng = random.Random(seed)
    parts: list[str] = []
    for name, count in plan:
        docs = [doc for doc in split_documents(read_text(data / name)) if len(doc) > 2 * size]
        rng.shuffle(docs)
        found = 0
        for doc in docs:
            text = excerpt(doc, size, rng) if found < count else None
            if text is not None:
                parts.append(text)
                found += 1
        if not found:
            raise SystemExit(f"no excerpt of {size} bytes could be cut from {name}")
        if found < count:
            print(f"{name}: {found} excerpts instead of {count}")
    return "".join(f"{part}\n{SEPARATOR}\n" for part in parts)


def main() -> None:
    """Command line: write both texts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with text/ and eval/")
    parser.add_argument("--out", type=Path, required=True, help="folder for the two texts")
    args = parser.parse_args()
    check_data_folder(args.data)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, plan, size, seed in (
        ("calibration.txt", CALIBRATION, 3400, 11),
        ("evaluation.txt", EVALUATION, 15000, 12),
    ):
        text = collect(args.data, plan, size, seed)
        (args.out / name).write_text(text, encoding="utf-8")
        print(f"{name}: {len(text.encode())} bytes, {text.count(SEPARATOR)} excerpts")


if __name__ == "__main__":
    main()
