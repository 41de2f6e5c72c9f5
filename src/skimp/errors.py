"""Errors meant for the person at the keyboard.

Each message is one line that names the field or file and, where two values disagree, both of
them. The command line prints the message alone and exits with code 2; anything that is not a
:class:`SkimpError` is a bug in skimp.
"""

from __future__ import annotations

from typing import Any

LONGEST = 1000  # characters of a message


class SkimpError(ValueError):
    """Something the user gave cannot be honoured; the message is one line."""

    def __init__(self, message: str) -> None:
        # Quoted names and messages come from files: one line, no control characters, no flood.
        text = "".join(c if c.isprintable() else _escaped(c) for c in " ".join(message.split()))
        super().__init__(text if len(text) <= LONGEST else f"{text[:LONGEST]}...")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class ConfigError(SkimpError):
    """A model configuration is malformed, inconsistent, or asks for what skimp does not have."""


class CheckpointError(SkimpError):
    """A weight file is missing, damaged, or does not hold what its configuration says."""


class ModelNotFoundError(SkimpError):
    """A model name is no directory, no embedded model and no reachable Hub repository."""


class OptionError(SkimpError):
    """An engine or command option is out of range, unknown, or at odds with another."""


class RequestError(SkimpError):
    """A request is malformed or can never be served by this engine."""


class ShrinkError(SkimpError):
    """A recipe is malformed, does not fit the model, or its output is taken."""


class SkimpWarning(UserWarning):
    """Something configured is skipped without changing any result; the message names it."""


def shown(value: Any) -> str:
    """A value short enough for a message."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to spell out integers of thousands of digits
        return "a huge integer" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
