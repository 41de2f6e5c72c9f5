"""The process in which one engine is measured: ``python -m rivals.worker REQUEST REPLY``.

REQUEST is a JSON file with a `rivals.engine.Request`. The reply, a JSON object, goes to the file
REPLY, so that whatever an engine prints cannot spoil it: ``{"results": [...]}`` or, for a probe,
``{"versions": {...}, "isa": {...}}``, or ``{"error": "..."}``.
"""

from __future__ import annotations

import json
import random
import re
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from rivals.artifacts import read_config
from rivals.engine import Case, Request, limits_of, measure, random_prompts
from rivals.registry import engine_class

ONEDNN_LINE = re.compile(r"^onednn_verbose,.*?primitive,exec,cpu,(\w+),([^,]+),", re.MULTILINE)


def run(request: Request) -> dict[str, Any]:
    """Do what the request says and return the reply."""
    config = read_config(Path(request.config))
    chosen = engine_class(request.engine)
    if hasattr(chosen, "measure"):  # measures itself, in processes of its own
        own: dict[str, Any] = chosen(request, config).measure()
        return own
    engine = chosen(Path(request.files), config, request.threads, request.options)
    if not request.probe:
        return {"results": measure(engine, request)}
    case = Case(kind="prefill", batch=8, context=64)
    engine.load(limits_of([case], 4))
    engine.prepare(case, case.context + 5)
    engine.generate(random_prompts(random.Random(0), config["vocab_size"], 8, case.context), 4)
    return {"versions": engine.versions(), "isa": engine.isa()}


def onednn_kernels(text: str) -> dict[str, int]:
    """Count the oneDNN kernels named in verbose output (``ONEDNN_VERBOSE=1``)."""
    return dict(Counter(f"{kind}: {kernel}" for kind, kernel in ONEDNN_LINE.findall(text)))


def main() -> int:
    """Answer one request; exit status 1 when the reply is an error."""
    source, reply = Path(sys.argv[1]), Path(sys.argv[2])
    request = Request.from_json(json.loads(source.read_text(encoding="utf-8")))
    try:
        answer = run(request)
    except Exception as error:  # the driver reports it and goes on
        traceback.print_exc()
        answer = {"error": f"{type(error).__name__}: {error}"}
    reply.write_text(json.dumps(answer), encoding="utf-8")
    return int("error" in answer)


if __name__ == "__main__":
    sys.exit(main())
