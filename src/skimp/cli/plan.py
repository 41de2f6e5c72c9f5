"""``skimp plan``: where the time would go, and what each shortcut would change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from skimp.cli import options as opt

if TYPE_CHECKING:
    from skimp.cost import Hardware, Inapplicable, ModelWork, Outcome
    from skimp.model.spec import ModelSpec

DEFAULT_CONTEXT = 4096


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|CONFIG.json", help="A model, or only its config: no weights are read."
        ),
    ],
    hardware: Annotated[
        str, typer.Option(help="this, h100, a100, rtx4090, laptop, desktop or server.")
    ] = "this",
    context: Annotated[
        str | None,
        typer.Option(
            help="Tokens a sequence holds, e.g. 32k; 4k by default, or what the model can.",
            metavar="N",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[str, typer.Option(help="Sequences at once.", metavar="N")] = "1",
    dtype: Annotated[
        str, typer.Option(help="Of weights and cache; the checkpoint's by default.")
    ] = "auto",
    memory: Annotated[
        float | None,
        typer.Option(help="Memory budget; the hardware's by default.", metavar="GB"),
    ] = None,
    kv_heads: Annotated[
        int | None, typer.Option(help="GQA: KV heads to keep.", metavar="N", show_default=False)
    ] = None,
    window: Annotated[str, typer.Option(help="Window of local layers.", metavar="N")] = "1k",
    global_every: Annotated[
        int, typer.Option(help="One layer in N keeps the whole past.", metavar="N")
    ] = 4,
    acceptance: Annotated[
        float, typer.Option(help="Chance that a drafted token is accepted.", metavar="P")
    ] = 0.7,
    draft_tokens: Annotated[int, typer.Option(help="Tokens drafted a step.", metavar="N")] = 4,
    draft_cost: Annotated[
        float, typer.Option(help="A draft step's time over a step's.", metavar="X")
    ] = 0.1,
    block: Annotated[int, typer.Option(help="Tokens of a diffusion block.", metavar="N")] = 8,
    block_steps: Annotated[int, typer.Option(help="Steps that denoise a block.", metavar="N")] = 4,
    json_output: opt.Json = False,
) -> None:
    """Predict speed and memory from a shape.

    Nothing is loaded or run: a generation step is predicted from sizes alone. Everything shown is
    predicted, and only speed and memory: what a shortcut costs in accuracy has to be measured.

    \b
    Examples:
      skimp plan tales
      skimp plan Llama-3.1-8B/config.json --hardware h100 --context 32k --batch 16
    """
    from skimp.cli.models import model_spec
    from skimp.cli.output import print_json
    from skimp.cost import Assumptions, compare, hardware_by_name
    from skimp.meter.work import spec_work

    sequences = opt.parse_count(batch, "batch")
    tokens = None if context is None else opt.parse_count(context, "context")
    if sequences > 1 << 20:
        raise ValueError(f"batch: at most {1 << 20} sequences, not {sequences}")
    assumptions = Assumptions(
        kv_heads=kv_heads,
        window=opt.parse_count(window, "window"),
        global_every=global_every,
        acceptance=acceptance,
        draft_tokens=draft_tokens,
        draft_cost=draft_cost,
        block=block,
        block_steps=block_steps,
    )
    if memory is not None and not 0 < memory < 1e9:
        raise ValueError(f"memory: a positive number of GB, not {memory}")
    spec = model_spec(model)
    if tokens is None:
        tokens = min(DEFAULT_CONTEXT, spec.max_positions)
    if tokens > spec.max_positions:
        raise ValueError(f"context: {tokens} exceeds the model's {spec.max_positions} positions")
    work = spec_work(spec, None if dtype == "auto" else dtype)
    machine = _this(spec, work) if hardware == "this" else hardware_by_name(hardware)
    base, variants = compare(
        spec, work, machine, batch=sequences, context=tokens, assumptions=assumptions
    )
    budget = machine.memory_bytes if memory is None else memory * 1e9
    if json_output:
        print_json(_as_dict(model, machine, work, base, variants, budget))
    else:
        _print(model, machine, work, base, variants, budget)


def _this(spec: ModelSpec, work: ModelWork) -> Hardware:
    """The machine at hand, as an engine of this dtype was measured on it if one was."""
    from skimp.cost import this_machine
    from skimp.kernels import native
    from skimp.meter.calibrate import calibrated

    if not native.available():
        return this_machine()
    return calibrated(
        dtype=work.compute_dtype,
        device="cpu",
        backend="native",
        threads=native.get_threads(),
        formats=spec.formats.values(),
        measure=False,
    )


def _fits(work: ModelWork, base: Outcome, budget: float) -> dict[str, Any]:
    from skimp.cost import max_batch, max_context

    plan = base.memory
    return {
        "weight_bytes": plan.weight_bytes,
        "cache_bytes": plan.cache_bytes,
        "workspace_bytes": plan.workspace_bytes,
        "total_bytes": plan.total_bytes,
        "budget_bytes": budget,
        "fits": plan.total_bytes <= budget,
        "max_batch": max_batch(work, context=plan.context, budget_bytes=budget),
        "max_context": max_context(work, batch=plan.batch, budget_bytes=budget),
    }


def _outcome_dict(outcome: Outcome, base: Outcome) -> dict[str, Any]:
    return {
        "name": outcome.name,
        "detail": outcome.detail,
        "ms_per_step": outcome.step_s * 1e3,
        "limit_ms": outcome.limit_s * 1e3,
        "tokens_per_step": outcome.tokens_per_step,
        "tokens_per_s": outcome.tokens_per_s,
        "speedup": outcome.tokens_per_s / base.tokens_per_s,
        "weight_bytes": outcome.cost.weight_bytes,
        "cache_read_bytes": outcome.cost.cache_read_bytes,
        "memory_bytes": outcome.memory.total_bytes,
        "bound": outcome.time.bound,
    }


def _as_dict(
    model: str,
    machine: Hardware,
    work: ModelWork,
    base: Outcome,
    variants: list[Outcome | Inapplicable],
    budget: float,
) -> dict[str, Any]:
    from skimp.cost import Outcome

    return {
        "predicted": True,
        "model": model,
        "hardware": {k: v for k, v in machine.as_dict().items() if k != "bandwidth_curve"},
        "batch": base.memory.batch,
        "context": base.memory.context,
        "dtype": work.compute_dtype,
        "memory": _fits(work, base, budget),
        "terms": [
            {
                "name": term.name,
                "weight_bytes": term.weight_bytes,
                "cache_bytes": term.cache_read_bytes + term.cache_write_bytes,
                "flops": term.flops,
                "ms": time.seconds * 1e3,
                "share": time.seconds / base.time.seconds,
                "bound": time.bound,
            }
            for term, time in zip(base.cost.terms, base.time.terms)
        ],
        "overhead_ms": base.time.overhead_s * 1e3,
        "as_it_is": _outcome_dict(base, base),
        "shortcuts": [
            _outcome_dict(v, base)
            if isinstance(v, Outcome)
            else {"name": v.name, "not_applicable": v.reason}
            for v in variants
        ],
    }


def _print(
    model: str,
    machine: Hardware,
    work: ModelWork,
    base: Outcome,
    variants: list[Outcome | Inapplicable],
    budget: float,
) -> None:
    from skimp.cli.output import bytes_text, ms_text, percent, print_table, rate_text
    from skimp.cost import Outcome

    fits = _fits(work, base, budget)
    plan = base.memory
    rows = []
    for term, time in zip(base.cost.terms, base.time.terms):
        read = term.weight_bytes + term.cache_read_bytes + term.cache_write_bytes
        rows.append(
            [
                term.name,
                bytes_text(read),
                f"{term.flops / 1e9:,.3g}",
                ms_text(time.seconds),
                percent(time.seconds / base.time.seconds),
                time.bound,
            ]
        )
    overhead = base.time.overhead_s
    rows.append(["overhead", "", "", ms_text(overhead), percent(overhead / base.time.seconds), ""])
    rows.append(
        [
            "step",
            bytes_text(base.cost.bytes_read),
            f"{base.cost.flops / 1e9:,.3g}",
            ms_text(base.time.seconds),
            "100 %",
            base.time.bound,
        ]
    )
    title = (
        f"PREDICTED, not measured: {model}, {work.compute_dtype}, batch {plan.batch}, "
        f"context {plan.context:,}\non {machine.name} ({machine.source}: {machine.note})\n"
    )
    print_table(title, ["where", "bytes", "GFLOP", "ms", "share", "bound by"], rows)
    verdict = "fits" if fits["fits"] else "DOES NOT FIT"
    print(
        f"\nMemory: weights {bytes_text(plan.weight_bytes)}, cache {bytes_text(plan.cache_bytes)}, "
        f"workspace {bytes_text(plan.workspace_bytes)}: {verdict} in {bytes_text(budget)} "
        f"(largest batch {fits['max_batch']:,} at this context, longest context "
        f"{fits['max_context']:,} at this batch)\n"
    )
    lines, left_out = [], []
    for v in [base, *variants]:
        if isinstance(v, Outcome):
            lines.append(
                [
                    v.name,
                    ms_text(v.step_s),
                    f"{v.tokens_per_step:.2f}",
                    rate_text(v.tokens_per_s),
                    f"{v.tokens_per_s / base.tokens_per_s:.2f}x",
                    bytes_text(v.cost.weight_bytes),
                    bytes_text(v.cost.cache_read_bytes),
                    bytes_text(v.memory.total_bytes),
                    v.detail,
                ]
            )
        else:
            left_out.append(f"  {v.name}: {v.reason}")
    columns = [
        "shortcut, each alone", "ms/step", "tokens/step", "tokens/s", "gain", "weights",
        "cache read", "memory", "assuming",
    ]  # fmt: skip
    print_table("", columns, lines)
    if left_out:
        print("\nNot applicable here:\n" + "\n".join(left_out))
    print("\nAccuracy is not predicted: a lossy shortcut's price has to be measured.")
