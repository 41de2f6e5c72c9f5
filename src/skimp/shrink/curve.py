"""The curves of healing that a checkpoint keeps in the account of how it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from skimp.errors import ShrinkError
from skimp.model.checkpoint import read_json
from skimp.model.manifest import SHRINK_FILE

CURVE: Final = "curve"  # of a step, in the account
Curve = tuple[tuple[int, float], ...]  # tokens trained on, held-out KL in nats a token


def read_curves(directory: Path) -> tuple[Curve, ...]:
    """One for each step of the recipe that healed; none for a checkpoint that was not made by
    skimp. Raises ShrinkError."""
    path = directory / SHRINK_FILE
    if not path.is_file():
        return ()
    try:
        return tuple(
            tuple((int(row["tokens"]), float(row["held_out_kl"])) for row in step[CURVE])
            for step in read_json(path)["steps"]
            if CURVE in step
        )
    except (ValueError, KeyError, TypeError):
        raise ShrinkError(f"{path}: {CURVE}: is not as skimp writes it") from None
