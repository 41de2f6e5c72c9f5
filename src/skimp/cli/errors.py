"""How a command fails: one line on stderr that names the field or file, and an exit code.

2 for what the user gave (options, prompts, files, models), 130 for Ctrl-C, 141 for a reader that
went away; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

USER_ERROR = 2
INTERRUPTED = 130
BROKEN_PIPE = 141


class OneLineErrors(TyperGroup):
    """The command group, with every way to fail in one place."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        code: Any = 0
        try:
            code = super().main(
                args, prog_name or "skimp", complete_var, False, windows_expand_args, **extra
            )
            sys.stdout.flush()
        except BrokenPipeError:
            _silence()
            code = BROKEN_PIPE
        except SystemExit as stop:
            # typer answers a broken pipe itself, by leaving with 1
            code = BROKEN_PIPE if isinstance(stop.__context__, BrokenPipeError) else stop.code
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except FileNotFoundError as error:
            code = _fail(f"{error.filename}: no such file")
        except IsADirectoryError as error:
            code = _fail(f"{error.filename}: is a directory, not a file")
        except PermissionError as error:
            code = _fail(f"{error.filename}: permission denied")
        except UnicodeDecodeError as error:
            code = _fail(f"not UTF-8 text: {error}")
        except ValueError as error:  # SkimpError is one
            code = _fail(str(error) or type(error).__name__)
        except Exception as error:
            # typer's own errors; older releases raise those of click, newer ones their own copy
            if not hasattr(error, "format_message"):
                raise
            code = _fail(error.format_message())
        if standalone_mode:
            sys.exit(code or 0)
        return code


def _fail(message: str) -> int:
    try:
        print("skimp: error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    except BrokenPipeError:
        _silence()
    return USER_ERROR


def _silence() -> None:
    """Nobody reads any more; keep the interpreter from complaining when it flushes at exit."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(devnull, stream.fileno())
        except (OSError, ValueError):
            pass
