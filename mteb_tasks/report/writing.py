"""Write the report: one page, one Markdown table, one CSV table."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mteb_tasks.report.failures import gallery
from mteb_tasks.report.published_section import published_markdown, published_section
from mteb_tasks.report.result_frame import score_frame, to_csv
from mteb_tasks.report.result_reader import ModelResults, read_results
from mteb_tasks.scores import CAPTION_METRICS, Row
from unime_st.files import atomic_write
from unime_st.report.charts import bar_chart
from unime_st.report.html import Content, Html, element, join, page, table

_WITHOUT_PREDICTIONS = (
    "No predictions were found for it. `mteb run` keeps them in predictions/ beside results/ for the tasks of this "
    "package; a task that was not run again because its result was there leaves none "
    "(--overwrite-strategy always makes them)."
)


def write_report(
    folders: Iterable[str | Path], output: str | Path = "report", *, failures: int = 3, title: str = "Evaluation"
) -> Path:
    """Write ``report.html``, ``report.md`` and ``report.csv`` of all results below some folders.

    The page is static and loads nothing: images are embedded, charts are inline SVG.

    Args:
        folders: Output folders of ``mteb run``.
        output: Folder to write to. Defaults to "report".
        failures: Wrong queries of each model and task to show, the most confident ones first; 0 shows none. Defaults
            to 3.
        title: Heading of the page. Defaults to "Evaluation".

    Returns:
        Path: The page.

    Raises:
        FileNotFoundError: If there are no results.
        ValueError: If a result is damaged, or ``failures`` is negative.

    Example:
        ::

            from mteb_tasks.report import write_report

            print(write_report(["results"], "report"))
    """
    if failures < 0:
        raise ValueError(f"failures must be 0 or more, got {failures}")
    models = read_results(folders)
    names = _row_names(models)
    body = [
        element("h1", title),
        *_scores(models, names),
        *_captions(models),
        *published_section(models),
        *_charts(models),
        *_differences(models),
        *_origin(models),
        *_failures(models, failures),
    ]
    target = Path(output)
    target.mkdir(parents=True, exist_ok=True)
    contents = {
        "report.html": page(title, *body),
        "report.md": _markdown(models, names, title),
        "report.csv": to_csv(score_frame(models)),
    }
    for name, content in contents.items():
        with atomic_write(target / name) as temporary:
            temporary.write_text(content, encoding="utf-8", errors="backslashreplace")
    return target / "report.html"


def _row_names(models: Sequence[ModelResults]) -> list[str]:
    """Names of all rows: those of the first model, those of others where they stand after the row before them."""
    names: list[str] = []
    for model in models:
        index = 0
        for row in model.rows:
            if row.name in names:
                index = names.index(row.name) + 1
            else:
                names.insert(index, row.name)
                index += 1
    return names


def _rows(model: ModelResults) -> dict[str, Row]:
    return {row.name: row for row in model.rows}


def _scores(models: Sequence[ModelResults], names: Sequence[str]) -> Iterator[Html]:
    what = "Scores are the share of queries answered right, for visual documents nDCG at 5; in percent, by mteb."
    yield element("p", what)
    found = [_rows(model) for model in models]
    best = {name: max(rows[name].score for rows in found if name in rows) for name in names}
    groups: dict[str, list[list[Content]]] = {"Means": [], "Tasks": []}
    for name in names:
        is_mean = next(rows[name].is_mean for rows in found if name in rows)
        cells = [_cell(rows.get(name), len(models) > 1 and best[name]) for rows in found]
        groups["Means" if is_mean else "Tasks"].append([name, *cells])
    caption = "Scores; below them, the difference to the published score of the same model where there is one"
    yield table(
        ["task", *(model.label for model in models)],
        [(label, rows) for label, rows in groups.items() if rows],
        caption=caption,
    )


def _captions(models: Sequence[ModelResults]) -> Iterator[Html]:
    groups: list[tuple[str, list[list[Content]]]] = []
    for model in models:
        rows = [[task, *(f"{value:.1f}" for value in found.values())] for task, found in model.captions.items()]
        groups += [(model.label, list(map(list, rows)))] if rows else []
    if groups:
        caption = "Captions: hit@k asks for any right answer among the first k, recall@k for the share of all of them"
        yield table(["task", *CAPTION_METRICS], groups, caption=caption)


def _cell(row: Row | None, best: float | bool) -> Html:
    if row is None:
        return Html("–")
    beside = element("span", f"{row.difference:+.1f}", class_="spread") if row.published is not None else None
    style = "best" if best is not False and row.score == best else None
    return element("span", f"{row.score:.1f}", beside, class_=style)


def _charts(models: Sequence[ModelResults]) -> Iterator[Html]:
    found = [_rows(model) for model in models]
    names = _row_names(models)
    means = [name for name in names if any(rows[name].is_mean for rows in found if name in rows)]
    chosen = means or names
    groups = []
    for name in chosen:
        bars = [
            (model.label, rows[name].score, rows[name].published) for model, rows in zip(models, found) if name in rows
        ]
        groups.append((name, bars))
    yield element("h2", "Means" if means else "Scores")
    caption = "Bars are scores in percent; a stroke marks the published score of the same model"
    chart = element("div", bar_chart(groups, x_label="percent", high=100.0), class_="scroll")
    yield element("figure", element("figcaption", caption), chart)


def _differences(models: Sequence[ModelResults]) -> Iterator[Html]:
    yield element("h2", "Differences to the published scores")
    groups = []
    for model in models:
        rows: list[list[Content]] = [
            [row.name, f"{row.score:.1f}", f"{row.published:.1f}", f"{row.difference:+.1f}"]
            for row in model.rows
            if row.published is not None
        ]
        if rows:
            groups.append((model.label, rows))
    if groups:
        yield table(["task", "score", "published", "difference"], groups)
    else:
        why = "None of these models has published scores for these tasks; means of MMEB are compared when it is complete."
        yield element("p", why, class_="muted")


def _origin(models: Sequence[ModelResults]) -> Iterator[Html]:
    yield element("h2", "How the numbers were made")
    rows: list[list[Content]] = []
    for model in models:
        data = sorted({f"{task} {revision}" for task, (revision, _) in model.versions.items()})
        listed = element("div", join(data, ", "), style="white-space:normal;text-align:left;max-width:36rem")
        details = element("details", element("summary", f"{len(data)} task{'' if len(data) == 1 else 's'}"), listed)
        versions = ", ".join(sorted({version for _, version in model.versions.values()}))
        rows.append([model.label, model.name, model.revision, model.setting or "–", versions, details])
    yield table(["model", "filed under", "revision", "setting", "mteb", "data revisions"], [("", rows)])
    for model in models:
        if model.superseded:
            text = f"{model.label}: scores on other data were left out for {', '.join(model.superseded)}."
            yield element("p", text, class_="muted")


def _failures(models: Sequence[ModelResults], count: int) -> Iterator[Html]:
    if count == 0:
        return
    yield element("h2", "Wrong answers")
    yield element("p", f"Of each task, the {count} wrong queries whose right answer is furthest behind.")
    for model in models:
        yield element("h3", model.label)
        shown = list(gallery(model, count))
        yield from shown or [element("p", _WITHOUT_PREDICTIONS, class_="muted")]


def _markdown(models: Sequence[ModelResults], names: Sequence[str], title: str) -> str:
    found = [_rows(model) for model in models]
    lines = [f"# {title}", "", "Percent; in brackets the difference to the published score.", ""]
    lines.append("| task | " + " | ".join(_escape(model.label) for model in models) + " |")
    lines.append("|---|" + "---:|" * len(models))
    for name in sorted(names, key=lambda name: next(rows[name].is_mean for rows in found if name in rows)):
        cells = []
        for rows in found:
            row = rows.get(name)
            beside = f" ({row.difference:+.1f})" if row is not None and row.published is not None else ""
            cells.append("–" if row is None else f"{row.score:.1f}{beside}")
        bold = "**" if next(rows[name].is_mean for rows in found if name in rows) else ""
        lines.append(f"| {bold}{_escape(name)}{bold} | " + " | ".join(cells) + " |")
    if any(model.captions for model in models):
        lines += ["", "| model | captions | " + " | ".join(CAPTION_METRICS) + " |"]
        lines.append("|---|---|" + "---:|" * len(CAPTION_METRICS))
    for model in models:
        for task, metrics in model.captions.items():
            values = " | ".join(f"{value:.1f}" for value in metrics.values())
            lines.append(f"| {_escape(model.label)} | {_escape(task)} | {values} |")
    lines += published_markdown(models)
    lines += ["", "| model | revision | setting | tasks | mteb |", "|---|---|---|---:|---|"]
    for model in models:
        versions = _escape(", ".join(sorted({version for _, version in model.versions.values()})))
        setting = _escape(model.setting) or "–"
        lines.append(
            f"| {_escape(model.label)} | {_escape(model.revision)} | {setting} | {len(model.scores)} | {versions} |"
        )
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    """Text of a cell in Markdown, without effect: no HTML, links, images or code."""
    plain = html.escape(" ".join(text.split()), quote=False)
    plain = re.sub(r"[\\`\[\]|!]", lambda found: f"\\{found[0]}", plain)
    return re.sub(r"(?i)(?<=http)(?=s?:)|(?<=www)(?=\.)|(?<=\w)(?=@)", "&#8203;", plain)  # no links of bare addresses
