"""kill -9 at any moment: never a directory that loads as valid but wrong, and a second run ends
with the same files, bit for bit, having repeated at most one unit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from shrink.runs import RECIPE, Victim, hashes, run, work_of, write_small

from skimp.model.manifest import verify

VISITS = (2 + 2 + 1) * 6


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("kill") / "model")


def _kill(model: Path, folder: Path, seed: int, *, runs: int, writes: int) -> None:
    rng = random.Random(seed)
    log = folder / "log"
    recipe = RECIPE.replace("LOG", str(log))
    folder.mkdir(exist_ok=True)
    whole = folder / "whole"
    victim = Victim(model, recipe, whole)
    running, writing = victim.wait("writing"), victim.wait("done")
    victim.join()
    reference = hashes(whole)
    looked = len(log.read_text().splitlines())
    assert not verify(whole).damages and looked == 12
    hits = 0
    for number in range(runs + writes):
        output = folder / f"out-{number}"
        log.unlink()
        victim = Victim(model, recipe, output)
        try:
            if number >= runs:
                victim.wait("writing")
            alive = victim.kill_after(rng.uniform(0, writing if number >= runs else running))
        except EOFError:
            raise AssertionError("the run died of itself") from None
        hits += alive
        if output.exists():  # then it is whole
            assert hashes(output) == reference
        # What it worked in goes last: without it a run that was killed had done all it had to.
        ended = output.exists() and not work_of(output).exists()
        outcome = None if ended else run(model, recipe, output)
        assert hashes(output) == reference and not verify(output).damages
        assert not work_of(output).exists()
        assert len(log.read_text().splitlines()) <= looked + 1
        if outcome is not None and number >= runs:
            assert outcome.resumed == VISITS
    assert hits >= (runs + writes) // 2  # or nothing was tested


def test_killed_runs_go_on(model: Path, tmp_path: Path) -> None:
    _kill(model, tmp_path / "k", 1, runs=3, writes=2)


@pytest.mark.slow
def test_forty_kills(model: Path, tmp_path: Path) -> None:
    _kill(model, tmp_path / "k", 2, runs=30, writes=10)


def test_killed_again_and_again(model: Path, tmp_path: Path) -> None:
    """One output, killed after every few units, until it is there."""
    rng = random.Random(5)
    log = tmp_path / "log"
    recipe = RECIPE.replace("LOG", str(log))
    reference = hashes(run(model, recipe, tmp_path / "whole").output)
    log.unlink()
    output = tmp_path / "out"
    kills = 0
    while not output.exists():
        victim = Victim(model, recipe, output)
        if kills == 12:
            victim.wait("done")
            victim.join()
            break
        kills += victim.kill_after(rng.uniform(0, 0.15))
    if work_of(output).exists():
        run(model, recipe, output)
    assert hashes(output) == reference
    assert len(log.read_text().splitlines()) <= 12 + kills
