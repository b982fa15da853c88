"""Section of the report: scores of MMEB-V2 beside published models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mteb_tasks.mmeb_v2.comparison import ComparedRow, compared_rows, missing_tasks, profiles_of, published_models
from mteb_tasks.report.result_reader import ModelResults
from unime_st.report.html import Content, Html, element, table

_NOTE = (
    "Published models were each run with their own prompts. The column official has the nDCG of the released evaluation "
    "code where it differs from the correct one; published scores were made with it."
)


def published_section(models: Sequence[ModelResults]) -> Iterator[Html]:
    """Table of each model's scores on MMEB-V2 with published models beside them.

    Args:
        models: Results.
    """
    found = list(_compared(models))
    if not found:
        return
    yield element("h2", "MMEB-V2 beside published models")
    yield element("p", _NOTE)
    groups: list[tuple[str, list[list[Content]]]] = [
        (title, [[row.name, *_cells(row, "–")] for row in rows]) for title, rows in found
    ]
    yield table(["task", "score", "official", *(model.label for model in published_models())], groups)
    sources = [element("li", f"{model.label}: {model.name}, {model.source}") for model in published_models()]
    yield element("details", element("summary", "Sources"), element("ul", *sources))


def published_markdown(models: Sequence[ModelResults]) -> list[str]:
    """The same as lines of Markdown.

    Args:
        models: Results.
    """
    lines = []
    for title, rows in _compared(models):
        labels = [published.label for published in published_models()]
        lines += ["", f"## MMEB-V2: {title}", "", _NOTE, ""]
        lines.append("| task | score | official | " + " | ".join(labels) + " |")
        lines.append("|---|" + "---:|" * (2 + len(labels)))
        lines += [f"| {row.name} | " + " | ".join(_cells(row, "")) + " |" for row in rows]
    return lines


def _compared(models: Sequence[ModelResults]) -> Iterator[tuple[str, list[ComparedRow]]]:
    """Title and rows of each model and profile."""
    for model in models:
        for profile in profiles_of(model.scores):
            rows = compared_rows(model.scores, profile)
            missing = missing_tasks(rows)
            note = f" (no overall score: {missing} of 78 tasks are missing)" if missing else ""
            yield f"{model.label}, profile {profile}{note}", rows


def _cells(row: ComparedRow, empty: str) -> list[str]:
    values = [row.score, row.official, *(row.published.get(model.label) for model in published_models())]
    return [empty if value is None else f"{value:.1f}" for value in values]
