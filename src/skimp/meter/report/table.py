"""The price's tables (losses, scores, speeds) as rows of text."""

from __future__ import annotations

from skimp.meter.cases import CACHE_BYTES
from skimp.meter.price import Price, Row, TaskPrice, inside_noise
from skimp.meter.report.grid import Table, bytes_text, markdown_of, text_of
from skimp.meter.report.speculation import speculation_tables
from skimp.meter.tasks import TaskResult


def tables(price: Price) -> tuple[Table, ...]:
    """Loss; scores, if tasks were asked; bytes; speed; what guesses gain, if any model guesses."""
    rows = (price.base, *price.rows)
    quality, first = price.base.quality, price.base.speed[0].result
    loss = Table(
        title="What it costs",
        columns=(
            "model",
            "verdict",
            "bits/byte (95 %)",
            "loss (95 %)",
            "KL, nats/token (95 %)",
        ),
        rows=(*(_loss(row) for row in rows), *_lossless(price)),
        note=(
            f"{quality.tokens:,} tokens in {quality.documents:,} documents ({quality.bytes:,} "
            f"bytes), windows of {quality.context}; intervals from a bootstrap over "
            f"{quality.blocks} passages, losses and KL paired with the base; "
            f"{first.device}, {_each(rows, 'dtype')}"
            + "".join(f"; {row.name}: {line}" for row in rows for line in row.warnings)
        ),
    )
    turns = "all models loaded and taking turns"
    if not price.together:
        turns = "each model taking turns with the base alone, as memory does not hold all of them"
    largest = _largest(rows)
    speed = Table(
        title="What it gains",
        columns=(
            "model",
            "batch x context",
            "tokens/s",
            "spread",
            "gain",
            "gain spread",
            "predicted gain",
            "first token",
            *(["cache held"] if largest else []),
        ),
        rows=tuple(line for row in rows for line in _speed(row, held=bool(largest))),
        note=(
            f"{first.device}, {_each(rows, 'dtype')}, {_each(rows, 'backend')} kernels, "
            f"{first.threads} threads; medians of {first.rounds} rounds of {first.steps} steps, "
            f"{turns}; spread is (slowest - fastest) / median; "
            + (
                "what guesses gain is measured on real prompts, below; "
                if price.speculation
                else ""
            )
            + f"{largest}{first.hardware}"
        ),
    )
    guesses = speculation_tables(price.speculation) if price.speculation else ()
    scores = [_scores(rows)] if price.base.tasks else []
    return (loss, *scores, _sizes(rows), speed, *guesses)


def as_text(price: Price) -> str:
    """The tables for a terminal."""
    return text_of(tables(price))


def as_markdown(price: Price) -> str:
    """The tables as Markdown."""
    return markdown_of(tables(price))


def _loss(row: Row) -> tuple[str, ...]:
    low, high = row.quality.ci95
    own = f"{row.quality.bits_per_byte:.4f} ({low:.4f} to {high:.4f})"
    lost = kl = ""
    verdict = "base"
    if (found := row.comparison) is not None:
        (low, high), worse = found.paired.ci95, found.paired.bits_per_byte
        lost = f"{worse:+.4f} ({low:+.4f} to {high:+.4f})"
        low, high = found.divergence.ci95
        kl = f"{found.divergence.kl:.3g} ({low:.3g} to {high:.3g})"
        verdict = _verdict(worse, found.paired.inside_noise)
    return (row.name, verdict, own, lost, kl)


def _lossless(price: Price) -> list[tuple[str, ...]]:
    """Models that guess: their law is that of the same model without, whose figures these are."""
    own = {row.name: _loss(row) for row in (price.base, *price.rows)}
    guessing = {found.name: found.plain for found in price.speculation}
    return [
        (name, "lossless" if plain == price.base.name else f"as {plain}", *own[plain][2:])
        for name, plain in guessing.items()
    ]


def _sizes(rows: tuple[Row, ...]) -> Table:
    lines = []
    for row in rows:
        sizes = (
            row.disk_bytes,
            row.resident_weight_bytes,
            row.weight_bytes_per_token,
            row.cache_bytes_per_token,
            *(use.bytes for use in row.cache),
        )
        lines.append((row.name, *map(bytes_text, sizes)))
    return Table(
        title="What it takes",
        columns=(
            "model",
            "on disk",
            "weights in memory",
            "weights read/token",
            "cache/token",
            *(f"cache at {use.context:,}" for use in rows[0].cache),
        ),
        rows=tuple(lines),
        note=(
            "read/token: by a step of one sequence; cache/token: what one more token adds while no "
            "window is full; cache at a context: the pages that a sequence of so many tokens holds"
        ),
    )


def _scores(rows: tuple[Row, ...]) -> Table:
    lines = []
    notes = dict.fromkeys(_task_note(task.result) for task in rows[0].tasks)
    for index in range(len(rows[0].tasks)):
        for name in rows[0].tasks[index].result.scores:
            lines += [_score(row, row.tasks[index], name) for row in rows]
    return Table(
        title="What it still gets right",
        columns=(
            "model",
            "score",
            "value (95 %)",
            "items",
            "difference (95 %)",
            "verdict",
        ),
        rows=tuple(lines),
        note=(
            f"{'; '.join(notes)}; differences are paired with the base, item by item; "
            f"{rows[0].speed[0].result.device}, {_each(rows, 'dtype')}"
        ),
    )


def _score(row: Row, task: TaskPrice, name: str) -> tuple[str, ...]:
    score = task.result.scores[name]
    low, high = score.ci95
    difference = verdict = ""
    if (found := task.differences.get(name)) is not None:
        difference = f"{found.value:+.3f} ({found.ci95[0]:+.3f} to {found.ci95[1]:+.3f})"
        verdict = _verdict(-found.value, inside_noise(found))
    return (
        row.name,
        f"{task.result.name}: {name}",
        f"{score.value:.3f} ({low:.3f} to {high:.3f})",
        f"{score.n:,}",
        difference,
        verdict or "base",
    )


def _task_note(result: TaskResult) -> str:
    found = f"{result.name}: {result.kind}, {result.n:,} items"
    chances = {score.chance for score in result.scores.values() if score.chance is not None}
    found += "".join(f", chance {chance:.3g}" for chance in chances)
    if result.cut:
        found += f", {result.cut} without the beginning of their context"
    if "shots" in result.notes:
        found += f", {result.notes['shots']} shots, {result.notes['unfinished']} unfinished"
    return found


def _verdict(worse: float, noise: bool) -> str:
    return "inside the noise" if noise else "worse" if worse > 0 else "better"


def _largest(rows: tuple[Row, ...]) -> str:
    """What a largest batch is, and which of them something else than the memory limits; empty
    where none was asked for."""
    found = [
        (row.name, gain.result.case)
        for row in rows
        for gain in row.speed
        if gain.result.case.limited_by is not None
    ]
    if not found:
        return ""
    others = (
        f"{name} at {case.context}: no more because of {case.limited_by}; "
        for name, case in found
        if case.limited_by != CACHE_BYTES
    )
    return (
        f"max: as many sequences of a context and its {found[0][1].new_tokens} new tokens as "
        f"{bytes_text(rows[0].cache_budget)} of cache hold, and the gain is over the base at its "
        "own most; cache held: by all of them at their last token; " + "".join(others)
    )


def _speed(row: Row, *, held: bool) -> list[tuple[str, ...]]:
    return [
        (
            row.name,
            g.result.case.label,
            f"{g.result.tokens_per_s:,.1f}",
            f"{g.result.spread:.0%}",
            f"{g.gain:.2f}x",
            f"{g.spread:.0%}",
            f"{g.predicted:.2f}x",
            f"{g.result.first_token_ms:,.1f} ms",
            *([bytes_text(g.result.cache_bytes_held)] if held else []),
        )
        for g in row.speed
    ]


def _each(rows: tuple[Row, ...], field: str) -> str:
    values = dict.fromkeys(str(getattr(row.speed[0].result, field)) for row in rows)
    return " / ".join(values)
