"""
Reports of run folders: the same tables on the console and in one self-contained HTML page, with plots and examples.
"""

from __future__ import annotations

from lmmhooks_eval.report.console import print_report
from lmmhooks_eval.report.html import write_html
from lmmhooks_eval.report.view import RunView, load_view

__all__ = ["RunView", "load_view", "print_report", "write_html"]
