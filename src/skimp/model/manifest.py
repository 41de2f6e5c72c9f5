"""Whether a checkpoint is whole, and which file and tensor is not.

A checkpoint that skimp writes has a manifest: size and SHA-256 of every file and of every tensor
in it, written last. Where there is none, what can be checked is the structure: headers, index,
shapes, and that every tensor the config asks for is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import skimp
from skimp.errors import CheckpointError, SkimpError
from skimp.model.checkpoint import map_tensors, read_directory, read_header, read_json

MANIFEST_FILE: Final = "skimp_manifest.json"
SHRINK_FILE: Final = "skimp_shrink.json"  # how a checkpoint was made; always beside a manifest
VERSION: Final = 1
BLOCK: Final = 1 << 20
# What people and tools add to a checkpoint without changing the model.
TOLERATED: Final = ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", ".gitattributes")
PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is wrong; ``tensor`` where it lies in one."""

    file: str
    problem: str
    tensor: str | None = None

    def __str__(self) -> str:
        inside = f": tensor {self.tensor!r}" if self.tensor is not None else ""
        return f"{self.file}{inside}: {self.problem}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """``manifest``: whether there was one to compare with. ``about`` is what it says of itself."""

    manifest: bool
    damages: tuple[Damage, ...]
    notes: tuple[str, ...]
    files: int
    size: int  # bytes that were compared with their hashes
    about: Mapping[str, Any]


# ---- writing ----------------------------------------------------------------------------------


def write_manifest(directory: Path, about: Mapping[str, Any]) -> None:
    """Describe all files of ``directory``, in a file that is on the disk when this returns."""
    names = sorted(e.name for e in directory.iterdir() if e.name != MANIFEST_FILE)
    value = {
        "manifest_version": VERSION,
        "skimp": skimp.__version__,
        "about": dict(about),
        "files": {name: _describe(directory / name) for name in names},
    }
    with (directory / MANIFEST_FILE).open("wb") as file:
        file.write(_render(value))
        file.flush()
        os.fsync(file.fileno())


def _render(value: Mapping[str, Any]) -> bytes:
    """The manifest's only spelling, which ends with its own hash: so no bit of it is free."""
    body = {key: item for key, item in value.items() if key != "sha256"}
    text = json.dumps(body, indent=1, allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return (json.dumps({**body, "sha256": digest}, indent=1, allow_nan=False) + "\n").encode()


def _describe(path: Path) -> dict[str, Any]:
    entry: dict[str, Any] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    if path.suffix == ".safetensors":
        places = sorted(read_header(path).values(), key=lambda t: (t.begin, t.end))
        entry["tensors"] = {
            t.name: [t.begin, t.end, file_sha256(path, t.begin, t.end)] for t in places
        }
    return entry


def file_sha256(path: Path, begin: int = 0, end: int | None = None) -> str:
    """SHA-256 of a file, or of its bytes from ``begin`` to ``end``."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(begin)
        left = (1 << 63) if end is None else end - begin
        while left > 0 and (block := file.read(min(BLOCK, left))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


# ---- reading ----------------------------------------------------------------------------------


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a directory; CheckpointError if it is missing or was changed."""
    path = directory / MANIFEST_FILE
    value = read_json(path)
    files = value.get("files")
    try:
        sound = path.read_bytes() == _render(value) and isinstance(value["about"], dict)
        sound = sound and isinstance(files, dict) and all(map(_sound_entry, files.items()))
    except (KeyError, ValueError, OSError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path}: is not as it was written")
    if value.get("manifest_version") != VERSION:
        found = value.get("manifest_version")
        raise CheckpointError(f"{path}: manifest_version {found} is not {VERSION}")
    return value


def _sound_entry(item: tuple[str, Any]) -> bool:
    name, entry = item
    plain = name not in ("", ".", "..") and "/" not in name and "\\" not in name
    if not plain or not isinstance(entry, dict):
        return False
    tensors = entry.get("tensors", {})
    return (
        isinstance(entry.get("size"), int)
        and isinstance(entry.get("sha256"), str)
        and isinstance(tensors, dict)
        and all(
            isinstance(place, list)
            and [type(x) for x in place] == [int, int, str]
            and 0 <= place[0] <= place[1]
            for place in tensors.values()
        )
    )


def verify(directory: Path | str, *, deep: bool = False) -> Verdict:
    """Check a model directory. ``deep`` also looks for NaN and infinities in every tensor.

    Raises CheckpointError only if there is no directory; what is wrong in it is in the verdict.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: not a directory")
    damages: list[Damage] = []
    notes: list[str] = []
    entries: dict[str, Any] = {}
    about: Mapping[str, Any] = {}
    there = os.path.lexists(directory / MANIFEST_FILE)
    if there:
        try:
            manifest = read_manifest(directory)
        except SkimpError as error:
            damages.append(Damage(file=MANIFEST_FILE, problem=_short(error, directory)))
        else:
            entries, about = manifest["files"], manifest["about"]
            damages += _compare(directory, entries)
            found, tolerated = _extra(directory, entries)
            damages += found
            notes += tolerated
    elif (directory / SHRINK_FILE).exists():
        damages.append(
            Damage(file=MANIFEST_FILE, problem=f"missing, though {SHRINK_FILE} is there")
        )
    else:
        notes.append(f"no {MANIFEST_FILE}: the structure was checked, not what is in the tensors")
    if not damages:
        damages += _structure(directory)
    if deep and not damages:
        damages += _not_finite(directory)
    return Verdict(
        manifest=there,
        damages=tuple(damages),
        notes=tuple(notes),
        files=len(entries),
        size=sum(entry["size"] for entry in entries.values()),
        about=about,
    )


def _compare(directory: Path, entries: Mapping[str, Any]) -> Iterator[Damage]:
    owner = {entry["sha256"]: name for name, entry in entries.items()}

    def look(name: str) -> list[Damage]:
        path, entry = directory / name, entries[name]
        try:
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                return [Damage(file=name, problem="not a regular file")]
            digest = file_sha256(path)
            if digest == entry["sha256"]:
                return []
            if digest in owner:
                return [Damage(file=name, problem=f"holds what {owner[digest]} should")]
            return list(_locate(path, entry, status.st_size))
        except FileNotFoundError:
            return [Damage(file=name, problem="missing")]
        except OSError as error:
            return [Damage(file=name, problem=f"not readable: {error.strerror}")]

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for found in pool.map(look, entries):
            yield from found


def _locate(path: Path, entry: Mapping[str, Any], size: int) -> Iterator[Damage]:
    """Where a file that is not as it was differs."""
    tensors = entry.get("tensors", {})
    if size != entry["size"]:
        cut = [t for t, (_, end, _) in tensors.items() if end > size]
        inside = cut[0] if cut else None
        problem = f"has {size:,} bytes, not {entry['size']:,}"
        yield Damage(file=path.name, problem=problem, tensor=inside)
        return
    start = min((begin for begin, _, _ in tensors.values()), default=0)
    named = False
    for name, (begin, end, digest) in tensors.items():
        if file_sha256(path, begin, end) != digest:
            named = True
            yield Damage(file=path.name, tensor=name, problem="is not as it was written")
    if not named:
        where = f"its header (bytes 0 to {start:,}) " if tensors else ""
        yield Damage(file=path.name, problem=f"{where}is not as it was written")


def _extra(directory: Path, entries: Mapping[str, Any]) -> tuple[list[Damage], list[str]]:
    damages, notes = [], []
    for path in sorted(directory.iterdir()):
        name = path.name
        if name in entries or name == MANIFEST_FILE:
            continue
        if name in TOLERATED or (name.startswith(".") and path.is_dir()):
            notes.append(f"{name}: not in the manifest; it does not change the model")
        elif name.endswith(PICKLE_SUFFIXES):
            damages.append(Damage(file=name, problem="was added, and is of a kind that runs code"))
        else:
            damages.append(Damage(file=name, problem="was added: the manifest does not have it"))
    return damages, notes


def _structure(directory: Path) -> list[Damage]:
    """Whether it would load: config, headers, index, names, shapes and dtypes."""
    from skimp.model.loading import empty_decoder, load_spec, load_stored

    try:
        spec = load_spec(directory)
        load_stored(directory, spec, empty_decoder(spec))
    except SkimpError as error:
        return [Damage(file=_blamed(error, directory), problem=_short(error, directory))]
    return []


def _blamed(error: SkimpError, directory: Path) -> str:
    """The file that a message of the loader names, or the directory."""
    text = str(error)
    names = sorted((e.name for e in directory.iterdir()), key=len, reverse=True)
    found = [(text.find(name), name) for name in names if name in text]
    return min(found)[1] if found else directory.name


def _short(error: SkimpError, directory: Path) -> str:
    """The message without the directory, and without the file it starts with."""
    text = str(error).replace(f"{directory}{os.sep}", "").removeprefix(f"{directory}: ")
    first, _, rest = text.partition(": ")
    return rest if rest and (directory / first).exists() else text


def _not_finite(directory: Path) -> Iterator[Damage]:
    for place in read_directory(directory).values():
        ((_, tensor),) = map_tensors({place.name: place})
        if not tensor.is_floating_point():
            continue
        flat = tensor.reshape(-1)
        if not all(bool(piece.float().isfinite().all()) for piece in flat.split(1 << 22)):
            problem = "holds NaN or infinity"
            yield Damage(file=place.file.name, tensor=place.name, problem=problem)
