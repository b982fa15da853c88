"""HTML report of a demo run: figure, what it shows, tables, judged pairs and retrieved documents on one static page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from train_scripts.demo.charts import difference_chart
from train_scripts.demo.judging_section import judged_gallery, quality_table
from train_scripts.demo.results import (
    COLUMNS,
    CONTROL,
    DIRECTIONS,
    MEAN,
    MODELS,
    OTHER_PAIRS,
    REPORT,
    DemoResults,
    distillation_rows,
    table_rows,
)
from train_scripts.demo.retrieval_section import retrieval_gallery
from train_scripts.demo.seed import Seed
from train_scripts.demo.settings import DemoArguments
from unime_st.files import atomic_write, read_json
from unime_st.report.html import Content, Html, element, facts, page, table

_FAR_BELOW = ("base", "stage1")  # models that would leave no room for the differences of the others


def write_demo_report(arguments: DemoArguments) -> Path:
    """Write ``report.html`` for a finished run.

    The page is static and loads nothing: images are embedded, charts are inline SVG.

    Args:
        arguments: Options of the run.

    Returns:
        Path: The page.
    """
    output = Path(arguments.output)
    results, run = DemoResults(read_json(output / "results.json")), Seed(arguments, 0)
    parts = [
        element("h1", "UniME-V2 demo: mined negatives among near-twins"),
        _figure(results),
        element("p", " ".join(results.sentences())),
        *_tables(results),
        *_distillation(results),
        element("h2", "The judge against the truth"),
        quality_table(results.content["judge"]),
        element("h3", "Judged pairs (seed 0)"),
        judged_gallery(run),
        element("h2", "Retrieved documents of UniME-V2 and the control (seed 0)"),
        retrieval_gallery(run),
        *_setting(results),
    ]
    with atomic_write(output / REPORT) as temporary:
        temporary.write_text(page("UniME-V2 demo report", *parts), encoding="utf-8")
    return output / REPORT


def _figure(results: DemoResults) -> Html:
    title = (
        f"Difference from the control ({MODELS[CONTROL]}): nDCG@10, mean of both directions, ± standard error over "
        f"{'families of queries (one seed)' if len(results.seeds) == 1 else f'{len(results.seeds)} seeds'}"
    )
    return element("figure", element("figcaption", title), element("div", model_chart(results), class_="scroll"))


def model_chart(results: DemoResults) -> Html:
    """Chart of the differences of all models from the control, without those that are far below it."""
    rows = [
        (MODELS[model], 100 * found.mean, 100 * (found.error or 0.0))
        for model in results.models
        if model not in _FAR_BELOW and (found := results.difference(model))
    ]
    return difference_chart(rows, x_label="points of nDCG@10")


def _tables(results: DemoResults) -> Iterator[Html]:
    head, *rows = table_rows(results)
    caption = (
        "Percent: nDCG@10 of near-twins, hit@1 of VQA and grounding, accuracy against compositional foils; CPU seconds "
        "after the common start, mining and judging included"
    )
    yield table(head, [("", rows)], caption=caption)
    pairs = [(model, CONTROL) for model in results.models if model != CONTROL] + list(OTHER_PAIRS)
    columns = {name: COLUMNS[name][0] for name in DIRECTIONS} | {MEAN: MEAN}
    lines = [
        [f"{MODELS[model]} − {MODELS[other]}", *(results.difference(model, other, task) for task in columns.values())]
        for model, other in pairs
        if results.difference(model, other)
    ]
    yield table(["", *columns], [("", lines)], caption="Paired differences in points of nDCG@10 ± standard error")


def _distillation(results: DemoResults) -> Iterator[Html]:
    if results.content["distillation"]:
        head, *rows = distillation_rows(results)
        caption = (
            "What stage 1 is for, before and after in-batch training: percent ± standard error, on held-out captions "
            "and their paraphrases; nDCG@10 of near-twins, mean of both directions"
        )
        yield table(head, [("", rows)], caption=caption)


def _setting(results: DemoResults) -> Iterator[Html]:
    content = results.content
    yield element("h2", "Settings, time, versions")
    yield element("ul", *(element("li", note) for note in content["notes"]))
    known: dict[str, Content] = {"seeds": len(results.seeds), "peak memory": f"{content['peak_rss_mb']} MB"}
    for name in ("seconds", "settings", "versions"):
        known |= _flat(name, content[name])
    yield facts(known)


def _flat(name: str, values: Mapping[str, Any]) -> dict[str, Content]:
    return {f"{name}: {key}": element("code", value) for key, value in values.items()}
