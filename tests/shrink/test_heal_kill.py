"""A run that heals, killed at any moment, ends with the same files, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from shrink.heal_runs import write_healable
from shrink.runs import Victim, hashes, run, work_of

from skimp.errors import ShrinkError
from skimp.model.manifest import verify
from skimp.shrink.step import Tensors
from skimp.shrink.units import Formats, UnitFiles

HEAL = """
- heal: {text: TEXT, tokens: 4096, length: 64, batch: 256, held_out: 256, lr: 0.01, save_every: 3,
    measure_every: 4, layerwise: {tokens: 1024, lr: 0.01}, long: {tokens: 1024, length: 128}}
"""
RECIPE = "- damage: {layer: 1, of: mixer}" + HEAL + "- quantize: {format: int8}"
LORA = "- damage: {layer: 1, of: mixer}" + HEAL.replace(
    "lr: 0.01,", "lr: 0.01, lora: {rank: 2, alpha: 2},", 1
)


# (recipe, progress): a layer-wise part of 4 steps and its first save begin behind tick 4, the next
# parts behind 8 and 24, and units behind 28.
QUICK = [
    (0, 5),
    (0, 8),
    (0, 9),
    (0, 14),
    (0, 24),
    (0, 28),
    (1, 5),
    (1, 10),
    (2, 8),
    (2, 23),
    (2, 31),
]
SLOW = [
    pytest.param(kind, stop, marks=pytest.mark.slow)
    for kind in range(3)
    for stop in range(5, 33)
    if (kind, stop) not in QUICK
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_healable(tmp_path_factory.mktemp("heal"))


@pytest.fixture(scope="module")
def references(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    texts = {"text.txt": RECIPE, "self": RECIPE, "lora": LORA}
    found = {}
    for name, text in texts.items():
        text = text.replace("TEXT", "text.txt" if name == "lora" else name)
        found[text] = hashes(run(model, text, folder / name).output)
    return found


@pytest.mark.parametrize(("kind", "stop"), [*QUICK, *SLOW])
def test_stopped_at_any_step(
    model: Path, tmp_path: Path, stop: int, kind: int, references: dict[str, dict[str, str]]
) -> None:
    """Right after an optimiser step, a save, a part, a unit."""
    text, reference = list(references.items())[kind]

    def progress(done: int, total: int) -> None:
        if done >= stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, text, tmp_path / "out", progress=progress)
    assert not (tmp_path / "out").exists()
    outcome = run(model, text, tmp_path / "out")
    assert hashes(outcome.output) == reference
    assert not work_of(outcome.output).exists()


@pytest.mark.parametrize(("kind", "unit"), [(0, 0), (0, 2), (1, 1), (2, 3)])
def test_stopped_before_any_unit_is_written(
    model: Path,
    tmp_path: Path,
    unit: int,
    kind: int,
    references: dict[str, dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Trained to the end, and not all of it on the disk."""
    text, reference = list(references.items())[kind]
    write, written = UnitFiles.write, 0

    def stop(self: UnitFiles, index: int, tensors: Tensors) -> tuple[str, Formats]:
        nonlocal written
        if self.folder.name == "step-02" and index == unit:
            raise KeyboardInterrupt
        written += self.folder.name == "step-02"
        return write(self, index, tensors)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(UnitFiles, "write", stop)
        run(model, text, tmp_path / "out")
    assert written == unit
    with monkeypatch.context() as patch:
        patch.setattr("skimp.shrink.heal.train.Healer._train", None)  # which is done
        outcome = run(model, text, tmp_path / "out")
    assert outcome.resumed == 4 + unit and hashes(outcome.output) == reference


def _kill(model: Path, folder: Path, reference: dict[str, str], text: str, runs: int) -> None:
    folder.mkdir(exist_ok=True)
    victim = Victim(model, text, folder / "whole")
    running = victim.wait("done")
    victim.join()
    assert hashes(folder / "whole") == reference
    rng, hits = random.Random(4), 0
    for number in range(runs):
        output = folder / f"out-{number}"
        hits += Victim(model, text, output).kill_after(rng.uniform(0, running))
        if output.exists():  # then it is whole
            assert hashes(output) == reference
        # What it worked in goes last: without it a run that was killed had done all it had to.
        if not output.exists() or work_of(output).exists():
            run(model, text, output)
        assert hashes(output) == reference and not verify(output).damages
        assert not work_of(output).exists()
    assert hits >= runs // 2  # or nothing was tested


def test_killed(model: Path, tmp_path: Path, references: dict[str, dict[str, str]]) -> None:
    text, reference = next(iter(references.items()))
    _kill(model, tmp_path / "k", reference, text, 3)


@pytest.mark.slow
def test_killed_forty_times(
    model: Path, tmp_path: Path, references: dict[str, dict[str, str]]
) -> None:
    for number, (text, reference) in enumerate(references.items()):
        _kill(model, tmp_path / str(number), reference, text, 14)


def test_killed_again_and_again(
    model: Path, tmp_path: Path, references: dict[str, dict[str, str]]
) -> None:
    """Every run is stopped a few steps after it began."""
    text, reference = next(iter(references.items()))
    output, begun = tmp_path / "out", 0
    while not output.exists():
        begun += 1
        count = 0

        def progress(done: int, total: int) -> None:
            nonlocal count
            count += 1
            if count == 7 and done < 28:
                raise KeyboardInterrupt

        try:
            run(model, text, output, progress=progress)
        except KeyboardInterrupt:
            continue
    assert begun == 8 and hashes(output) == reference


@pytest.mark.parametrize("damage", ["bit", "missing"])
def test_a_damaged_save_is_refused(
    model: Path, tmp_path: Path, damage: str, references: dict[str, dict[str, str]]
) -> None:
    text = next(iter(references))

    def progress(done: int, total: int) -> None:
        if done == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, text, tmp_path / "out", progress=progress)
    saves = sorted(work_of(tmp_path / "out").glob("step-02/save-*.safetensors"))
    assert len(saves) == 2
    for path in saves:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
        if damage == "missing":
            path.unlink()
    with pytest.raises(ShrinkError, match=r"save-\d.safetensors: is .*--restart"):
        run(model, text, tmp_path / "out")


def test_another_text_is_refused(model: Path, tmp_path: Path) -> None:
    text = RECIPE.replace("TEXT", str(tmp_path / "mine.txt"))
    (tmp_path / "mine.txt").write_text((model.parent / "text.txt").read_text())

    def progress(done: int, total: int) -> None:
        if done == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, text, tmp_path / "out", progress=progress)
    with (tmp_path / "mine.txt").open("a") as file:
        file.write("more\n")
    with pytest.raises(ShrinkError, match="its text to heal on differs"):
        run(model, text, tmp_path / "out")
