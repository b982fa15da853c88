"""Gallery of search results as an HTML page that works offline, with embedded thumbnails."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from unime_st.data.items import Item
from unime_st.files import atomic_write
from unime_st.report.html import element, page, show_item, show_items


def write_gallery(path: str | Path, results: Iterable[tuple[Item, Sequence[tuple[str, float, Item]]]]) -> None:
    """Write the results of searches as an HTML page.

    Args:
        path: The file to write.
        results: Each query, and the id, score and item of its results, best first.

    Example:
        >>> from unime_st import Item
        >>> from unime_st.report.gallery import write_gallery
        >>> write_gallery("gallery.html", [(Item("a star"), [("star.png", 0.9, Item("a blue star"))])])
    """
    sections = []
    for query, hits in results:
        shown = [
            (item, [element("div", name), element("div", f"{score:.4f}", class_="facts")], "")
            for name, score, item in hits
        ]
        sections += [element("h2", "Query"), show_item(query, style="plain"), element("h2", "Results")]
        sections.append(show_items(shown) if shown else element("p", "no results"))
    with atomic_write(path) as temporary:
        temporary.write_text(page("Search results", element("h1", "Search results"), *sections), encoding="utf-8")
