"""Texts of several documents."""

from __future__ import annotations

import re

SEPARATOR = re.compile(r"^<\|endoftext\|>[ \t]*\r?(?:\n|\Z)", re.MULTILINE)


def split_documents(text: str) -> list[str]:
    """The documents of a text; the separator lines and empty documents are dropped."""
    documents = (part.removesuffix("\n") for part in SEPARATOR.split(text))
    return [part for part in documents if part.strip()]
