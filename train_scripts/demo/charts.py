"""Chart of differences with error bars, as inline SVG in the colors of the report."""

from __future__ import annotations

from collections.abc import Sequence

from unime_st.report.charts import BOTTOM, RIGHT, TOP, grid, svg, ticks
from unime_st.report.html import Html, element


def difference_chart(rows: Sequence[tuple[str, float, float]], *, x_label: str, width: int = 680) -> Html:
    """Draw a dot with an error bar for each row, and a stroke at zero.

    Args:
        rows: Name, value and error.
        x_label: What the values are.
        width: Width in the chart's own units. Defaults to 680.

    Returns:
        Html: An ``svg`` element.
    """
    left, line = 330, 26
    height = line * len(rows) + TOP + BOTTOM
    ends = [end for _, value, error in rows for end in (value - error, value + error)]
    across = ticks(min(0.0, *ends), max(0.0, *ends))

    def x_of(value: float) -> float:
        return round(left + (value - across[0]) / (across[-1] - across[0]) * (width - left - 2 * RIGHT), 1)

    parts = grid([(x_of(value), value) for value in across], height)
    parts.append(element("line", x1=x_of(0), x2=x_of(0), y1=TOP, y2=height - BOTTOM, class_="tick"))
    parts.append(element("text", x_label, x=width - RIGHT, y=height - 4, text_anchor="end"))
    for number, (name, value, error) in enumerate(rows):
        y = TOP + line * number + line / 2
        bar = element("line", x1=x_of(value - error), x2=x_of(value + error), y1=y, y2=y, class_="stroke")
        dot = element("circle", cx=x_of(value), cy=y, r=4, class_="fill")
        parts.append(element("text", name, x=left - 12, y=y + 4, text_anchor="end", class_="label"))
        parts.append(element("g", element("title", f"{name}: {value:+.1f} ± {error:.1f}"), bar, dot))
    return svg(parts, width, height, f"{x_label} of {', '.join(name for name, _, _ in rows)}", style="wide")
