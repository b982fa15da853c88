"""Bar charts as inline SVG, in the colors of the page they stand in, and the parts of other charts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from unime_st.report.html import Html, element

RIGHT, TOP, BOTTOM = 10, 10, 34  # margins of a chart, in its own units


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` round steps for an axis: the first not above ``low``, the last not below ``high``.

    Example:
        >>> from unime_st.report.charts import ticks
        >>> ticks(0.0, 37.0)
        [0.0, 10.0, 20.0, 30.0, 40.0]
    """
    raw = (high - low) / count or abs(high) / count or 1.0
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * index, 12) for index in range(first, max(last, first + 1) + 1)]


def bar_chart(
    groups: Sequence[tuple[str, Sequence[tuple[str, float, float | None]]]],
    *,
    x_label: str,
    high: float | None = None,
    width: int = 720,
) -> Html:
    """Draw groups of horizontal bars, a stroke at the value that each is to be compared with.

    Args:
        groups: Name of each group and its bars: name, value, and what to compare it with (None for nothing).
        x_label: What the values are.
        high: Right end of the axis; None takes the largest value.
        width: Width in the chart's own units.
    """
    bars = [bar for _, found in groups for bar in found]
    if not bars:
        raise ValueError("a bar chart needs at least one bar")
    left, line, gap = 250, 17, 24
    largest = max(max(value, beside or 0.0) for _, value, beside in bars)
    across = ticks(0.0, high if high is not None else largest)
    end = width - 60  # room for the number behind a bar

    def x_of(value: float) -> float:
        return round(left + value / across[-1] * (end - left), 1)

    parts, y = [], TOP
    for name, found in groups:
        parts.append(element("text", name, x=0, y=y + 15, class_="label"))
        y += gap - line if len(found) == 1 else gap
        for label, value, beside in found:
            bar = element("rect", x=left, y=y + 2, width=max(x_of(value) - left, 0.5), height=line - 5, class_="fill")
            shown = [element("title", f"{name}, {label}: {value:.1f}"), bar]
            number = x_of(value)
            if beside is not None:
                at = x_of(beside)
                shown.append(element("line", x1=at, x2=at, y1=y, y2=y + line - 1, class_="tick"))
                number = at if number <= at < number + 40 else number  # not across the stroke
            parts.append(element("text", label, x=left - 8, y=y + 12, text_anchor="end"))
            parts.append(element("text", f"{value:.1f}", x=number + 6, y=y + 12))
            parts.append(element("g", *shown))
            y += line
        y += 6
    height = y + BOTTOM
    axis = grid([(x_of(value), value) for value in across], height)
    axis.append(element("text", x_label, x=end, y=height - 4, text_anchor="end"))
    return svg([*axis, *parts], width, height, f"bars of {x_label}", style="wide")


def grid(across: Sequence[tuple[float, float]], height: int) -> list[Html]:
    """Vertical grid lines with their labels, at the given (x, value)."""
    parts = []
    for x, value in across:
        parts.append(element("line", x1=x, x2=x, y1=TOP, y2=height - BOTTOM, class_="grid"))
        parts.append(element("text", f"{value:g}", x=x, y=height - BOTTOM + 14, text_anchor="middle"))
    return parts


def svg(parts: Iterable[Html], width: int, height: int, description: str, *, style: str | None = None) -> Html:
    """Chart of some parts, described for screen readers."""
    return element("svg", *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=description, class_=style)
