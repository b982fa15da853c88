"""Line, bar and dot charts and histograms as inline SVG, in the colors of the page they stand in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from unime_st.report.html import Html, element

_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 10, 34  # margins of a chart, in its own units


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


def line_chart(
    lines: Mapping[str, Sequence[tuple[float, float]]], *, x_label: str, width: int = 340, height: int = 190
) -> Html:
    """Draw lines over a common x axis as an ``svg`` element, with points (x, y) by the name of their line.

    Width and height are in the chart's own units; it is scaled to the page. ValueError if there is no point.
    """
    points = [point for line in lines.values() for point in line]
    if not points:
        raise ValueError("a chart needs at least one point")
    across, up = (ticks(min(values), max(values)) for values in zip(*points))

    def to_svg(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - across[0]) / (across[-1] - across[0]) * (width - _LEFT - _RIGHT),
            height - _BOTTOM - (y - up[0]) / (up[-1] - up[0]) * (height - _TOP - _BOTTOM),
        )

    parts = _grid(
        [(to_svg(x, up[0])[0], x) for x in across], [(to_svg(across[0], y)[1], y) for y in up], width, height
    )
    parts.append(element("text", x_label, x=width - _RIGHT, y=height - 4, text_anchor="end"))
    for number, (name, line) in enumerate(lines.items()):
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in (to_svg(*point) for point in line))
        opacity = max(0.35, 1.0 - 0.3 * number)
        stroke = element("polyline", points=drawn, class_="stroke", stroke_opacity=f"{opacity:g}")
        parts.append(element("g", element("title", name), stroke))
    return _svg(parts, width, height, f"lines: {', '.join(lines)}")


def histogram(
    counts: Sequence[int], *, low: float, high: float, x_label: str, width: int = 340, height: int = 170
) -> Html:
    """Draw counts of equal bins from ``low`` to ``high`` as shares of their sum; ValueError if nothing was counted."""
    total = sum(counts)
    if total == 0:
        raise ValueError("a histogram needs at least one count")
    up = ticks(0.0, 100 * max(counts) / total)
    bar, tall, floor = (width - _LEFT - _RIGHT) / len(counts), height - _TOP - _BOTTOM, height - _BOTTOM
    marks = [(_LEFT + share * (width - _LEFT - _RIGHT), low + share * (high - low)) for share in (0.0, 0.5, 1.0)]
    parts = _grid(marks, [(floor - value / up[-1] * tall, value) for value in up], width, height, unit=" %")
    parts.append(element("text", x_label, x=width - _RIGHT, y=height - 4, text_anchor="end"))
    for index, count in enumerate(counts):
        share = 100 * count / total
        size = share / up[-1] * tall
        edges = [low + (high - low) * edge / len(counts) for edge in (index, index + 1)]
        box = {"x": f"{_LEFT + index * bar + 0.5:.1f}", "width": f"{max(bar - 1, 0.5):.1f}"}
        note = element("title", f"{edges[0]:g} to {edges[1]:g}: {count} ({share:.1f} %)")
        rectangle = element("rect", **box, y=f"{floor - size:.1f}", height=f"{size:.1f}", class_="fill")
        parts.append(element("g", note, rectangle))
    return _svg(parts, width, height, f"histogram of {total} values over {x_label}")


def dot_chart(rows: Sequence[tuple[str, Sequence[float], bool]], *, x_label: str, width: int = 640) -> Html:
    """Draw the values of each row as dots, and their mean as a stroke.

    Args:
        rows: Name, values, and whether to draw it in the second color (a control).
        x_label: What the values are.
        width: Width in the chart's own units. Defaults to 640.

    Returns:
        Html: An ``svg`` element.

    Raises:
        ValueError: If a row has no value.
    """
    left, line = 270, 26
    height = line * len(rows) + _TOP + _BOTTOM
    across = ticks(0.0, max(value for _, values, _ in rows for value in values))

    def x_of(value: float) -> float:
        return left + value / across[-1] * (width - left - 2 * _RIGHT)

    parts = _grid([(x_of(value), value) for value in across], [], width, height, vertical=True)
    parts.append(element("text", x_label, x=width - _RIGHT, y=height - 4, text_anchor="end"))
    for number, (name, values, other) in enumerate(rows):
        middle = _TOP + line * number + line / 2
        mean = x_of(sum(values) / len(values))
        parts.append(element("text", name, x=left - 12, y=middle + 4, text_anchor="end", class_="label"))
        parts.append(element("line", x1=mean, x2=mean, y1=middle - 8, y2=middle + 8, class_="tick"))
        for value in values:
            dot = element("circle", cx=x_of(value), cy=middle, r=4, class_="fill other" if other else "fill")
            parts.append(element("g", element("title", f"{value:.1f}"), dot))
    return _svg(parts, width, height, f"{x_label} of {', '.join(name for name, _, _ in rows)}", style="wide")


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

    parts, y = [], _TOP
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
    height = y + _BOTTOM
    axis = _grid([(x_of(value), value) for value in across], [], width, height, vertical=True)
    axis.append(element("text", x_label, x=end, y=height - 4, text_anchor="end"))
    return _svg([*axis, *parts], width, height, f"bars of {x_label}", style="wide")


def _grid(
    across: Sequence[tuple[float, float]],
    up: Sequence[tuple[float, float]],
    width: int,
    height: int,
    *,
    unit: str = "",
    vertical: bool = False,
) -> list[Html]:
    """Grid lines and labels at the given (coordinate, value) of each axis."""
    parts = []
    for x, value in across:
        if vertical:
            parts.append(element("line", x1=x, x2=x, y1=_TOP, y2=height - _BOTTOM, class_="grid"))
        parts.append(element("text", f"{value:g}", x=x, y=height - _BOTTOM + 14, text_anchor="middle"))
    for y, value in up:
        parts.append(element("line", x1=_LEFT, x2=width - _RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(element("text", f"{value:g}{unit}", x=_LEFT - 6, y=y + 4, text_anchor="end"))
    return parts


def _svg(parts: Iterable[Html], width: int, height: int, description: str, *, style: str | None = None) -> Html:
    return element("svg", *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=description, class_=style)
