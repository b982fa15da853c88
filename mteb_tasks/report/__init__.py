"""``unime report``: scores of several models beside the published ones, as one page, a Markdown and a CSV file."""

from __future__ import annotations

from mteb_tasks.report.writing import write_report

__all__ = ["write_report"]
