"""What bytes and operations do not explain about this engine on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from skimp.cost import Hardware, this_machine
from skimp.meter.work import engine_threads

if TYPE_CHECKING:
    from skimp.engine import Engine


def engine_hardware(engine: Engine) -> Hardware:
    """The machine the engine runs on."""
    return this_machine(threads=engine_threads(engine), device=engine.options.device)
