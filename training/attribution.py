"""Write the list of African Storybook authors that the licence of their stories asks for.

python -m training.attribution --data DATA --out ATTRIBUTION.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from training.data import check_data_folder, read_json_lines

HEAD = """# African Storybook stories in the training text

`tales` and `tales-draft` were trained, among other text, on the English stories of the African
Storybook initiative (africanstorybook.org) listed here, as collected in the repository
`global-asp/asp-source` on GitHub. They are licensed CC BY (Creative Commons Attribution); stories
under a non-commercial licence were left out. For training, title and text were joined, and each
story was also written as the answer to a request for it; nothing else was changed.

| story | author |
|---|---|
"""


def main() -> None:
    """Command line: write the list."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with text/")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    args = parser.parse_args()
    check_data_folder(args.data)
    rows = read_json_lines(args.data / "text" / "african_storybook.jsonl.xz")
    pairs = sorted({(" ".join(r["title"].split()), " ".join(r["author"].split())) for r in rows})
    lines = [f"| {title} | {author} |".replace("<", "&lt;") for title, author in pairs]
    args.out.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} stories")


if __name__ == "__main__":
    main()
