"""The machine under the measurements: what it is, and how busy others keep it."""

from __future__ import annotations

import os
import platform
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOTABLE_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "amx_fp16",
)


def describe() -> dict[str, Any]:
    """CPU model, notable flags, cores, memory (GiB), kernel and Python."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if not line.strip():
            break
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    flags = set(fields.get("flags", "").split())
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": fields.get("model name", platform.processor()),
        "family_model_stepping": [fields.get(k) for k in ("cpu family", "model", "stepping")],
        "flags": [flag for flag in NOTABLE_FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "memory_gib": round(pages * page / 2**30, 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
    }


@dataclass(frozen=True, kw_only=True)
class CpuClock:
    """A reading of the CPU seconds spent so far.

    Attributes:
        wall: monotonic seconds.
        busy: seconds spent by everything on the machine, all cores.
        own: seconds spent by this process and its finished children.
        stolen: seconds the hypervisor gave to others while a core wanted to run.
    """

    wall: float
    busy: float
    own: float
    stolen: float

    @classmethod
    def now(cls) -> CpuClock:
        """Read the clock."""
        first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
        ticks = [int(word) / os.sysconf("SC_CLK_TCK") for word in first]
        user, nice, system, _idle, _wait, irq, soft, stolen = ticks[:8]
        own = 0.0
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
            usage = resource.getrusage(who)
            own += usage.ru_utime + usage.ru_stime
        busy = user + nice + system + irq + soft
        return cls(wall=time.monotonic(), busy=busy, own=own, stolen=stolen)

    def others_since(self, earlier: CpuClock) -> float:
        """Share of the machine's core time that others (or the hypervisor) took, 0 to 1."""
        span = (self.wall - earlier.wall) * (os.cpu_count() or 1)
        others = (self.busy - earlier.busy) - (self.own - earlier.own)
        return max(0.0, others + self.stolen - earlier.stolen) / span if span > 0 else 0.0


def wait_for_quiet(limit: float, patience_s: float, window_s: float = 1.0) -> float:
    """Wait until others take less than ``limit`` of the cores during ``window_s`` seconds.

    Returns:
        The share seen last; it is above the limit when ``patience_s`` seconds did not suffice.
    """
    deadline = time.monotonic() + patience_s
    while True:
        before = CpuClock.now()
        time.sleep(window_s)
        share = CpuClock.now().others_since(before)
        if share <= limit or time.monotonic() > deadline:
            return share
