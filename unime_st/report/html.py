"""Building blocks of the reports: escaped elements, tables and images that need nothing but a browser."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence

from PIL import Image

from unime_st.data.images import BadImageError, ImageRef
from unime_st.data.items import Item

_VOID = frozenset({"img", "meta"})  # of HTML; SVG elements are closed, or the next ones would fall inside them
_LONG_TEXT = 160

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2126; --muted: #5d6770; --rule: #d9dee3; --soft: #f4f6f8;
  --accent: #1f5fa8; --other: #a05a12; --good: #15703f; --bad: #a8322c; }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --ink: #e4e8ec; --muted: #9aa5af; --rule: #343b43;
  --soft: #1e2329; --accent: #7db4f2; --other: #e0a060; --good: #63cf97; --bad: #f0918a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.75rem 0 .5rem; }
p, li { max-width: 46rem; }
p { margin: .5rem 0; }
.muted, figcaption { color: var(--muted); font-size: .875rem; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td { vertical-align: top; }
tbody th { font-weight: 600; }
tbody th.group { color: var(--muted); font-size: .8rem; padding: .9rem 0 .2rem; text-align: left; }
table.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
thead th { white-space: normal; vertical-align: bottom; }
table.facts th { white-space: normal; min-width: 8rem; font-weight: 400; color: var(--muted); vertical-align: top; }
.spread { color: var(--muted); font-size: .8em; }
td .spread { display: block; line-height: 1.1; }
.best { font-weight: 700; color: var(--accent); }
.best .spread { font-weight: 400; }
.chance { color: var(--bad); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem 1.5rem; }
.charts.four { grid-template-columns: repeat(auto-fill, minmax(14.5rem, 1fr)); }
figure { margin: 0; }
figure + figure { margin-top: 1.25rem; }
.charts figure { margin: 0; }
svg { display: block; width: 100%; height: auto; }
svg.wide { max-width: 46rem; min-width: 32rem; }
svg text { font: 11px system-ui, sans-serif; fill: var(--muted); }
svg text.label { fill: var(--ink); font-size: 12px; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .stroke { fill: none; stroke: var(--accent); stroke-width: 1.75; stroke-linejoin: round; }
svg .fill { fill: var(--accent); }
svg .fill.other { fill: var(--other); }
svg .tick { stroke: var(--ink); stroke-width: 2; }
.card { border: 1px solid var(--rule); border-radius: .5rem; padding: .9rem 1rem; margin: .9rem 0; }
.sides { display: grid; grid-template-columns: minmax(9rem, 1fr) 5fr; gap: .75rem 1.25rem; }
.halves { display: grid; grid-template-columns: minmax(9rem, 1fr) 3fr 3fr; gap: .75rem 1.25rem; }
@media (max-width: 48rem) { .sides, .halves { grid-template-columns: 1fr; } }
.card h4 { margin: 0 0 .4rem; font-size: .8rem; font-weight: 600; color: var(--muted); }
.items { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.4rem, 1fr)); gap: .5rem; }
.items.texts { grid-template-columns: repeat(auto-fill, minmax(8.6rem, 1fr)); }
.item { background: var(--soft); border: 2px solid transparent; border-radius: .4rem; padding: .35rem;
  font-size: .8rem; line-height: 1.35; overflow-wrap: anywhere; }
.item.plain { background: none; border: 0; padding: 0; max-width: 14rem; }
.item img { display: block; width: 84px; height: auto; border-radius: .2rem; margin-bottom: .3rem;
  outline: 1px solid var(--rule); }
.item .facts { color: var(--muted); font-variant-numeric: tabular-nums; }
.item.good { border-color: var(--good); }
.item.bad { border-color: var(--bad); border-style: dashed; }
.item b.good { color: var(--good); }
.item b.bad { color: var(--bad); }
summary { cursor: pointer; }
code { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .9em; overflow-wrap: anywhere; }
"""


class Html(str):
    """Text that is HTML already. Whatever is not of this type is escaped where it enters a page."""


Content = object
"""What may stand inside an element: :class:`Html`, or anything else, whose ``str`` is escaped."""


def join(parts: Iterable[Content], separator: str = "") -> Html:
    """Put parts one after the other, escaping those that are not :class:`Html`.

    Args:
        parts: What to join; None is left out.
        separator: Text between the parts, escaped as well. Defaults to nothing.

    Returns:
        Html: The joined parts.
    """
    escaped = (part if isinstance(part, Html) else html.escape(str(part)) for part in parts if part is not None)
    return Html(html.escape(separator).join(escaped))


def element(tag: str, *children: Content, **attributes: object) -> Html:
    """Write one element.

    Args:
        tag: Its name.
        *children: What stands inside.
        **attributes: Its attributes; a trailing underscore is dropped (``class_``), other underscores become hyphens.
            None leaves an attribute out.

    Returns:
        Html: The element, content and attributes escaped.

    Example:
        >>> from unime_st.report.html import element
        >>> print(element("p", "a < b", element("b", "!"), class_="x"))
        <p class="x">a &lt; b<b>!</b></p>
    """
    given = ((name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items() if value is not None)
    start = "".join([tag, *(f' {name}="{html.escape(str(value))}"' for name, value in given)])
    return Html(f"<{start}>" if tag in _VOID else f"<{start}>{join(children)}</{tag}>")


def page(title: str, *body: Content) -> str:
    """Write a whole page, which loads nothing from anywhere.

    Args:
        title: Title of the page.
        *body: Its content.

    Returns:
        str: The document.
    """
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = join(
        [
            element("meta", charset="utf-8"),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", http_equiv="Content-Security-Policy", content=policy),
            element("title", title),
            element("style", Html(STYLE)),
        ],
        "\n",
    )
    content = Html("\n" + join(body, "\n") + "\n")
    document = element("html", Html("\n"), element("head", head), Html("\n"), element("body", content), lang="en")
    return f"<!DOCTYPE html>\n{document}\n"


def table(
    head: Sequence[Content], groups: Iterable[tuple[str, Iterable[Sequence[Content]]]], *, caption: Content = None
) -> Html:
    """Write a table that scrolls by itself where the screen is narrow.

    Args:
        head: Titles of the columns; the first column names the rows.
        groups: Title of a group of rows ("" for none), and its rows.
        caption: What the table shows.

    Returns:
        Html: The table.
    """
    bodies = []
    for label, rows in groups:
        lines = [element("tr", element("th", label, colspan=len(head), class_="group"))] if label else []
        for first, *cells in rows:
            lines.append(element("tr", element("td", first), *(element("td", cell) for cell in cells)))
        bodies.append(element("tbody", *lines))
    titles = element("thead", element("tr", *(element("th", title, scope="col") for title in head)))
    above = None if caption is None else element("figcaption", caption)
    return element("figure", above, element("div", element("table", titles, *bodies), class_="scroll"))


def facts(content: Mapping[str, Content]) -> Html:
    """Write names and values below each other.

    Args:
        content: Values by name.

    Returns:
        Html: A table of two columns.
    """
    rows = (element("tr", element("th", name, scope="row"), element("td", value)) for name, value in content.items())
    return element("div", element("table", element("tbody", *rows), class_="facts"), class_="scroll")


def embed_image(image: ImageRef, *, side: int = 168) -> Html:
    """Embed an image in the page; one that cannot be read is replaced by the reason.

    Args:
        image: The image.
        side: Longest side in pixels; larger ones are shrunk. Defaults to 168, twice what is shown.

    Returns:
        Html: An ``img`` element with a data URI.
    """
    try:
        pixels = image.open()
    except BadImageError as error:
        return element("i", str(error))
    pixels.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    pixels.save(buffer, "PNG", optimize=True)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    width, height = pixels.size
    return element("img", src=f"data:image/png;base64,{encoded}", width=width, height=height, alt="image")


def show_items(items: Iterable[tuple[Item, Sequence[Content], str]]) -> Html:
    """Show items in a row that breaks where the page ends.

    Args:
        items: For each item what :func:`show_item` takes.

    Returns:
        Html: Boxes of the same width, wider if there are texts among them.
    """
    items = list(items)
    style = "items texts" if any(item.text for item, _, _ in items) else "items"
    return element("div", *(show_item(item, *below, style=look) for item, below, look in items), class_=style)


def show_item(item: Item, *below: Content, style: str = "") -> Html:
    """Show an item: its image, its text (a long one folded), and what is to be said about it.

    Args:
        item: The item.
        *below: Lines below it.
        style: Further CSS classes, such as "good" or "plain".

    Returns:
        Html: A box.
    """
    text = item.text
    shown: Content = None if text is None else element("div", text)
    if text is not None and len(text) > _LONG_TEXT:
        shown = element("details", element("summary", text[: _LONG_TEXT - 20].rstrip() + " …"), text)
    image = None if item.image is None else embed_image(item.image)
    return element("div", image, shown, *below, class_=f"item {style}".rstrip())
