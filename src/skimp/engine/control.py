"""How many tokens are guessed: as many as make generation fastest, none where guessing costs more.

Expected tokens a sequence and step, when m may be guessed:  E(m) = 1 + f Σ_{j ≤ m} s_j, where f is
the share of allowed guesses that the proposer makes and s_j the chance that guesses 1 .. j stand.
A step of b sequences with r guessed rows each takes T_b(r), guessing included. Wanted is the m with
the largest E(m) / T_b(f m); m = 0 is plain generation.

All of it is learned while serving. s_j and f are counts that fade, of all sequences and, beside
them, of each. T_b are medians of the last steps of b sequences that did nothing but generate, at
each r that occurred; between them and beyond a line is drawn. What is not done now is tried from
time to time, as seldom as its expected loss demands, so that a change is noticed.

The arithmetic is that of SmartSpec (Liu et al. 2024, arXiv 2406.14066), all numbers being measured.
A length follows from steps that have ended, not from the guesses that it is for: the law stays.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence

SAMPLES = 15  # steps whose median is a time
LEAST_SAMPLES = 3  # before a time is believed
FADE = 0.985  # of counts, a step
OWN_PRIOR = 4.0  # guesses that the counts over all weigh beside a sequence's own
SHARE_OF_ALL = 0.25  # a sequence whose guesses stand less often than this, of what is usual, rests
PRIOR_STANDS, PRIOR_COUNT = 0.7, 2.0  # before anything is known
PRIOR_SLOPE = 0.15  # of a guessed row, in plain steps
LOSS = 0.007  # that trying may cost
MOST_STEPS_APART, LEAST_STEPS_APART = 1024, 16  # of tries
TRY_STEPS = 4  # of a try
SETTLED = 3  # the step of its kind in a row from which on a plain step is as fast as ever, the
# processor's caches being full of its weights again; a guessing one is once it has caught up
MOST_ASKED = 6  # steps that are tried at once, as some tell nothing of time
HOLD_OFF, HOLD_ON = 8, 2  # steps that a decision stands
BESIDE = 12  # decisions from one for a length beside the best to the next
GAIN_TO_BEGIN = 1.02  # hysteresis: guessing begins above this gain, and ends below 1
GAIN_TO_ASK = 0.8  # what is predicted above this, of steps not done yet, is tried at once


class StepTimes:
    """Seconds of steps of about so many sequences, by guessed rows a sequence."""

    def __init__(self) -> None:
        self._times: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}

    def add(self, rows: int, seconds: float) -> None:
        times = self._times.setdefault(rows, deque(maxlen=SAMPLES))
        times.append(seconds)
        ordered, count = sorted(times), len(times)
        self._medians[rows] = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2

    def samples(self, rows: int) -> int:
        return len(self._times.get(rows, ()))

    @property
    def guessed(self) -> bool:
        """Whether there are times with guesses, and without."""
        known = self.medians()
        return len(known) > 1 and known[0][0] == 0

    def medians(self) -> list[tuple[int, float]]:
        """(rows, seconds) that are believed, in order of the rows."""
        return sorted(
            (rows, seconds)
            for rows, seconds in self._medians.items()
            if len(self._times[rows]) >= LEAST_SAMPLES
        )


class LengthControl:
    """One for an engine. ``longest`` is the most that is guessed."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._times: dict[int, StepTimes] = {}
        self._reached = [PRIOR_COUNT] * longest
        self._stood = [PRIOR_COUNT * PRIOR_STANDS] * longest
        self._asked = self._made = 1.0
        self._own: dict[Hashable, tuple[float, float]] = {}  # guesses judged, and those that stood
        self._on: dict[int, bool] = {}
        self._decisions = 0  # to guess
        self._since = 0  # steps since the other way was tried
        self._bucket = 0
        self._held, self._left = 0, 0  # a decision, and for how many steps more it stands
        self._age = 0  # steps since counts last faded
        self._guessed = False  # in the last step
        self._row = 0  # of so many that all guessed, or all did not
        self._asked_for: dict[
            tuple[int, int], int
        ] = {}  # steps of a batch and length tried at once
        self._trial: list[float] | None = None  # seconds of the steps of a try to guess
        self._losses: dict[int, float] = {}  # of the last such try, in plain steps

    # ---- what is decided ------------------------------------------------------------------

    def next_length(self, batch: int) -> int:
        """The most to be guessed in the next step, of ``batch`` sequences. Call it once a step."""
        self._age += 1
        if batch < 1:
            return 0
        bucket = bucket_of(batch)
        if self._left and bucket == self._bucket:
            self._left -= 1
            self._since += 1
            return self._held
        self._bucket, self._left = bucket, 0
        self._fade()
        times = self._times_of(batch)
        if times.samples(0) < LEAST_SAMPLES:
            return 0
        best, gain, expected = self._best(times, bucket)
        on = self._on[bucket] = gain > (1.0 if self._on.get(bucket) else GAIN_TO_BEGIN)
        self._since += 1
        if not on and gain > GAIN_TO_ASK and times.samples(best) < LEAST_SAMPLES:
            asked = self._asked_for.get((bucket, best), 0)
            self._asked_for[bucket, best] = asked + 1
            if asked < MOST_ASKED:
                return best
        if self._trial:
            lost = sum(self._trial) / times.medians()[0][1] - expected * len(self._trial)
            self._losses[bucket] = lost * TRY_STEPS / len(self._trial)
        self._trial = None
        loss = TRY_STEPS * (gain - 1.0 if on else expected * (1.0 / gain - 1.0))
        if not on:  # catching up may take longer than guessing
            loss = max(loss, self._losses.get(bucket, 0.0))
        if self._since < min(max(loss / LOSS, LEAST_STEPS_APART), MOST_STEPS_APART):
            return self._hold(self._about(best), HOLD_ON) if on else self._hold(0, HOLD_OFF)
        self._since = 0
        self._trial = None if on else []
        return self._hold(0 if on else best, TRY_STEPS)

    def _hold(self, length: int, steps: int) -> int:
        self._held, self._left = length, steps - 1
        return length

    def _about(self, best: int) -> int:
        """``best`` and, now and then, a length beside it: one unlucky time must not rule it out."""
        self._decisions += 1
        if self._decisions % BESIDE:
            return best
        longer = self._decisions % (2 * BESIDE) == 0
        return min(best + 1, self._longest) if longer else max(best - 1, 1)

    def rests(self, key: Hashable) -> bool:
        """Whether a sequence's own guesses hardly ever stand, while others' do."""
        judged, stood = self._own.get(key, (0.0, 0.0))
        usual = self._stood[0] / self._reached[0]
        return stood + OWN_PRIOR * usual < SHARE_OF_ALL * usual * (judged + OWN_PRIOR)

    def _best(self, times: StepTimes, bucket: int) -> tuple[int, float, float]:
        """The best length above 0, its rate in plain generation's, and its tokens a step."""
        known = times.medians()
        plain = known[0][1]
        if len(known) == 1:
            known += self._borrowed(bucket, plain)
        fill = min(1.0, self._made / self._asked)
        found, chance, expected = (0, 0.0, 1.0), 1.0, 1.0
        for place in range(self._longest):
            chance *= self._stood[place] / self._reached[place]
            expected += fill * chance
            gain = expected * plain / _between(known, fill * (place + 1))
            if gain > found[1]:
                found = (place + 1, gain, expected)
        return found

    def _borrowed(self, bucket: int, plain: float) -> list[tuple[int, float]]:
        """What guesses cost beside a plain step, as in the nearest batch that has seen any."""
        others = [(abs(b - bucket), b) for b, times in self._times.items() if times.guessed]
        if not others:
            return [(1, plain * (1.0 + PRIOR_SLOPE))]
        known = self._times[min(others)[1]].medians()
        return [(rows, plain * seconds / known[0][1]) for rows, seconds in known[1:]]

    def _times_of(self, batch: int) -> StepTimes:
        return self._times.setdefault(bucket_of(batch), StepTimes())

    # ---- what is learned ------------------------------------------------------------------

    def count(self, key: Hashable, asked: int, made: int, stood: int) -> None:
        """A sequence's step: guesses that were allowed, made, and stood."""
        self._asked += asked
        self._made += made
        judged = min(made, stood + 1)  # those behind the first that fell tell nothing
        for place in range(judged):
            self._reached[place] += 1.0
            self._stood[place] += place < stood
        own = self._own.get(key, (0.0, 0.0))
        self._own[key] = (own[0] * FADE + judged, own[1] * FADE + stood)

    def time(self, batch: int, rows: int, seconds: float) -> None:
        """A step in which ``batch`` sequences gained tokens and nothing else was done, with
        ``rows`` guessed rows in all."""
        if self._trial is not None and rows:
            self._trial.append(seconds)
        self._row = self._row + 1 if self._guessed == (rows > 0) else 1
        self._guessed = rows > 0
        if self._row >= (2 if rows else SETTLED):
            self._times_of(batch).add(-(-rows // batch), seconds)

    def end(self, key: Hashable) -> None:
        """Forget a sequence."""
        self._own.pop(key, None)

    def _fade(self) -> None:
        """What was counted long ago weighs less, but never nothing: a chance needs two counts."""
        fade, self._age = FADE**self._age, 0
        if self._asked > 1.0:
            self._asked *= fade
            self._made *= fade
        for place, reached in enumerate(self._reached):
            faded = max(reached * fade, min(reached, PRIOR_COUNT))
            self._stood[place] *= faded / reached
            self._reached[place] = faded


def bucket_of(batch: int) -> int:
    """Batches whose steps take about as long: each to 4, then about four to an octave."""
    size = 1
    while size < batch:
        size += max(1, size // 4)
    return size


def _between(known: Sequence[tuple[int, float]], rows: float) -> float:
    """A time, from those that are ``known``, at least two, in order of their rows."""
    place = next((i for i in range(1, len(known) - 1) if rows <= known[i][0]), len(known) - 1)
    (left, low), (right, high) = known[place - 1], known[place]
    return low + max(0.0, (high - low) / (right - left)) * (rows - left)
