"""HTML pages and SVG charts for reports."""

from __future__ import annotations
