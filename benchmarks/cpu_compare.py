"""Compare skimp with llama.cpp, OpenVINO GenAI and transformers on this machine's CPU.

Random weights of the given shapes are made once in the work folder and converted to every
engine's format; then each engine is measured in processes of its own, the engines taking turns
in every round. The result is a JSON file with every sample and a Markdown table.

    python benchmarks/cpu_compare.py --work WORK --out RESULT --rounds 5 --skimp "skimp"

The interpreter that runs this must have the rivals' packages (see benchmarks/rivals/README.md);
skimp may live in another environment.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rivals.artifacts import artifact
from rivals.engine import START_PROMPT_TOKENS, Case, Request
from rivals.machine import CpuClock, describe, wait_for_quiet
from rivals.registry import DEFAULT_ENGINES, REGISTRY, SKIMP
from rivals.report import Sample, markdown, summarize
from rivals.worker import onednn_kernels

HERE = Path(__file__).resolve().parent
SHAPES = HERE / "shapes"
KINDS = ("generate", "prefill", "start")
PATIENCE_S = 30.0


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; unknown names end the program with a message."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder for weights and converted models")
    add("--out", type=Path, required=True, help="result path without suffix (.json, .md)")
    add("--shapes", nargs="+", default=["llama-15m", "smollm2-135m"], help="names or JSON files")
    add("--engines", nargs="+", default=list(DEFAULT_ENGINES), choices=list(REGISTRY))
    add("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=2)
    add("--batches", type=int, nargs="+", default=[1, 8, 32])
    add("--contexts", type=int, nargs="+", default=[128, 1024])
    add("--prefills", type=int, nargs="+", default=[512, 2048])
    add("--new-tokens", type=int, default=64, help="decode steps timed in one repeat")
    add("--min-seconds", type=float, default=1.0, help="repeat a case until so much is timed")
    add("--max-repeats", type=int, default=5)
    add("--seed", type=int, default=1)
    add("--reference", default="skimp", choices=list(REGISTRY), help="whose ratios are reported")
    add("--skimp", default="skimp", help="how skimp is started")
    add("--skimp-arguments", default="", help="more arguments of `skimp bench`")
    add("--option", action="append", default=[], metavar="ENGINE.KEY=VALUE", help="engine option")
    add("--convert-python", default=sys.executable, help="interpreter with optimum-intel")
    add("--lock", type=Path, help="hold this file's lock while measuring")
    add("--quiet", type=float, help="wait until others take less than this share of the cores")
    add("--retries", type=int, default=2, help="with --quiet: new attempts of disturbed runs")
    add("--realtime", action="store_true", help="workers go before all other programs (needs root)")
    add("--timeout", type=float, default=1800, help="seconds one process may take")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.threads < 1 or options.new_tokens < 1:
        parser.error("--rounds, --threads and --new-tokens must be at least 1")
    if options.realtime and os.geteuid() != 0:
        parser.error("--realtime needs root")
    try:
        options.shapes = [find_shape(name) for name in options.shapes]
        options.engine_options = engine_options(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def find_shape(name: str) -> Path:
    """The JSON file of a shape given by name or path."""
    for path in (Path(name), SHAPES / f"{name}.json"):
        if path.is_file():
            return path.resolve()
    known = ", ".join(sorted(path.stem for path in SHAPES.glob("*.json")))
    raise ValueError(f"--shapes {name}: no such file, and not one of {known}")


def engine_options(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Registry options of every chosen engine, overridden by ``--option`` and ``--skimp``."""
    chosen = {name: dict(REGISTRY[name].options) for name in options.engines}
    words = shlex.split(options.skimp) or ["skimp"]
    if "/" in words[0]:  # the workers run in another folder
        words[0] = str(Path(words[0]).absolute())
    options.skimp = shlex.join(words)
    for name in chosen.keys() & SKIMP:
        chosen[name] |= {"command": options.skimp, "arguments": options.skimp_arguments}
    for word in options.option:
        place, equals, value = word.partition("=")
        engine, _, key = place.rpartition(".")
        if not equals or engine not in REGISTRY or not key:
            raise ValueError(f"--option {word}: not ENGINE.KEY=VALUE with a known engine")
        if engine in chosen:
            chosen[engine][key] = value
    return chosen


def cases_of(kind: str, options: argparse.Namespace) -> list[Case]:
    """The cases of one kind, which one process measures."""
    if kind == "generate":
        return [
            Case(kind=kind, batch=batch, context=context)
            for context in options.contexts
            for batch in options.batches
        ]
    if kind == "prefill":
        return [Case(kind=kind, batch=1, context=tokens) for tokens in options.prefills]
    return [Case(kind=kind, batch=1, context=START_PROMPT_TOKENS)]


@contextlib.contextmanager
def locked(path: Path | None) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` (none: no lock)."""
    if path is None:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def go_first() -> None:
    """Let this process and its children run before every ordinary program of the machine.

    On a shared machine a rival whose threads spin at barriers is otherwise slowed tenfold by one
    busy neighbour, which says nothing about it.
    """
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(10))


class Comparison:
    """Runs the workers and keeps the result files up to date after each of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.document: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "machine": describe(),
            "command": shown_command(),
            "settings": {
                name: getattr(options, name)
                for name in (
                    *("rounds", "threads", "batches", "contexts", "prefills", "new_tokens"),
                    *(
                        "min_seconds",
                        "max_repeats",
                        "seed",
                        "reference",
                        "quiet",
                        "retries",
                        "realtime",
                    ),
                )
            },
            "engines": {},
            "failures": [],
            "samples": [],
            "summary": [],
        }
        self.engines: list[str] = []

    def run(self) -> None:
        """Everything: model files, probes, rounds."""
        for name in self.options.engines:
            if self._available(name):
                self.engines.append(name)
        for number in range(1, self.options.rounds + 1):
            for shape in self.options.shapes:
                for kind in self.options.kinds:
                    for name in self.engines:
                        self._measure(name, shape, kind, number)
                        self._save()

    def _fail(self, engine: str, what: str, error: str) -> None:
        print(f"{engine}, {what}: {error}", file=sys.stderr, flush=True)
        self.document["failures"].append({"engine": engine, "what": what, "error": error})

    def _available(self, name: str) -> bool:
        """Make the model files of an engine and probe it once."""
        entry = REGISTRY[name]
        if name in SKIMP:
            program = (shlex.split(self.options.skimp) or [""])[0]
            if shutil.which(program) is None:
                self._fail(name, "start", f"no command {Path(program).name!r}; see --skimp")
                return False
        for shape in self.options.shapes:
            command = [sys.executable, "-m", "rivals.artifacts", str(shape)]
            command += [str(self.options.work.resolve()), entry.files]
            done = subprocess.run(
                [
                    *command,
                    *("--convert-python", self.options.convert_python),
                    *("--skimp", self.options.skimp),
                ],
                cwd=HERE,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                tail = " / ".join(done.stderr.strip().splitlines()[-5:])
                self._fail(name, f"model files of {shape.stem}", tail)
                return False
        reply, noise = self._worker(self._request(name, self.options.shapes[0], [], 0, probe=True))
        if "error" in reply:
            self._fail(name, "probe", reply["error"])
            return False
        isa = reply["isa"]
        if kernels := onednn_kernels(noise):
            isa["oneDNN kernels"] = kernels
        self.document["engines"][name] = {
            "weights": entry.weights,
            "options": {
                key: value
                for key, value in self.options.engine_options[name].items()
                if key != "command"
            },
            "versions": reply["versions"],
            "isa": isa,
        }
        return True

    def _request(
        self, name: str, shape: Path, cases: list[Case], number: int, probe: bool = False
    ) -> Request:
        options = self.options
        return Request(
            engine=name,
            config=str(shape),
            files=str(artifact(shape, options.work.resolve(), REGISTRY[name].files)),
            threads=options.threads,
            cases=cases,
            new_tokens=options.new_tokens,
            min_seconds=options.min_seconds,
            max_repeats=options.max_repeats,
            seed=options.seed + number,
            spawned_at=time.monotonic(),
            options=options.engine_options[name],
            probe=probe,
        )

    def _worker(self, request: Request) -> tuple[dict[str, Any], str]:
        """Run one worker; return its reply (an ``error`` on failure) and what it printed."""
        environment = os.environ | {
            "OMP_NUM_THREADS": str(request.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if request.probe:
            environment |= REGISTRY[request.engine].probe_environment
        with tempfile.TemporaryDirectory() as folder:
            source, reply = Path(folder, "request.json"), Path(folder, "reply.json")
            source.write_text(json.dumps(request.to_json()), encoding="utf-8")
            command = [sys.executable, "-m", "rivals.worker", str(source), str(reply)]
            try:
                done = subprocess.run(
                    command,
                    cwd=HERE,
                    env=environment,
                    preexec_fn=go_first if self.options.realtime else None,
                    capture_output=True,
                    text=True,
                    timeout=self.options.timeout,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return {"error": f"no answer in {self.options.timeout:g} s"}, ""
            if not reply.exists():
                tail = " / ".join(done.stderr.strip().splitlines()[-3:])
                return {"error": f"worker ended with {done.returncode}: {tail}"}, ""
            answer: dict[str, Any] = json.loads(reply.read_text(encoding="utf-8"))
            return answer, done.stdout

    def _measure(self, name: str, shape: Path, kind: str, number: int) -> None:
        """One engine, one shape, one kind, one round; the least disturbed attempt is kept."""
        best: tuple[float, list[Sample]] | None = None
        limit = self.options.quiet
        for attempt in range(1 if limit is None else 1 + self.options.retries):
            with locked(self.options.lock):
                if limit is not None:
                    wait_for_quiet(limit, PATIENCE_S)
                before = CpuClock.now()
                request = self._request(name, shape, cases_of(kind, self.options), number)
                reply, _ = self._worker(request)
                others = CpuClock.now().others_since(before)
            if "error" in reply:
                self._fail(name, f"{shape.stem} {kind}, round {number}", reply["error"])
                return
            if best is None or others < best[0]:
                mark = {"shape": shape.stem, "engine": name, "round": number}
                mark |= {"others_cpu": round(others, 4), "attempts": attempt + 1}
                best = others, [mark | row for row in reply["results"]]
            if limit is None or others <= limit:
                break
        assert best is not None
        self.document["samples"] += best[1]
        shown = ", ".join(
            f"{row['case']} {row.get('tokens_per_s', row.get('seconds')):.4g}" for row in best[1]
        )
        print(f"round {number}: {shape.stem}: {name}: {shown} (others {best[0]:.0%})", flush=True)

    def _save(self) -> None:
        """Rewrite both result files."""
        document = self.document
        document["summary"] = summarize(document["samples"], self.options.reference)
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        for suffix, text in (
            (".json", json.dumps(document, indent=1, ensure_ascii=False) + "\n"),
            (".md", markdown(document)),
        ):
            path = self.options.out.with_name(self.options.out.name + suffix)
            partial = path.with_name(f"{path.name}.partial")
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)


def shown_command() -> str:
    """The command line, every path in it cut to its last part."""
    words = []
    for word in sys.argv:
        parts = [part if "/" not in part else Path(part).name for part in word.split(" ")]
        words.append(" ".join(parts))
    return shlex.join(["python", *words])


def main() -> int:
    """Run the comparison; exit status 1 when nothing could be measured."""
    comparison = Comparison(parse_arguments(sys.argv[1:]))
    comparison.run()
    return 0 if comparison.document["samples"] else 1


if __name__ == "__main__":
    sys.exit(main())
