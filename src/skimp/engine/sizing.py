"""How long sequences may get, and how much memory their cache takes when nobody says."""

from __future__ import annotations

import os

import torch

from skimp.cache import MOST_BYTES, CacheLayout
from skimp.cost import ModelWork, memory_plan
from skimp.engine.options import EngineOptions
from skimp.errors import OptionError
from skimp.model.spec import ModelSpec

MAX_CACHE_SHARE = {"cpu": 0.25, "cuda": 0.85}  # of free memory


def longest_context(spec: ModelSpec, options: EngineOptions) -> int:
    """Tokens of the longest sequence. Raises ``OptionError`` beyond the model's own limit."""
    limit = spec.max_positions
    if options.max_context is not None and options.max_context > limit:
        raise OptionError(f"max_context: {options.max_context} exceeds the model's {limit}")
    return options.max_context or limit


def default_cache_bytes(
    work: ModelWork,
    layout: CacheLayout,
    options: EngineOptions,
    max_context: int,
    *,
    is_there: bool,
) -> int:
    """What the cost model says a full batch needs, rounded up to the arena's chunks, within a
    share of the free memory, but always the arena that one sequence of the longest context
    wants. ``is_there``: the weights are on the device already."""
    least = layout.bytes_needed(max_context, options.step_tokens)
    plan = memory_plan(
        work,
        batch=options.max_batch,
        context=max_context,
        page_tokens=layout.page_tokens,
        step_tokens=options.step_tokens,
    )
    if options.device == "cuda":
        coming = 0 if is_there else int(work.resident_weight_bytes)
        free = max(0, torch.cuda.mem_get_info()[0] - coming)
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    share = int(free * MAX_CACHE_SHARE[options.device])
    whole = layout.bytes_needed(max_context, sequences=options.max_batch)
    wanted = max(int(plan.cache_bytes), whole)
    return min(max(min(wanted, share), min(least, free)), MOST_BYTES)
