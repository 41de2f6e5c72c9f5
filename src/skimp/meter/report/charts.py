"""The page's charts, drawn on matplotlib's axes: a colour a model, the same in all of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from skimp.meter.price import Gain, Price, Row
from skimp.meter.speculation import SpeculationResult

WIDTH = 5.2  # inches of a chart: some 375 CSS pixels, so its letters are the page's size
INK = "#010203"  # stands for the page's text colour until the SVG is inside the page
MARKERS = "osD^vP*X"


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A caption, and what draws the chart on axes."""

    title: str
    draw: Callable[[Any, Price], None]


def charts(price: Price) -> list[Chart]:
    """What there is to show: with several contexts, gains and cache go along them."""
    guesses = [Chart(title="Gain by guesses", draw=_guess_chart)] if price.speculation else []
    if not price.rows:
        return guesses
    found = [Chart(title="Loss against gain", draw=_loss_chart)]
    contexts = [use.context for use in price.base.cache]
    if len(contexts) > 1:
        for asked in dict.fromkeys(gain.result.case.asked_batch for gain in price.base.speed):
            batch = "largest batch" if asked == "max" else f"batch {asked}"
            found.append(
                Chart(title=f"Gain by context, {batch}", draw=partial(_context_chart, asked=asked))
            )
        found.append(Chart(title="Cache of a sequence by context", draw=_cache_chart))
    else:
        found.append(Chart(title="Predicted and achieved gain", draw=_gain_chart))
    found.append(Chart(title="Bytes read for a token", draw=_bytes_chart))
    if any(row.healing for row in price.rows):
        found.append(Chart(title="Healing", draw=_healing_chart))
    return found + guesses


def _loss_chart(axes: Any, price: Price) -> None:
    """A colour a model, a marker a case."""
    for index, row in enumerate(price.rows):
        assert row.comparison is not None
        found = row.comparison.divergence
        low, high = found.ci95
        error = [[max(0.0, found.kl - low)], [max(0.0, high - found.kl)]]
        for gain, marker in zip(row.speed, itertools.cycle(MARKERS)):
            axes.errorbar(
                [gain.gain],
                [found.kl],
                yerr=error,
                fmt=marker,
                color=_colour(index),
                capsize=3,
            )
    axes.axvline(1.0, color=INK, linewidth=0.6, linestyle=":")
    axes.set(xlabel="gain in tokens/s over the base", ylabel="KL to the base, nats/token")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    cases = [gain.result.case for gain in price.base.speed]
    for index, row in enumerate(price.rows):
        axes.plot([], [], linewidth=6, color=_colour(index), label=_short(row.name))
    for case, marker in zip(cases, itertools.cycle(MARKERS)):
        label = f"{case.asked_batch} x {case.context}"
        axes.plot([], [], marker, color=INK, fillstyle="none", label=label)
    _legend(axes)


def _gain_chart(axes: Any, price: Price) -> None:
    labels, achieved, predicted = [], [], []
    for row in price.rows:
        for gain in row.speed:
            labels.append(f"{_short(row.name)}\n{gain.result.case.label}")
            achieved.append(gain.gain)
            predicted.append(gain.predicted)
    places = _lines(axes, labels)
    axes.barh([p - 0.2 for p in places], achieved, 0.4, label="achieved")
    axes.barh([p + 0.2 for p in places], predicted, 0.4, label="predicted")
    axes.axvline(1.0, color=INK, linewidth=0.6, linestyle=":")
    axes.set(xlabel="gain in tokens/s over the base")
    _legend(axes)


def _guess_chart(axes: Any, price: Price) -> None:
    """On each category of prompts, how far rounds lie apart as lines."""
    results = price.speculation
    several = len({found.plain for found in results}) > 1
    labels = [
        f"{_guesser(found)}{f' for {_short(found.plain)}' if several else ''}\n"
        f"{found.category}, {found.batch}, T {found.temperature:g}"
        for found in results
    ]
    places = _lines(axes, labels)
    achieved = [found.gain for found in results]
    apart = [
        [found.gain - min(found.gains) for found in results],
        [max(found.gains) - found.gain for found in results],
    ]
    style = {"error_kw": {"linewidth": 0.8, "ecolor": INK}, "label": "achieved"}
    axes.barh([p - 0.2 for p in places], achieved, 0.4, xerr=apart, **style)
    axes.barh([p + 0.2 for p in places], [f.predicted for f in results], 0.4, label="predicted")
    axes.axvline(1.0, color=INK, linewidth=0.6, linestyle=":")
    axes.set(xlabel="gain in tokens/s over no guesses")
    _legend(axes)


def _guesser(found: SpeculationResult) -> str:
    """Who guesses, and how many tokens at most."""
    who = found.speculate if found.draft_model is None else _short(found.draft_model)
    return f"{who}, {found.longest_draft}"


def _context_chart(axes: Any, price: Price, *, asked: str) -> None:
    """Gains at one batch over the contexts, predicted ones dashed."""

    def along(gains: tuple[Gain, ...]) -> list[Gain]:
        own = [gain for gain in gains if gain.result.case.asked_batch == asked]
        return sorted(own, key=lambda gain: gain.result.case.context)

    for index, row in enumerate(price.rows):
        own = along(row.speed)
        contexts = [gain.result.case.context for gain in own]
        style = {"color": _colour(index), "marker": MARKERS[index % len(MARKERS)]}
        axes.plot(contexts, [gain.gain for gain in own], label=_short(row.name), **style)
        axes.plot(contexts, [gain.predicted for gain in own], "--", fillstyle="none", **style)
    axes.plot([], [], "--", color=INK, label="predicted")
    axes.axhline(1.0, color=INK, linewidth=0.6, linestyle=":")
    axes.set(ylabel="gain in tokens/s over the base")
    axes.set_ylim(bottom=0.0)
    _contexts(axes, price)
    _legend(axes)


def _cache_chart(axes: Any, price: Price) -> None:
    """The pages that one sequence holds, in the colours of the other charts."""
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    rows: list[tuple[Row, str]] = [(price.base, INK)]
    rows += [(row, _colour(index)) for index, row in enumerate(price.rows)]
    for row, colour in rows:
        uses = sorted(row.cache, key=lambda use: use.context)
        axes.plot(
            [use.context for use in uses],
            [use.bytes / 1e6 for use in uses],
            marker=".",
            color=colour,
            label=_short(row.name),
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set(ylabel="MB")
    _contexts(axes, price)
    _legend(axes)


def _contexts(axes: Any, price: Price) -> None:
    """The axis of contexts, each doubling as wide as the others."""
    places = sorted(use.context for use in price.base.cache)
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.minorticks_off()
    axes.set(xlabel="tokens of context")


def _bytes_chart(axes: Any, price: Price) -> None:
    """A step of one sequence at the longest context."""
    rows = (price.base, *price.rows)
    context = max(use.context for use in price.base.cache)
    weights = [row.weight_bytes_per_token / 1e6 for row in rows]
    cache = [
        next(use.bytes_read for use in row.cache if use.context == context) / 1e6 for row in rows
    ]
    places = _lines(axes, [_short(row.name) for row in rows])
    axes.barh(places, weights, 0.6, label="weights, batch 1")
    axes.barh(places, cache, 0.6, left=weights, label=f"cache of {context:,} tokens")
    axes.set(xlabel="MB")
    _legend(axes)


def _healing_chart(axes: Any, price: Price) -> None:
    """A colour a model, as in the chart of losses."""
    for index, row in enumerate(price.rows):
        for curve in row.healing:
            tokens, kls = zip(*curve)
            axes.plot(tokens, kls, color=_colour(index), marker=".", label=_short(row.name))
    axes.set(xlabel="tokens trained on", ylabel="held-out KL to the original, nats/token")
    axes.set_ylim(bottom=0.0)
    _legend(axes)


def _lines(axes: Any, labels: list[str]) -> list[int]:
    """A line of the chart for each label, from the top, and room for all of them."""
    places = list(range(len(labels)))
    axes.figure.set_size_inches(WIDTH, max(3.4, 1.6 + 0.45 * len(labels)))
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    return places


def _legend(axes: Any) -> None:
    """Above the chart, where it hides nothing, and room for its lines."""
    lines = -(-len(axes.get_legend_handles_labels()[1]) // 2)
    width, height = axes.figure.get_size_inches()
    axes.figure.set_size_inches(width, height + 0.2 * max(0, lines - 2))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize="small")


def _colour(index: int) -> str:
    """Of the model in that row."""
    return f"C{index % 10}"


def _short(name: str) -> str:
    """A model's name, and those in its options, without the directories before them."""
    return re.sub(r"[^@=,]*/", "", name.rstrip("/"))
