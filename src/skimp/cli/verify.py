"""``skimp verify``: whether a checkpoint is whole and what it says it is."""

from __future__ import annotations

from typing import Annotated

import typer

from skimp.cli import options as opt

DAMAGED = 1


def verify(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A model directory.")],
    deep: Annotated[
        bool, typer.Option("--deep", help="Also look for NaN and infinity in every tensor.")
    ] = False,
    json_output: opt.Json = False,
) -> None:
    """Check a checkpoint, and name what is damaged.

    What skimp wrote has a manifest, and every file is compared with its SHA-256. Of other
    checkpoints the structure is checked: headers, index, shapes, and that nothing is missing.
    Exits with 1 if anything is wrong.

    \b
    Examples:
      skimp verify tales-int8
      skimp verify ./Llama-3.1-8B --deep --json
    """
    from skimp.cli.output import bytes_text, print_json
    from skimp.model.locate import locate_model
    from skimp.model.manifest import verify as check

    found = check(locate_model(model), deep=deep)
    if json_output:
        damages = [
            {"file": d.file, "tensor": d.tensor, "problem": d.problem} for d in found.damages
        ]
        print_json(
            {
                "model": model,
                "whole": not damages,
                "manifest": found.manifest,
                "files": found.files,
                "bytes": found.size,
                "damages": damages,
                "notes": list(found.notes),
            }
        )
    else:
        for damage in found.damages:
            print(damage)
        for note in found.notes:
            print(f"note: {note}")
        checked = f"{found.files} files, {bytes_text(found.size)}"
        if found.damages:
            print(f"{model}: DAMAGED ({len(found.damages)} found)")
        elif found.manifest:
            print(f"{model}: whole: {checked} are as they were written")
        else:
            print(f"{model}: sound in structure")
    if found.damages:
        raise typer.Exit(DAMAGED)
