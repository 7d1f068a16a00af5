"""A run directory in, one self-contained page out. No torch: a report can be made on any machine that holds the files."""

from varl.report.compare import compare, compare_text
from varl.report.page import write_report

__all__ = ["compare", "compare_text", "write_report"]
