"""Compiling for a Hopper GPU where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget


def write_ptx(
    kernel: Any,
    source: Any,
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    floats: Collection[str] = (),
    varying: Collection[str] = (),
    **options: Any,
) -> None:
    """Print the kernel's PTX. Arguments are ``pointers``, ``constants``, ``floats`` and else whole
    numbers; all but ``varying`` ones and floats are multiples of 16. ``source`` is the class of
    Triton's that takes such a kernel."""
    names = kernel.arg_names
    places = {name: (i,) for i, name in enumerate(names)}
    kinds = dict.fromkeys(names, "i32") | dict.fromkeys(floats, "fp32") | dict(pointers)
    aligned = [name for name in names if name not in {*constants, *floats, *varying}]
    compiled = triton.compile(
        source(
            kernel,
            {name: "constexpr" if name in constants else kinds[name] for name in names},
            {places[name]: value for name, value in constants.items()},
            {places[name]: [["tt.divisibility", 16]] for name in aligned},
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"launch_pdl": True, **options},
    )
    sys.stdout.write(compiled.asm["ptx"])


def ptx_of(script: str, *arguments: str, cache: Path) -> str:
    """What a script beside this file prints: the interpreter is on or off for a whole process."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(script), *arguments],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
