"""A small model directory, and ways to run a command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoint import CONFIG, write_model
from typer.testing import CliRunner

from skimp.cli import make_app


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("configs") / "small.json"
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test measures this machine, or writes to the user's cache."""
    from skimp.cost import hardware_by_name

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    desktop = hardware_by_name("desktop")
    monkeypatch.setattr("skimp.cost.this_machine", lambda **kw: desktop)
    monkeypatch.setattr("skimp.meter.calibrate.engine_hardware", lambda engine, **kw: desktop)
    monkeypatch.setattr("skimp.meter.calibrate.this_machine", lambda **kw: desktop)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def skimp() -> Callable[..., Any]:
    """Runs a command in this process: ``skimp("generate", model, "text", input=...)``."""
    app = make_app()

    def run(*args: object, input: str | bytes | None = None) -> Any:
        return CliRunner().invoke(app, [str(a) for a in args], input=input)

    return run


@pytest.fixture
def script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command in a process of its own."""

    def run(*args: object, **kw: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "skimp", *(str(a) for a in args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, **kw)

    return run
