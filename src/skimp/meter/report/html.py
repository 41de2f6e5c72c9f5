"""One page with tables and charts that loads nothing: charts are SVG inside it."""

from __future__ import annotations

import io
import re
from html import escape
from pathlib import Path
from typing import Any

from skimp.errors import OptionError
from skimp.meter.price import Price
from skimp.meter.report.charts import INK, WIDTH, Chart, charts
from skimp.meter.report.grid import Table, parted
from skimp.meter.report.table import tables

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
    guessing = dict.fromkeys(found.name for found in price.speculation)
    names = ", ".join([*(row.name for row in price.rows), *guessing])
    page = _PAGE.format(
        title=escape(f"{price.base.name} against {names}"),
        tables="\n".join(map(_table, tables(price))),
        charts="\n".join(
            f"<figure><figcaption>{escape(chart.title)}</figcaption>\n{_svg(chart, price)}</figure>"
            for chart in charts(price)
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


def _svg(chart: Chart, price: Price) -> str:
    """The chart as an ``<svg>`` element in the page's colours, with nothing to load."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    colours = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    )
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": chart.title, **colours}
    style |= {"figure.facecolor": "none", "axes.facecolor": "none", "legend.framealpha": 0.0}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        FigureCanvasSVG(figure)
        chart.draw(figure.subplots(), price)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return text.replace(INK, "currentColor")
