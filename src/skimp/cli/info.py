"""``skimp info``: what a model is, what it needs, and what would run it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skimp.cli import options as opt

if TYPE_CHECKING:
    from skimp.model.spec import ModelSpec


def info(
    model: opt.ModelArgument,
    dtype: opt.DType = "auto",
    json_output: opt.Json = False,
) -> None:
    """Describe a model and this machine.

    Sizes of the model and of its cache, and the kernels that would run it here. MODEL may also be a
    config.json: no weights are read.

    \b
    Examples:
      skimp info tales
      skimp info ./Llama-3.1-8B/config.json --json
    """
    from skimp.cli.models import model_spec
    from skimp.cli.output import print_json

    found = describe(model, model_spec(model), dtype)
    if json_output:
        print_json(found)
    else:
        _print(found)


def describe(name: str, spec: ModelSpec, dtype: str) -> dict[str, Any]:
    """Everything that is printed, as JSON."""
    import torch

    import skimp
    from skimp.cost import step_cost, uniform
    from skimp.engine.options import EngineOptions
    from skimp.kernels import native
    from skimp.kernels.native.library import library
    from skimp.meter.work import spec_work
    from skimp.model.spec import GatedFFNSpec, LatentAttentionSpec

    chosen = EngineOptions(dtype=dtype).dtype  # type: ignore[arg-type]
    stored = "float32" if spec.dtype == "float16" else spec.dtype
    work = spec_work(spec, stored if chosen == "auto" else chosen)
    mixers: dict[str, int] = {}
    for layer in spec.layers:
        m = layer.mixer
        reach = "the whole past" if m.window is None else f"a window of {m.window}"
        if isinstance(m, LatentAttentionSpec):
            keys = f"latents of {m.latent_dim} + {m.rope_dim}"
        else:
            keys = f"{m.num_kv_heads} KV heads of {m.head_dim}"
        kind = f"{m.num_heads} heads, {keys}, {reach}"
        mixers[kind] = mixers.get(kind, 0) + 1
    widths: set[int] = set()
    experts: dict[str, int] = {}
    for ffn in (layer.ffn for layer in spec.layers):
        if isinstance(ffn, GatedFFNSpec):
            widths.add(ffn.intermediate_size)
        else:
            kind = f"{ffn.num_experts} experts of {ffn.intermediate_size}, "
            kind += f"{ffn.experts_per_token} a token"
            if ffn.shared is not None:
                kind += f", and a shared one of {ffn.shared.intermediate_size}"
            experts[kind] = experts.get(kind, 0) + 1
    parameters = sum(m.weights for m in work.matrices)
    idle = sum(m.weights * (1 - m.chance) for m in work.matrices)
    if not spec.tie_embeddings:
        parameters += spec.vocab_size * spec.hidden_size
    parameters += work.vector_bytes // 4
    missing = native.lacks(spec)
    usable = native.available() and missing is None
    kernels = native.describe() if native.available() else "not built"
    if missing is not None:
        kernels = f"the native kernels have no {missing}"
    return {
        "model": name,
        "family": spec.family,
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "intermediate_size": sorted(widths),
        "experts": experts,
        "vocab_size": spec.vocab_size,
        "tied_embeddings": spec.tie_embeddings,
        "mixers": mixers,
        "max_positions": spec.max_positions,
        "checkpoint_dtype": spec.dtype,
        "dtype": work.compute_dtype,
        "parameters": parameters,
        "parameters_per_token": round(parameters - idle),
        "weight_bytes": round(work.resident_weight_bytes),
        "weight_bytes_per_step": round(step_cost(work, uniform(1, 1)).weight_bytes),
        "cache_bytes_per_token": work.cache_bytes_per_token,
        "cache_bytes_at_max_positions": work.cache_bytes(spec.max_positions),
        "backend": "native" if usable else "plain",
        "native_kernels": kernels,
        "isa": library().isa() if usable else torch.backends.cpu.get_cpu_capability(),
        "threads": native.get_threads() if usable else torch.get_num_threads(),
        "skimp": skimp.__version__,
        "torch": torch.__version__,
    }


def _print(found: dict[str, Any]) -> None:
    from skimp.cli.output import bytes_text

    inner = "".join(f"feed-forward {n}, " for n in found["intermediate_size"])
    active = ""
    if found["experts"]:
        active = f", {found['parameters_per_token'] / 1e6:,.1f} million of them a token"
    tied = "tied" if found["tied_embeddings"] else "untied"
    lines = [
        ("model", f"{found['model']} ({found['family']})"),
        ("parameters", f"{found['parameters'] / 1e6:,.1f} million{active}"),
        (
            "shape",
            f"{found['layers']} layers, hidden {found['hidden_size']}, {inner}"
            f"vocabulary {found['vocab_size']:,} ({tied} embeddings)",
        ),
        *(("attention", f"{n} x {kind}") for kind, n in found["mixers"].items()),
        *(("experts", f"{n} x {kind}") for kind, n in found["experts"].items()),
        ("context", f"{found['max_positions']:,} tokens"),
        (
            "weights",
            f"{bytes_text(found['weight_bytes'])} in {found['dtype']}, "
            f"{bytes_text(found['weight_bytes_per_step'])} read a step",
        ),
        (
            "cache",
            f"{bytes_text(found['cache_bytes_per_token'])} a token, "
            f"{bytes_text(found['cache_bytes_at_max_positions'])} at the longest context",
        ),
        ("backend", f"{found['backend']} ({found['native_kernels']})"),
        ("threads", str(found["threads"])),
        ("versions", f"skimp {found['skimp']}, torch {found['torch']}"),
    ]
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name.ljust(width)}  {text}")
