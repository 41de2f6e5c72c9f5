"""When an output ends, and which of its text may already be shown.

Text that may turn out to be the beginning of a stop string is held back until it is decided, so a
stream never shows part of one, wherever the token boundaries fall: the outcome is that of feeding
one character at a time. The stop string that is *completed* first wins; of several completed by the
same character, the longest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

from skimp.decoding.params import ParamsError, SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


class TextStream(Protocol):
    """What is needed of a ``skimp.text.Detokenizer``."""

    def push(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


class StopStrings:
    """Finds the first of several strings in growing text.

    One Knuth-Morris-Pratt automaton a string: a few steps a character, whatever the strings are
    (a suffix search would be quadratic in the length of a hostile one).
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self._stops = tuple(dict.fromkeys(stops))
        self._tables = [_failure_table(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._include = include_stop
        self._held = ""

    def push(self, text: str, *, armed: bool = True) -> tuple[str, str | None]:
        """(text that may be shown, the stop string found or None); nothing follows a find.

        While not ``armed``, a string that is completed does not count.
        """
        if not self._stops:
            return text, None
        known = len(self._held)
        self._held += text
        for i, char in enumerate(text, start=known + 1):
            found = self._step(char)
            if found is not None and armed:
                shown = self._held[: i if self._include else i - len(found)]
                self._held = ""
                return shown, found
        keep = max(self._states)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, None

    def flush(self) -> str:
        """The text held back, when it can no longer become a stop string."""
        shown, self._held = self._held, ""
        return shown

    def _step(self, char: str) -> str | None:
        found = None
        for s, (stop, table) in enumerate(zip(self._stops, self._tables)):
            state = self._states[s]
            while state and stop[state] != char:
                state = table[state - 1]
            if stop[state] == char:
                state += 1
            if state == len(stop):
                if found is None or len(stop) > len(found):
                    found = stop
                state = table[state - 1]  # in case this find does not count
            self._states[s] = state
        return found


def _failure_table(stop: str) -> list[int]:
    """For each prefix of ``stop`` the length of its longest proper prefix that is a suffix."""
    table = [0] * len(stop)
    state = 0
    for i in range(1, len(stop)):
        while state and stop[state] != stop[i]:
            state = table[state - 1]
        if stop[state] == stop[i]:
            state += 1
        table[i] = state
    return table


class StopChecker:
    """The end of one output, token by token: end tokens, stop tokens, stop strings, length.

    Args:
        params: the request's parameters.
        eos_ids: the model's end tokens; without effect under ``ignore_eos``.
        stream: turns tokens into text, or None when there is no tokenizer; then stop strings are
            refused with :class:`ParamsError` and all text is empty.

    Attributes:
        stop_reason: after ``stop``, the string or token id that did it.

    The end token's own text is not part of the output unless ``include_stop``. Up to
    ``min_tokens`` nothing stops the output. The caller ends it for its own reasons (context full,
    abort) by :meth:`finish` alone.
    """

    def __init__(
        self, params: SamplingParams, *, eos_ids: Iterable[int] = (), stream: TextStream | None
    ) -> None:
        if stream is None and params.stop:
            raise ParamsError("stop", "needs a tokenizer, and there is none")
        self.stop_reason: str | int | None = None
        self._params = params
        self._ends = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            self._ends |= frozenset(eos_ids)
        self._stream = stream
        self._strings = StopStrings(params.stop, include_stop=params.include_stop)
        self._count = 0

    def push(self, token_id: int) -> tuple[str, FinishReason | None]:
        """(text that may be shown now, why the output ends with this token or None).

        Text held back is still to come from :meth:`finish`, also when a reason is given.
        """
        assert self.stop_reason is None, "the output has ended"
        self._count += 1
        armed = self._count > self._params.min_tokens
        ended = armed and token_id in self._ends
        text = ""
        if self._stream is not None and (not ended or self._params.include_stop):
            text = self._stream.push(token_id)
        shown, found = self._strings.push(text, armed=armed)
        if found is not None:
            self.stop_reason = found
            self._stream = None  # what the detokenizer still holds lies behind the stop string
            return shown, "stop"
        if ended:
            self.stop_reason = token_id
            return shown, "stop"
        if self._count == self._params.max_tokens:
            return shown, "length"
        return shown, None

    def finish(self, reason: FinishReason) -> str:
        """The rest of the text; once, when the output has ended for ``reason``.

        An unfinished character comes out as U+FFFD, except after an error, where only text that
        was complete is given.
        """
        stream, self._stream = self._stream, None
        if stream is None:
            return self._strings.flush()
        if reason == "error":
            return self._strings.flush()
        armed = self._count > self._params.min_tokens
        shown, found = self._strings.push(stream.flush(), armed=armed)
        if found is not None:
            self.stop_reason = found
            return shown
        return shown + self._strings.flush()
