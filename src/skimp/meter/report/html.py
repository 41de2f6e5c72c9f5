"""One page with tables and charts that loads nothing: charts are SVG inside it."""

from __future__ import annotations

import io
import re
from html import escape
from pathlib import Path
from typing import Any

from skimp.errors import OptionError
from skimp.meter.price import Price
from skimp.meter.report.table import Table, tables

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
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; white-space: nowrap; }}
th, td {{ padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }}
th:first-child, td:first-child {{ text-align: left; }}
td {{ font-variant-numeric: tabular-nums; }}
.charts {{ display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); }}
figure {{ margin: 0; }}
svg {{ width: 100%; height: auto; }}
p {{ max-width: 60rem; }}
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
    charts = (
        ("Loss against gain", _loss_chart),
        ("Predicted and achieved gain", _gain_chart),
        ("Bytes read for a token", _bytes_chart),
    )
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
    head = "".join(f"<th>{escape(c)}</th>" for c in table.columns)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in table.rows
    )
    return (
        f'<h2>{escape(table.title)}</h2>\n<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"\n<tbody>{body}</tbody></table></div>\n<p>{escape(table.note)}</p>"
    )


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
        figure = Figure(figsize=(6, 4), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots(), price)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return text.replace(INK, "currentColor")


def _loss_chart(axes: Any, price: Price) -> None:
    for row in price.rows:
        assert row.comparison is not None
        found = row.comparison.divergence
        low, high = found.ci95
        error = [[max(0.0, found.kl - low)], [max(0.0, high - found.kl)]]
        for gain in row.speed:
            case = gain.result.case
            label = f"{row.name}, {case.batch} x {case.context}"
            axes.errorbar([gain.gain], [found.kl], yerr=error, fmt="o", capsize=3, label=label)
    axes.axvline(1.0, color=INK, linewidth=0.6, linestyle=":")
    axes.set(xlabel="gain in tokens/s over the base", ylabel="KL to the base, nats per token")
    axes.legend(fontsize="small")


def _gain_chart(axes: Any, price: Price) -> None:
    labels, achieved, predicted = [], [], []
    for row in price.rows:
        for gain in row.speed:
            case = gain.result.case
            labels.append(f"{row.name}\n{case.batch} x {case.context}")
            achieved.append(gain.gain)
            predicted.append(gain.predicted)
    places = range(len(labels))
    axes.bar([p - 0.2 for p in places], achieved, 0.4, label="achieved")
    axes.bar([p + 0.2 for p in places], predicted, 0.4, label="predicted")
    axes.axhline(1.0, color=INK, linewidth=0.6, linestyle=":")
    axes.set_xticks(list(places), labels, fontsize="small")
    axes.set(ylabel="gain over the base")
    axes.legend(fontsize="small")


def _bytes_chart(axes: Any, price: Price) -> None:
    rows = (price.base, *price.rows)
    case = price.base.speed[0].result.case
    places = list(range(len(rows)))
    weights = [row.weight_bytes_per_token / 1e6 for row in rows]
    cache = [row.cache_bytes_per_token * case.context / 1e6 for row in rows]
    axes.bar(places, weights, 0.6, label="weights, batch 1")
    axes.bar(places, cache, 0.6, bottom=weights, label=f"cache of {case.context} tokens")
    axes.set_xticks(places, [row.name for row in rows], fontsize="small")
    axes.set(ylabel="MB")
    axes.legend(fontsize="small")
