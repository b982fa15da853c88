"""Line and dot charts and histograms of the demo's report, as inline SVG in the colors of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unime_st.report.charts import BOTTOM, LEFT, RIGHT, TOP, grid, svg, ticks
from unime_st.report.html import Html, element


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
            LEFT + (x - across[0]) / (across[-1] - across[0]) * (width - LEFT - RIGHT),
            height - BOTTOM - (y - up[0]) / (up[-1] - up[0]) * (height - TOP - BOTTOM),
        )

    parts = grid([(to_svg(x, up[0])[0], x) for x in across], [(to_svg(across[0], y)[1], y) for y in up], width, height)
    parts.append(element("text", x_label, x=width - RIGHT, y=height - 4, text_anchor="end"))
    for number, (name, line) in enumerate(lines.items()):
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in (to_svg(*point) for point in line))
        opacity = max(0.35, 1.0 - 0.3 * number)
        stroke = element("polyline", points=drawn, class_="stroke", stroke_opacity=f"{opacity:g}")
        parts.append(element("g", element("title", name), stroke))
    return svg(parts, width, height, f"lines: {', '.join(lines)}")


def histogram(
    counts: Sequence[int], *, low: float, high: float, x_label: str, width: int = 340, height: int = 170
) -> Html:
    """Draw counts of equal bins from ``low`` to ``high`` as shares of their sum; ValueError if nothing was counted."""
    total = sum(counts)
    if total == 0:
        raise ValueError("a histogram needs at least one count")
    up = ticks(0.0, 100 * max(counts) / total)
    bar, tall, floor = (width - LEFT - RIGHT) / len(counts), height - TOP - BOTTOM, height - BOTTOM
    marks = [(LEFT + share * (width - LEFT - RIGHT), low + share * (high - low)) for share in (0.0, 0.5, 1.0)]
    parts = grid(marks, [(floor - value / up[-1] * tall, value) for value in up], width, height, unit=" %")
    parts.append(element("text", x_label, x=width - RIGHT, y=height - 4, text_anchor="end"))
    for index, count in enumerate(counts):
        share = 100 * count / total
        size = share / up[-1] * tall
        edges = [low + (high - low) * edge / len(counts) for edge in (index, index + 1)]
        box = {"x": f"{LEFT + index * bar + 0.5:.1f}", "width": f"{max(bar - 1, 0.5):.1f}"}
        note = element("title", f"{edges[0]:g} to {edges[1]:g}: {count} ({share:.1f} %)")
        rectangle = element("rect", **box, y=f"{floor - size:.1f}", height=f"{size:.1f}", class_="fill")
        parts.append(element("g", note, rectangle))
    return svg(parts, width, height, f"histogram of {total} values over {x_label}")


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
    height = line * len(rows) + TOP + BOTTOM
    across = ticks(0.0, max(value for _, values, _ in rows for value in values))

    def x_of(value: float) -> float:
        return left + value / across[-1] * (width - left - 2 * RIGHT)

    parts = grid([(x_of(value), value) for value in across], [], width, height, vertical=True)
    parts.append(element("text", x_label, x=width - RIGHT, y=height - 4, text_anchor="end"))
    for number, (name, values, other) in enumerate(rows):
        middle = TOP + line * number + line / 2
        mean = x_of(sum(values) / len(values))
        parts.append(element("text", name, x=left - 12, y=middle + 4, text_anchor="end", class_="label"))
        parts.append(element("line", x1=mean, x2=mean, y1=middle - 8, y2=middle + 8, class_="tick"))
        for value in values:
            dot = element("circle", cx=x_of(value), cy=middle, r=4, class_="fill other" if other else "fill")
            parts.append(element("g", element("title", f"{value:.1f}"), dot))
    return svg(parts, width, height, f"{x_label} of {', '.join(name for name, _, _ in rows)}", style="wide")
