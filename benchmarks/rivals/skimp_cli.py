"""skimp through its command line, so that what is measured is what a user starts.

Generation and prefill come from one process each: ``skimp bench --random-weights CONFIG.json``, or
for low bits ``skimp bench DIRECTORY`` of the same weights shrunk, with ``--batch 1,8,32 --context
128,1024 --new-tokens N --json``, prints a JSON object for one case or ``{"results": [...]}`` for
several, with ``batch``, ``context``, ``ms_per_step``, ``tokens_per_s`` and
``prefill_tokens_per_s``. The start is the whole time of a ``skimp generate`` process that makes one
token, and so an upper bound.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

from rivals.artifacts import DUMMY_WORDS
from rivals.engine import Case, Request

KEPT = ("device", "dtype", "backend", "threads", "spread", "rounds", "mean_context", "limit_ms")


class SkimpCommand:
    """Runs the command.

    Options: ``command`` (how skimp is started, such as ``python -m skimp.cli``), ``dtype`` and
    ``arguments`` (more arguments of ``bench``, such as ``--rounds 3``), split as a shell would.
    """

    def __init__(self, request: Request, config: dict[str, Any]) -> None:
        self.request, self.config = request, config
        self.command = shlex.split(request.options.get("command", "skimp"))
        self.arguments = shlex.split(request.options.get("arguments", ""))
        self.common = ["--dtype", request.options.get("dtype", "bfloat16")]
        self.common += ["--threads", str(request.threads), "--json", "--quiet"]

    def measure(self) -> dict[str, Any]:
        """The worker's whole reply."""
        request = self.request
        if request.probe:
            return {"versions": {"skimp": self._version()}, "isa": {}}
        kinds = {case.kind for case in request.cases}
        if kinds == {"start"}:
            return {"results": [self._start(case) for case in request.cases]}
        steps, rounds = (request.new_tokens, 1) if kinds == {"generate"} else (1, 3)
        low_bits = Path(request.files).name != "hf"
        model = [request.files] if low_bits else ["--random-weights", request.config]
        command = ["bench", *model, "--new-tokens", str(steps)]
        for flag, values in (
            ("--batch", {case.batch for case in request.cases}),
            ("--context", {case.context for case in request.cases}),
        ):
            command += [flag, ",".join(map(str, sorted(values)))]
        command += ["--rounds", str(rounds), "--seed", str(request.seed), *self.common]
        printed = self._run([*command, *self.arguments])
        rows = printed.get("results", [printed])
        found = {(row["batch"], row["context"]): row for row in rows}
        return {"results": [_sample(case, found) for case in request.cases]}

    def _run(self, arguments: list[str]) -> dict[str, Any]:
        """Run one command and return the JSON object that it prints.

        Raises:
            RuntimeError: the command failed or printed no JSON object.
        """
        command = [*self.command, *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": str(self.request.threads)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode != 0:
            tail = " / ".join(done.stderr.strip().splitlines()[-3:])
            raise RuntimeError(f"skimp {arguments[0]} ended with {done.returncode}: {tail}")
        return parse_object(done.stdout)

    def _start(self, case: Case) -> dict[str, Any]:
        generator = random.Random(self.request.seed)
        prompt = " ".join(f"w{generator.randrange(100, DUMMY_WORDS)}" for _ in range(case.context))
        command = ["generate", self.request.files, prompt, "--max-tokens", "1", "--ignore-eos"]
        begin = time.monotonic()
        self._run([*command, "--temperature", "0", *self.common])
        seconds = time.monotonic() - begin
        return {"case": case.key, "seconds": seconds, "note": "whole process, an upper bound"}

    def _version(self) -> str:
        done = subprocess.run(
            [*self.command, "--version"], capture_output=True, text=True, check=False
        )
        lines = done.stdout.strip().splitlines()
        if done.returncode != 0 or not lines:
            return "unknown"
        return lines[-1].removeprefix("skimp ")


def _sample(case: Case, found: dict[tuple[int, int], dict[str, Any]]) -> dict[str, Any]:
    """The sample of one case from the printed rows, {(batch, context): row}."""
    row = found.get((case.batch, case.context))
    if row is None:
        raise RuntimeError(f"skimp bench printed no batch {case.batch}, context {case.context}")
    sample: dict[str, Any] = {"case": case.key}
    if case.kind == "generate":
        sample |= {name: float(row[name]) for name in ("ms_per_step", "tokens_per_s")}
    else:
        sample["tokens_per_s"] = float(row["prefill_tokens_per_s"])
    return sample | {"printed": {name: row[name] for name in KEPT if name in row}}


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object in ``text``, which may follow other lines.

    Raises:
        RuntimeError: there is none.
    """
    for candidate in (text, text[max(0, text.find("{")) :], *reversed(text.splitlines())):
        try:
            found = json.loads(candidate)
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict):
            return found
    raise RuntimeError("the command printed no JSON object")
