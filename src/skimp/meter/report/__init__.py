"""The price as a person reads it: on a terminal, in Markdown, and as one page with charts."""

from skimp.meter.report.grid import text_of
from skimp.meter.report.html import write_html
from skimp.meter.report.table import as_markdown, as_text

__all__ = ["as_markdown", "as_text", "text_of", "write_html"]
