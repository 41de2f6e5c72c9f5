"""Tools of the model tests: random transformers models as the oracle, and ways to run ours."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from skimp.kernels import native
from skimp.kernels.ops import LayerCache, StepInputs
from skimp.kernels.plain import PlainOps
from skimp.model.decoder import Decoder

os.environ.setdefault("HF_HUB_OFFLINE", "1")
PAGE_TOKENS = 16


def _int32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _step(ids: Sequence[int], start: int, **more: Any) -> StepInputs:
    rows = len(ids)
    positions = list(range(start, start + rows))
    return StepInputs(
        token_ids=_int32(ids),
        positions=_int32(positions),
        row_seq=_int32([0] * rows),
        kv_end=_int32([p + 1 for p in positions]),
        seq_starts=_int32([0, rows]),
        logit_rows=_int32(list(range(rows))),
        **more,
    )


@torch.no_grad()
def run_whole(decoder: Decoder, ids: Sequence[int]) -> Tensor:
    """Logits [len(ids), V] of a whole sequence without a cache."""
    ops = PlainOps()
    return decoder.bind(ops)(_step(ids, 0), ops)


@torch.no_grad()
def run_cached(
    decoder: Decoder, ids: Sequence[int], chunks: Sequence[int], backend: str = "plain"
) -> Tensor:
    """The same logits, with the sequence given in chunks through a paged cache."""
    specs = decoder.cache_specs()
    groups = sorted(set(specs), key=specs.index)
    pages = -(-len(ids) // PAGE_TOKENS)
    caches, tables, address = [], [], 0
    offsets = dict.fromkeys(range(len(groups)), 0)
    for spec in specs:
        group = groups.index(spec)
        caches.append(
            LayerCache(spec=spec, group=group, offset=offsets[group], page_tokens=PAGE_TOKENS)
        )
        offsets[group] += PAGE_TOKENS * spec.bytes_per_token
    for group in range(len(groups)):
        size = -(-offsets[group] // 64)
        # Pages in reverse order: a kernel that ignores the table is found out.
        tables.append(_int32([[address + i * size for i in reversed(range(pages))]]))
        address += pages * size
    arena = torch.full((address * 64,), 255, dtype=torch.uint8)  # NaN until written
    cached = {"arena": arena, "block_tables": tuple(tables)}
    forward = _plain if backend == "plain" else _native
    run = forward(decoder, caches, _step(ids, 0, **cached))
    out, start = [], 0
    for chunk in chunks:
        part = ids[start : start + chunk]
        out.append(run(_step(part, start, **cached)))
        start += len(part)
    assert start == len(ids)
    return torch.cat(out)


def _plain(
    decoder: Decoder, caches: list[LayerCache], largest: StepInputs
) -> Callable[[StepInputs], Tensor]:
    ops = PlainOps()
    decoder.bind(ops, caches=caches)
    return lambda step: decoder(step, ops)


def _native(
    decoder: Decoder, caches: list[LayerCache], largest: StepInputs
) -> Callable[[StepInputs], Tensor]:
    """A program captured for the largest step, which then runs every smaller one."""
    ops = native.NativeOps()
    decoder.bind(ops, caches=caches)
    rows = largest.token_ids.shape[0]
    with ops.capture(max_rows=rows, max_seqs=1, max_logits=rows) as program:
        logits = decoder(largest, ops)

    def run(step: StepInputs) -> Tensor:
        count = step.token_ids.shape[0]
        for name in ("token_ids", "positions", "row_seq", "kv_end", "logit_rows"):
            getattr(largest, name)[:count] = getattr(step, name)
        logits.fill_(torch.nan)
        program.run(count, 1, count, 1)
        return logits[:count].clone()

    return run


@dataclass
class Oracle:
    """A random float32 transformers model, saved by transformers itself."""

    directory: Path
    model: Any

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        return self.model(torch.tensor([list(ids)]), use_cache=False).logits[0]


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference of two logit matrices in standard deviations of the oracle's."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.std())


@pytest.fixture(autouse=True)
def always_one_thread(one_thread: None) -> None:
    """These models are too small to share out; threads would only wait for each other."""


@pytest.fixture
def make_oracle(tmp_path: Path) -> Callable[[dict[str, Any]], Oracle]:
    """From a config dictionary to a saved random model whose logits have some contrast."""
    transformers = pytest.importorskip("transformers")

    def make(fields: dict[str, Any], *, save: bool = True) -> Oracle:
        fields = dict(fields)
        config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", dtype=torch.float32
        ).eval()
        centre = 0.0 if config.model_type.startswith("gemma") else 1.0
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.normal_(centre, 0.2)
                elif parameter.dim() == 1:
                    parameter.normal_(0.0, 0.3)
                else:
                    parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
        if save:
            model.save_pretrained(tmp_path)
        return Oracle(tmp_path, model)

    return make


@pytest.fixture(scope="session")
def shared() -> Iterator[Path]:
    """A folder of larger test data, where there is one."""
    found = os.environ.get("SKIMP_SHARED") or Path(__file__).parents[2] / ".." / "shared"
    if not (Path(found) / "data").is_dir():
        pytest.skip("no shared data: set SKIMP_SHARED")
    yield Path(found) / "data"


@pytest.fixture
def tools() -> Any:
    """The functions above, without importing across test files."""

    class Tools:
        whole = staticmethod(run_whole)
        cached = staticmethod(run_cached)
        distance = staticmethod(distance)

    return Tools
