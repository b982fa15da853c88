"""Section of the report: scores of MMEB-V2 beside published models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mteb_tasks.mmeb_v2.comparison import ComparedRow, compared_rows, missing_tasks, published_models
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
    found = [(model, compared_rows(model.scores)) for model in models]
    if not any(rows for _, rows in found):
        return
    yield element("h2", "MMEB-V2 beside published models")
    yield element("p", _NOTE)
    groups: list[tuple[str, list[list[Content]]]] = [
        (_title(model, rows), [[row.name, *_cells(row, "–")] for row in rows]) for model, rows in found if rows
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
    for model in models:
        if rows := compared_rows(model.scores):
            labels = [published.label for published in published_models()]
            lines += ["", f"## MMEB-V2: {_title(model, rows)}", "", _NOTE, ""]
            lines.append("| task | score | official | " + " | ".join(labels) + " |")
            lines.append("|---|" + "---:|" * (2 + len(labels)))
            lines += [f"| {row.name} | " + " | ".join(_cells(row, "")) + " |" for row in rows]
    return lines


def _title(model: ModelResults, rows: Sequence[ComparedRow]) -> str:
    missing = missing_tasks(rows)
    return f"{model.label} (no overall score: {missing} of 78 tasks are missing)" if missing else model.label


def _cells(row: ComparedRow, empty: str) -> list[str]:
    values = [row.score, row.official, *(row.published.get(model.label) for model in published_models())]
    return [empty if value is None else f"{value:.1f}" for value in values]
