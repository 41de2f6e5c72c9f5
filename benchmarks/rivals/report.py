"""From samples to a table: medians, spreads and ratios taken round by round."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from typing import Any

Sample = dict[str, Any]


def value_of(sample: Sample) -> float:
    """The figure of a sample: seconds for a start, tokens per second otherwise."""
    return float(sample["seconds" if sample["case"].startswith("start") else "tokens_per_s"])


def collect(samples: list[Sample]) -> dict[tuple[str, str], dict[str, dict[int, float]]]:
    """Arrange samples as {(shape, case): {engine: {round: value}}}, in order of appearance."""
    arranged: dict[tuple[str, str], dict[str, dict[int, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for sample in samples:
        place = arranged[sample["shape"], sample["case"]]
        place[sample["engine"]][sample["round"]] = value_of(sample)
    return arranged


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum, maximum and count."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "rounds": len(values),
    }


def summarize(samples: list[Sample], reference: str) -> list[dict[str, Any]]:
    """One row per shape, case and engine, with the reference's ratio to it.

    A ratio is taken within a round (the two ran minutes apart) and is above 1 where the reference
    is the better: more tokens per second, or fewer seconds to start.
    """
    rows = []
    for (shape, case), engines in collect(samples).items():
        for engine, by_round in engines.items():
            row: dict[str, Any] = {"shape": shape, "case": case, "engine": engine}
            row |= {"unit": "s" if case.startswith("start") else "tokens/s"}
            row |= spread(list(by_round.values()))
            ours = engines.get(reference, {})
            shared = [number for number in by_round if number in ours]
            if engine != reference and shared:
                ratios = [ours[number] / by_round[number] for number in shared]
                if row["unit"] == "s":
                    ratios = [1 / ratio for ratio in ratios]
                row["ratio"] = spread(ratios)
            rows.append(row)
    return rows


def figure(value: float) -> str:
    """A figure with three significant digits or all of its whole ones."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(headings: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown lines."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def cells(summary: list[dict[str, Any]], shape: str, ratios: bool) -> list[str]:
    """The table of one shape: engines across, cases down, figures or ratios."""
    chosen = [row for row in summary if row["shape"] == shape and (not ratios or "ratio" in row)]
    engines = list(dict.fromkeys(row["engine"] for row in chosen))
    grid: dict[str, dict[str, str]] = defaultdict(dict)
    for row in chosen:
        part = row["ratio"] if ratios else row
        name = f"{row['case']} ({row['unit']})" if not ratios else row["case"]
        low, high = figure(part["min"]), figure(part["max"])
        grid[name][row["engine"]] = f"**{figure(part['median'])}** ({low}–{high})"
    rows = [[name, *(found.get(engine, "–") for engine in engines)] for name, found in grid.items()]
    return table(["case", *engines], rows) if rows else []


def agreement(samples: list[Sample]) -> list[str]:
    """How often two engines chose the same first token after the same prompt (start cases)."""
    chosen: dict[str, dict[tuple[str, int], int]] = defaultdict(dict)
    for sample in samples:
        if "first_token" in sample:
            place = sample["shape"], sample["round"]
            chosen[sample["engine"]][place] = sample["first_token"]
    lines = []
    for one, other in itertools.combinations(chosen, 2):
        shared = chosen[one].keys() & chosen[other].keys()
        same = sum(chosen[one][place] == chosen[other][place] for place in shared)
        lines.append(f"{one} and {other}: {same} of {len(shared)}")
    return lines


def others_line(samples: list[Sample]) -> str:
    """How much of the cores others took while the samples were taken."""
    shares = [sample["others_cpu"] for sample in samples if "others_cpu" in sample]
    if not shares:
        return "not known"
    return f"median {statistics.median(shares):.1%}, worst {max(shares):.1%}"


def markdown(document: dict[str, Any]) -> str:
    """The whole report."""
    machine, settings = document["machine"], document["settings"]
    summary = document["summary"]
    lines = ["# CPU comparison", ""]
    lines += [f"- date: {document['date']}"]
    lines += [
        f"- CPU: {machine['cpu']}, {machine['cores']} cores, family/model/stepping "
        f"{'/'.join(str(part) for part in machine['family_model_stepping'])}, "
        f"{machine['memory_gib']} GiB; {', '.join(machine['flags'])}"
    ]
    lines += [f"- system: {machine['system']}, Python {machine['python']}"]
    lines += [f"- command: `{document['command']}`"]
    lines += [
        f"- {settings['threads']} threads, {settings['rounds']} rounds, engines interleaved, a "
        f"process per engine, round and kind of case; {settings['new_tokens']} new tokens"
        + ("; real-time priority" if settings.get("realtime") else "")
    ]
    lines += [f"- cores taken by others during the samples: {others_line(document['samples'])}"]
    fewest = min((row["rounds"] for row in summary), default=0)
    if fewest < settings["rounds"]:
        lines += [f"- some cases have fewer rounds, at least {fewest} (see the JSON)"]
    for engine, told in document["engines"].items():
        versions = ", ".join(f"{name} {number}" for name, number in told["versions"].items())
        lines += [f"- {engine}: weights {told['weights']}; {versions or 'version not known'}"]
    lines += ["", "Medians over rounds, with minimum and maximum. Random weights, random prompt"]
    lines += ["ids, greedy. `generate bB cC`: B sequences decoded together after prompts of C"]
    lines += ["tokens, the prompt not counted. `prefill N`: one prompt of N tokens, to its first"]
    lines += ["new token. `start N`: from process start to the first new token, model file in the"]
    lines += ["page cache."]
    for shape in dict.fromkeys(row["shape"] for row in summary):
        lines += ["", f"## {shape}", "", *cells(summary, shape, ratios=False)]
        if ratios := cells(summary, shape, ratios=True):
            lines += ["", f"Ratio of {settings['reference']} to each rival, round by round (above"]
            lines += ["1: faster than the rival; median, minimum, maximum):", "", *ratios]
    kernels = {name: told["isa"] for name, told in document["engines"].items() if told.get("isa")}
    if kernels:
        lines += ["", "## Instruction sets", ""]
        for engine, told in kernels.items():
            for label, found in told.items():
                lines += [f"- {engine}, {label}: {isa_text(found)}"]
    if same := agreement(document["samples"]):
        lines += ["", "## Same first token", ""]
        lines += [
            "Engines computing the same function agree except where bfloat16 rounding decides."
        ]
        lines += ["", *(f"- {line}" for line in same)]
    if document["failures"]:
        lines += ["", "## Not measured", ""]
        for failure in document["failures"]:
            lines += [f"- {failure['engine']}, {failure['what']}: {failure['error']}"]
    return "\n".join(lines) + "\n"


def isa_text(found: Any) -> str:
    """A list, a count of kernels or a plain value, as text."""
    if isinstance(found, dict):
        return "; ".join(f"{name} ×{count}" for name, count in sorted(found.items()))
    return ", ".join(map(str, found)) if isinstance(found, list) else str(found)
