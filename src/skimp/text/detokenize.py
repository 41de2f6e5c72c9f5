"""Tokens to text, one token at a time, never splitting a character.

A decoder of the ``tokenizers`` library works on the whole sequence, and decoding the whole again
for every token costs quadratic time. The decoders that language models use are short pipelines
whose state between two tokens is a few bytes; :class:`DecodePlan` reads the pipeline from
``tokenizer.json`` and :class:`Detokenizer` keeps that state. The text pushed out so far is always a
prefix of the final text, and together they are what the library's ``decode`` gives, except that in
a run of ``<0xNN>`` tokens only the broken bytes become U+FFFD (the library spoils the whole run,
which cannot be known before it ends).
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

_REPLACEMENT = "\ufffd"
_WINDOW = 16  # tokens after which a decoder unknown to us may emit a broken character


@dataclass(frozen=True, kw_only=True)
class DecodePlan:
    """A decoder pipeline, reduced to what a stream needs.

    Attributes:
        byte_level: tokens are GPT-2 byte characters; everything else is off then.
        replace: (from, to) string replacements within a token, in order.
        byte_fallback: ``<0xNN>`` tokens are bytes.
        strip: how many leading ``strip_char`` the whole text loses.
        metaspace: a replacement character that is dropped from the first token and a space in the
            others.
    """

    byte_level: bool = False
    replace: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip: int = 0
    strip_char: str = " "
    metaspace: str | None = None
    metaspace_drops_first: bool = True

    @classmethod
    def parse(cls, decoder: Mapping[str, Any] | None) -> DecodePlan | None:
        """The plan of a ``tokenizer.json`` decoder, or None when it is not one we know."""
        steps = _flatten(decoder)
        kinds = [step.get("type") for step in steps]
        if kinds == ["ByteLevel"]:
            return cls(byte_level=True)
        replace: list[tuple[str, str]] = []
        byte_fallback, strip, strip_char = False, 0, " "
        metaspace, drops_first = None, True
        fused = False
        for step, kind in zip(steps, kinds):
            if kind == "Replace" and not byte_fallback and not fused:
                source = step.get("pattern", {}).get("String")
                if not source or metaspace is not None:
                    return None
                replace.append((source, step.get("content", "")))
            elif kind == "ByteFallback" and not fused and not byte_fallback:
                byte_fallback = True
            elif kind == "Fuse":
                fused = True
            elif kind == "Strip" and fused and not step.get("stop") and not strip:
                strip, strip_char = int(step.get("start", 0)), step.get("content", " ")
            elif kind == "Metaspace" and len(kinds) == 1:
                metaspace = step.get("replacement", "▁")
                drops_first = step.get("prepend_scheme", "always") != "never"
            else:
                return None
        if not steps:
            return None
        return cls(
            replace=tuple(replace),
            byte_fallback=byte_fallback,
            strip=strip,
            strip_char=strip_char,
            metaspace=metaspace,
            metaspace_drops_first=drops_first,
        )


def _flatten(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [step for part in decoder.get("decoders", []) for step in _flatten(part)]
    return [decoder]


@cache
def byte_characters() -> Mapping[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (Radford et al. 2019, ``bytes_to_unicode``)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in printable}
    rest = [b for b in range(256) if b not in set(printable)]
    table.update({chr(256 + i): b for i, b in enumerate(rest)})
    return table


class Detokenizer:
    """The text of one growing token sequence.

    Args:
        piece: the token string of an id, None when there is none (its text is then empty).
        plan: the decoder, or None to call ``decode_ids`` on a short window.
        decode_ids: decodes a list of ids; needed only when ``plan`` is None.
        skip: ids without text (special tokens).
        continues: the text continues other text, so the first token keeps its leading space, as
            in the completion of a prompt.
    """

    def __init__(
        self,
        piece: Callable[[int], str | None],
        plan: DecodePlan | None,
        *,
        decode_ids: Callable[[list[int]], str] | None = None,
        skip: Collection[int] = (),
        continues: bool = False,
    ) -> None:
        if plan is None and decode_ids is None:
            raise ValueError("a decoder without a plan needs decode_ids")
        self._piece = piece
        self._plan = plan
        self._decode_ids = decode_ids
        self._skip = skip
        self._first = not continues  # the next token is the first of the text
        self._to_strip = plan.strip if plan is not None and not continues else 0
        self._held = b""  # an unfinished character of <0xNN> tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._window: list[int] = []
        self._window_done = 0  # tokens of the window whose text is out

    def push(self, token_id: int) -> str:
        """Text that this token makes certain; may be empty, and may belong to earlier tokens."""
        if token_id in self._skip:
            return ""
        piece = self._piece(token_id)
        if piece is None:
            return ""
        plan = self._plan
        if plan is None:
            return self._push_window(token_id)
        if plan.byte_level:
            return self._utf8.decode(_piece_bytes(piece))
        if plan.byte_fallback:
            byte = _fallback_byte(piece)
            if byte is not None:
                self._first = False
                return self._strip(self._push_byte(byte))
        if plan.metaspace is not None:
            drop = self._first and plan.metaspace_drops_first
            text = piece.replace(plan.metaspace, "" if drop else " ")
        else:
            text = piece
            for source, target in plan.replace:
                text = text.replace(source, target)
        self._first = False
        return self._strip(self._end_bytes() + text)

    def flush(self) -> str:
        """What is left when no token follows: an unfinished character as U+FFFD."""
        if self._plan is None:
            return self._emit_window(final=True)
        if self._plan.byte_level:
            return self._utf8.decode(b"", final=True)
        return self._strip(self._end_bytes())

    def _strip(self, text: str) -> str:
        while self._to_strip and text:
            if text[0] != self._plan.strip_char:  # type: ignore[union-attr]
                self._to_strip = 0
                break
            text = text[1:]
            self._to_strip -= 1
        return text

    def _push_byte(self, byte: int) -> str:
        held = self._held + bytes((byte,))
        try:
            text = held.decode("utf-8")
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                self._held = held
                return ""
            # the new byte broke the character before it, or cannot start one
            lost = self._end_bytes()
            if not lost:
                return _REPLACEMENT
            return lost + self._push_byte(byte)
        self._held = b""
        return text

    def _end_bytes(self) -> str:
        lost = _REPLACEMENT * len(self._held)
        self._held = b""
        return lost

    def _push_window(self, token_id: int) -> str:
        self._window.append(token_id)
        return self._emit_window(final=False)

    def _emit_window(self, *, final: bool) -> str:
        """Decode a window twice, with and without the new tokens, and give the difference.

        The tokens already out stay in the window once as context, because a decoder may treat
        the first token of a sequence differently.
        """
        assert self._decode_ids is not None
        before = self._decode_ids(self._window[: self._window_done])
        after = self._decode_ids(self._window)
        fresh = len(self._window) - self._window_done
        if not final and after.endswith(_REPLACEMENT) and fresh < _WINDOW:
            return ""
        self._window = self._window[self._window_done :]
        self._window_done = len(self._window)
        return after[len(before) :]


def _piece_bytes(piece: str) -> bytes:
    table = byte_characters()
    try:
        return bytes([table[c] for c in piece])
    except KeyError:  # an added token, which is plain text
        return piece.encode("utf-8", "replace")


def _fallback_byte(piece: str) -> int | None:
    if len(piece) == 6 and piece.startswith("<0x") and piece[5] == ">":
        try:
            return int(piece[3:5], 16)
        except ValueError:
            return None
    return None
