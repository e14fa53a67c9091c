"""One HTML file about one run or several: `mosaicbert report`, and `write_report` in code."""

from mosaicbert.report.command import add_arguments, main, report_at_end, write_report

__all__ = ["add_arguments", "main", "report_at_end", "write_report"]
