"""Griffe extension: docstrings in the form of Sentence Transformers (Sphinx) as Markdown for the API reference."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:command|class|func|meth|mod|attr|data|obj|exc):`~?(?:[\w.]+\.)?([\w() ]+)(?: <[^>]+>)?`")


class SphinxToMarkdown(griffe.Extension):
    """Sphinx roles become code, `Example:` the section that griffe knows, `::` an indented block."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of every object.

        Args:
            obj: The object.
        """
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
            text = re.sub(r"^( *)::$", "", text, flags=re.M)
            text = re.sub(r"::$", ":", text, flags=re.M)
            obj.docstring.value = _ROLE.sub(r"`\1`", text)
