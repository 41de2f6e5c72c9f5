"""One page with tables and charts that loads nothing: charts are SVG inside it."""

from __future__ import annotations

import io
import itertools
import re
from html import escape
from pathlib import Path
from typing import Any

from skimp.errors import OptionError
from skimp.meter.price import Price
from skimp.meter.report.table import Table, parted, tables

WIDTH = 5.2  # inches of a chart: some 375 CSS pixels, so its letters are the page's size
INK = "#010203"  # stands for the page's text colour until the SVG is inside the page

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>skimp price: {title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --line: #d4d4d4; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e8e8e8; --paper: #16181c; --line: #3b3f46; }}
}}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 0 auto; padding: 1rem; max-width: 76rem; }}
h1 {{ font-size: 1.5rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.15rem; margin: 2rem 0 .5rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }}
th {{ vertical-align: bottom; }}
td {{ font-variant-numeric: tabular-nums; vertical-align: top; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; min-width: 7rem; white-space: normal;
  overflow-wrap: break-word; }}
small {{ opacity: .75; white-space: nowrap; }}
td small {{ display: block; }}
@media (max-width: 48rem) {{
  thead {{ display: none; }}
  table, tbody, tr, td {{ display: block; }}
  tr {{ padding: .5rem 0; border-bottom: 1px solid var(--line); }}
  td {{ display: flex; justify-content: space-between; gap: 1rem; padding: .1rem 0; border: 0; }}
  td:first-child {{ font-weight: 600; overflow-wrap: anywhere; }}
  td:not(:first-child)::before {{ content: attr(data-label); opacity: .75; text-align: left; }}
  td:empty {{ display: none; }}
  td span {{ text-align: right; }}
}}
.charts {{ display: grid; gap: 1.5rem; margin-top: 2rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }}
figure {{ margin: 0; }}
figcaption {{ font-weight: 600; }}
svg {{ width: 100%; height: auto; max-width: 36rem; }}
p {{ max-width: 60rem; opacity: .85; font-size: .9rem; }}
</style></head><body>
<h1>{title}</h1>
{tables}
<div class="charts">
{charts}
</div>
</body></html>
"""


def require_charts() -> None:
    """Raise OptionError, naming what to install, where charts cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise OptionError("html: charts need matplotlib: pip install skimp[report]") from None


def write_html(price: Price, file: Path) -> None:
    """Write the page. Raises OptionError where matplotlib is missing."""
    require_charts()
    charts = [
        ("Loss against gain", _loss_chart),
        ("Predicted and achieved gain", _gain_chart),
        ("Bytes read for a token", _bytes_chart),
    ]
    if any(row.healing for row in price.rows):
        charts.append(("Healing", _healing_chart))
    names = ", ".join(row.name for row in price.rows)
    page = _PAGE.format(
        title=escape(f"{price.base.name} against {names}"),
        tables="\n".join(map(_table, tables(price))),
        charts="\n".join(
            f"<figure><figcaption>{title}</figcaption>\n{_svg(draw, price)}</figure>"
            for title, draw in charts
        ),
    )
    file.write_text(page, encoding="utf-8")


def _table(table: Table) -> str:
    head = "".join(f"<th>{_cell(c)}</th>" for c in table.columns)
    body = "\n".join(
        "<tr>"
        + "".join(
            f'<td data-label="{escape(name)}">{_cell(c)}</td>' if c else "<td></td>"
            for name, c in zip(table.columns, row)
        )
        + "</tr>"
        for row in table.rows
    )
    return (
        f'<h2>{escape(table.title)}</h2>\n<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"\n<tbody>{body}</tbody></table></div>\n<p>{escape(table.note)}</p>"
    )


def _cell(text: str) -> str:
    """A figure, and in a line of its own what is in brackets after it: an interval."""
    figure, interval = parted(text)
    small = f" <small>{escape(interval)}</small>" if interval else ""
    return f"<span>{escape(figure)}{small}</span>"


def _svg(draw: Any, price: Price) -> str:
    """The chart as an ``<svg>`` element in the page's colours, with nothing to load."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    colours = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    )
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": draw.__name__, **colours}
    style |= {"figure.facecolor": "none", "axes.facecolor": "none", "legend.framealpha": 0.0}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots(), price)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return text.replace(INK, "currentColor")


def _loss_chart(axes: Any, price: Price) -> None:
    """A colour a model, a marker a case."""
    for index, row in enumerate(price.rows):
        assert row.comparison is not None
        found = row.comparison.divergence
        low, high = found.ci95
        error = [[max(0.0, found.kl - low)], [max(0.0, high - found.kl)]]
        for gain, marker in zip(row.speed, itertools.cycle("osD^vP*X")):
            case = gain.result.case
            axes.errorbar(
                [gain.gain],
                [found.kl],
                yerr=error,
                fmt=marker,
                color=f"C{index % 10}",
                capsize=3,
                label=f"{_short(row.name)}, {case.batch} x {case.context}",
            )
    axes.axvline(1.0, color=INK, linewidth=0.6, linestyle=":")
    axes.set(xlabel="gain in tokens/s over the base", ylabel="KL to the base, nats/token")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    _legend(axes)


def _gain_chart(axes: Any, price: Price) -> None:
    labels, achieved, predicted = [], [], []
    for row in price.rows:
        for gain in row.speed:
            case = gain.result.case
            labels.append(f"{_short(row.name)}\n{case.batch} x {case.context}")
            achieved.append(gain.gain)
            predicted.append(gain.predicted)
    places = _lines(axes, labels)
    axes.barh([p - 0.2 for p in places], achieved, 0.4, label="achieved")
    axes.barh([p + 0.2 for p in places], predicted, 0.4, label="predicted")
    axes.axvline(1.0, color=INK, linewidth=0.6, linestyle=":")
    axes.set(xlabel="gain in tokens/s over the base")
    _legend(axes)


def _bytes_chart(axes: Any, price: Price) -> None:
    rows = (price.base, *price.rows)
    case = price.base.speed[0].result.case
    weights = [row.weight_bytes_per_token / 1e6 for row in rows]
    cache = [row.cache_bytes_per_token * case.context / 1e6 for row in rows]
    places = _lines(axes, [_short(row.name) for row in rows])
    axes.barh(places, weights, 0.6, label="weights, batch 1")
    axes.barh(places, cache, 0.6, left=weights, label=f"cache of {case.context} tokens")
    axes.set(xlabel="MB")
    _legend(axes)


def _healing_chart(axes: Any, price: Price) -> None:
    """A colour a model, as in the chart of losses."""
    for index, row in enumerate(price.rows):
        for curve in row.healing:
            tokens, kls = zip(*curve)
            axes.plot(tokens, kls, color=f"C{index % 10}", marker=".", label=_short(row.name))
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
    """Above the chart, where it hides nothing."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize="small")


def _short(name: str) -> str:
    """A model's name without the directories before it."""
    return name.rstrip("/").rpartition("/")[2]
