"""Figure of the README: the models of the recorded demo beside the control, as an SVG file.

python -m train_scripts.demo.figure
"""

from __future__ import annotations

from pathlib import Path

from train_scripts.demo.report import model_chart
from train_scripts.demo.results import DemoResults
from unime_st.files import read_json
from unime_st.report.html import STYLE, element

ROOT = Path(__file__).resolve().parents[2]
RECORD, FIGURE = ROOT / "benchmarks" / "results" / "demo.json", ROOT / "docs" / "images" / "demo.svg"
_RULES = (":root", "  --accent: #1f5fa8", "svg ")  # beginnings of the lines of the report's style that the chart needs


def figure(results: DemoResults) -> str:
    """The chart of the report with its light colors and a background, for pages of any color."""
    rules = [line for line in STYLE.read_text(encoding="utf-8").splitlines() if line.startswith(_RULES)]
    background = element("rect", width="100%", height="100%", fill="#fff")
    opening, rest = model_chart(results).split(">", 1)
    start = opening.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"') + ">"
    return "\n".join([start, "<style>", *rules, "</style>", background + rest, ""])


if __name__ == "__main__":
    FIGURE.write_text(figure(DemoResults(read_json(RECORD))), encoding="utf-8")
