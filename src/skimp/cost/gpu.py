"""Measures a GPU: what a device copy, matrix products, attention and a launch give."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from skimp.cost.hardware import Curve, Hardware, Overheads

if TYPE_CHECKING:
    import torch

_COPY_BYTES = 1 << 30
_WIDTH = 8192
_ROWS = (16, 128, 1024, 8192)
_LAUNCHES = 200
_LAYER_LAUNCHES = 5  # qkv, attention, output, gate and up, down: see docs/gpu.md


def measure_gpu(device: str) -> Hardware:
    """About a second on a recent GPU; takes 3 GB of its memory meanwhile."""
    import torch

    with torch.inference_mode(), torch.cuda.device(device):
        bandwidth = copy_rate()
        rates = {name: _matrix_rates(name) for name in ("bfloat16", "float16", "float32")}
        attention = _attention_rate()
        launch = _launch_s()
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        torch.cuda.empty_cache()
    return Hardware(
        name="this",
        kind="gpu",
        source="measured",
        note=f"{properties.name}, torch {torch.__version__}; copy {bandwidth:,.0f} GB/s, read and "
        f"written, bf16 {rates['bfloat16'][-1][1]:,.0f} TFLOP/s",
        bandwidth_gb_s=bandwidth,
        matrix_tflops=rates,
        attention_tflops=attention,
        memory_bytes=float(properties.total_memory),
        overheads=Overheads(layer_s=_LAYER_LAUNCHES * launch),
    )


def _median_s(run: Callable[[], object], repeats: int = 10) -> float:
    """Median seconds of one ``run()`` on the GPU, after two that do not count."""
    import torch

    times = []
    for _ in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[2:])


def copy_rate() -> float:
    """GB/s of a device copy, bytes read and written."""
    import torch

    # Not zeros, which some GPUs move faster.
    source = torch.randint(256, (_COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / _median_s(partial(target.copy_, source)) / 1e9


def _matrix_rates(dtype: str) -> Curve:
    """(rows, TFLOP/s). Of few rows that is what the memory allows, which no prediction exceeds
    either way."""
    import torch

    kind = getattr(torch, dtype)
    weight = torch.randn(_WIDTH, _WIDTH, device="cuda", dtype=kind)
    points = []
    for rows in _ROWS:
        x = torch.randn(rows, _WIDTH, device="cuda", dtype=kind)
        took = _median_s(partial(torch.nn.functional.linear, x, weight))
        points.append((float(rows), 2 * rows * _WIDTH**2 / took / 1e12))
    return tuple(points)


def _attention_rate() -> float:
    """TFLOP/s of causal attention: 32 heads of 128 over 8,192 tokens in bfloat16."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads, tokens, dim = 32, 8192, 128
    q = torch.randn(1, heads, tokens, dim, device="cuda", dtype=torch.bfloat16)
    attend = partial(torch.nn.functional.scaled_dot_product_attention, q, q, q, is_causal=True)
    flops = 4 * heads * dim * tokens * tokens / 2
    best = 0.0
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        try:
            with sdpa_kernel(backend):
                best = max(best, flops / _median_s(attend, 5) / 1e12)
        except RuntimeError:
            continue
        if best:
            break
    return best


def _launch_s() -> float:
    """Seconds from one kernel of a CUDA graph to the next that waits for it."""
    import torch

    x: torch.Tensor = torch.zeros(32, device="cuda")
    x.add_(1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_LAUNCHES):
            x.add_(1)
    return _median_s(graph.replay) / _LAUNCHES
