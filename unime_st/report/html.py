"""Building blocks of the reports: escaped elements, tables and images that need nothing but a browser."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from unime_st.data.images import BadImageError, ImageRef
from unime_st.data.items import Item
from unime_st.data.videos import VideoRef

_VOID = frozenset({"img", "meta"})  # of HTML; SVG elements are closed, or the next ones would fall inside them
_LONG_TEXT = 160
STYLE = Path(__file__).with_name("style.css")


class Html(str):
    """Text that is HTML already. Whatever is not of this type is escaped where it enters a page."""


Content = object
"""What may stand inside an element: :class:`Html`, or anything else, whose ``str`` is escaped."""


def join(parts: Iterable[Content], separator: str = "") -> Html:
    """Join parts, escaping those that are not :class:`Html`; None is left out."""
    escaped = (part if isinstance(part, Html) else html.escape(str(part)) for part in parts if part is not None)
    return Html(html.escape(separator).join(escaped))


def element(tag: str, *children: Content, **attributes: object) -> Html:
    """Write one element, its content and attributes escaped.

    A trailing underscore of an attribute is dropped (``class_``), others become hyphens; None leaves it out.

    Example:
        >>> from unime_st.report.html import element
        >>> print(element("p", "a < b", element("b", "!"), class_="x"))
        <p class="x">a &lt; b<b>!</b></p>
    """
    given = ((name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items() if value is not None)
    start = "".join([tag, *(f' {name}="{html.escape(str(value))}"' for name, value in given)])
    return Html(f"<{start}>" if tag in _VOID else f"<{start}>{join(children)}</{tag}>")


def page(title: str, *body: Content) -> str:
    """Write a whole page, which loads nothing from anywhere."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = join(
        [
            element("meta", charset="utf-8"),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", http_equiv="Content-Security-Policy", content=policy),
            element("title", title),
            element("style", Html(f"\n{STYLE.read_text(encoding='utf-8')}")),
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

    The first column names the rows. A group is its title ("" for none) and its rows.
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
    """Write names and values below each other."""
    rows = (element("tr", element("th", name, scope="row"), element("td", value)) for name, value in content.items())
    return element("div", element("table", element("tbody", *rows), class_="facts"), class_="scroll")


def embed_image(image: ImageRef, *, side: int = 168) -> Html:
    """Embed an image, shrunk to ``side`` pixels, as a data URI; one that cannot be read is replaced by the reason."""
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


def embed_frames(video: VideoRef) -> Html:
    """Embed the sampled frames of a video as a strip; one that cannot be decoded is replaced by the reason."""
    try:
        frames = video.stored_frames()
    except (BadImageError, ImportError) as error:
        return element("i", str(error))
    return element("div", *(embed_image(frame, side=84) for frame in frames))


def show_items(items: Iterable[tuple[Item, Sequence[Content], str]]) -> Html:
    """Show items, each with what :func:`show_item` takes, in a row that breaks where the page ends."""
    items = list(items)
    style = "items texts" if any(item.text for item, _, _ in items) else "items"
    return element("div", *(show_item(item, *below, style=look) for item, below, look in items), class_=style)


def show_item(item: Item, *below: Content, style: str = "") -> Html:
    """Show an item: its image, the frames of its video, its text (a long one folded), and lines below it.

    ``style`` are further CSS classes.
    """
    text = item.text
    shown: Content = None if text is None else element("div", text)
    if text is not None and len(text) > _LONG_TEXT:
        shown = element("details", element("summary", text[: _LONG_TEXT - 20].rstrip() + " …"), text)
    image = None if item.image is None else embed_image(item.image)
    strip = None if item.video is None else embed_frames(item.video)
    return element("div", image, strip, shown, *below, class_=f"item {style}".rstrip())
