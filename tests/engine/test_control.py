"""The length of drafts, chosen in worlds whose best length is known."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from skimp.engine.control import TRY_STEPS, LengthControl, bucket_of

LONGEST = 8


@dataclass
class World:
    """Steps of ``batch`` sequences take 1 + 0.01 batch, times 1 + ``cost`` a guess and 1 + slope a
    row, where more sequences have a steeper slope; a guess stands by ``chance``."""

    chance: float
    cost: float
    slope: Callable[[int], float]
    noise: float = 0.1

    def seconds(self, batch: int, length: int) -> float:
        plain = 1.0 + 0.01 * batch
        return plain * (1.0 + length * (self.cost + self.slope(batch)))

    def rate(self, batch: int, length: int) -> float:
        """Tokens of a sequence a second."""
        expected = sum(self.chance**i for i in range(length + 1))
        return expected / self.seconds(batch, length)

    def best(self, batch: int) -> float:
        return max(self.rate(batch, length) for length in range(LONGEST + 1))


class Run:
    def __init__(self, seed: int = 0) -> None:
        self.control = LengthControl(LONGEST)
        self.draw = random.Random(seed)

    def rate(self, world: World, batch: int, steps: int) -> float:
        """Tokens of a sequence a second, over so many steps."""
        spent = gained = 0.0
        for _ in range(steps):
            length = self.control.next_length(batch)
            assert 0 <= length <= LONGEST
            for key in range(batch):
                stood = 0
                while stood < length and self.draw.random() < world.chance:
                    stood += 1
                self.control.count(key, length, length, stood)
                gained += (1 + stood) / batch
            seconds = world.seconds(batch, length)
            spent += seconds
            seen = seconds * self.draw.lognormvariate(0.0, world.noise)
            self.control.time(batch, length * batch, seen)
        return gained / spent


def flat(slope: float) -> Callable[[int], float]:
    return lambda batch: slope


@pytest.mark.parametrize("chance", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("cost", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("slope", [0.02, 0.3])
def test_near_the_best_length(chance: float, cost: float, slope: float) -> None:
    world = World(chance, cost, flat(slope))
    run = Run()
    run.rate(world, 1, 100)
    assert run.rate(world, 1, 3000) > 0.94 * world.best(1)
    assert run.rate(world, 1, 3000) > 0.98 * world.rate(1, 0)


def test_guesses_that_never_stand_cost_little_from_the_first_step() -> None:
    world = World(0.0, 0.25, flat(0.1))
    for seed in range(5):
        assert Run(seed).rate(world, 1, 1000) > 0.97 * world.rate(1, 0)


def test_load_that_rises_and_falls() -> None:
    """Guessing pays for few sequences and not for many; each level is held for a while."""
    world = World(0.7, 0.05, lambda batch: 0.02 * batch)
    run = Run()
    for batch in (1, 2, 4, 8, 16, 32, 64, 32, 16, 8, 4, 2, 1):
        found = run.rate(world, batch, 400)
        assert found > 0.97 * world.rate(batch, 0), batch
        assert found > 0.93 * world.best(batch), batch


def test_the_first_plain_steps_after_guesses_tell_nothing() -> None:
    """They are slow, for what guessing left in the processor's caches; guessing does not pay."""
    world = World(0.3, 0.25, flat(0.1), noise=0.02)
    run = Run()
    plain, since = 0, 0
    for _ in range(2000):
        length = run.control.next_length(8)
        since = 0 if length else since + 1
        slow = 2.5 if 0 < since < 3 else 1.0
        for key in range(8):
            stood = int(length > 0 and run.draw.random() < world.chance)
            run.control.count(key, length, length, stood)
        run.control.time(8, 8 * length, slow * world.seconds(8, length))
        plain += length == 0
    assert plain > 0.8 * 2000


def test_comes_back_when_the_text_changes() -> None:
    good, bad = World(0.85, 0.1, flat(0.05)), World(0.0, 0.1, flat(0.05))
    run = Run()
    run.rate(bad, 1, 1000)
    run.rate(good, 1, 300)  # to notice
    assert run.rate(good, 1, 500) > 0.95 * good.best(1)
    run.rate(bad, 1, 100)
    assert run.rate(bad, 1, 1000) > 0.97 * bad.rate(1, 0)


def test_a_try_of_plain_generation_takes_some_steps_in_a_row() -> None:
    world = World(0.9, 0.05, flat(0.02), noise=0.0)
    run = Run()
    run.rate(world, 1, 50)
    plain, streaks = 0, []
    for _ in range(3000):
        length = run.control.next_length(1)
        run.control.count(0, length, length, min(length, 3))
        run.control.time(1, length, world.seconds(1, length))
        if length == 0:
            plain += 1
        elif plain:
            streaks.append(plain)
            plain = 0
    assert streaks and set(streaks) == {TRY_STEPS}


def test_a_sequence_whose_guesses_never_stand_rests_beside_others() -> None:
    control = LengthControl(LONGEST)
    for _ in range(30):
        control.next_length(2)
        control.count("good", 4, 4, 4)
        control.count("bad", 4, 4, 0)
    assert control.rests("bad") and not control.rests("good") and not control.rests("new")
    for _ in range(200):
        control.next_length(2)
        control.count("good", 4, 4, 4)
        control.count("bad", 0, 0, 0)
    assert not control.rests("bad")
    control.end("bad")
    assert not control.rests("bad")


def test_a_proposer_that_seldom_has_a_guess_is_asked_for_many() -> None:
    """What it leaves out costs nothing."""
    control, draw = LengthControl(LONGEST), random.Random(0)
    lengths = []
    for _ in range(600):
        length = control.next_length(1)
        made = length if draw.random() < 0.1 else 0
        control.count(0, length, made, made)
        control.time(1, made, 1.0 + 0.05 * made)
        lengths.append(length)
    assert sum(lengths[-100:]) / 100 > 6


def test_buckets_cover_batches_in_order() -> None:
    buckets = [bucket_of(batch) for batch in range(1, 600)]
    assert buckets[:4] == [1, 2, 3, 4]
    assert all(b >= batch for batch, b in enumerate(buckets, 1))
    assert buckets == sorted(buckets) and len(set(buckets)) < 30
