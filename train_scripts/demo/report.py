"""HTML report of a demo run: tables, loss curves, judged pairs and retrieved documents on one static page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from train_scripts.demo.charts import dot_chart, line_chart
from train_scripts.demo.judging_section import judged_gallery, selection_statistics
from train_scripts.demo.results import (
    COLUMNS,
    CONTROLS,
    EVERYTHING,
    MEAN,
    MODELS,
    REPORT,
    DemoResults,
    Summary,
    render_table,
)
from train_scripts.demo.retrieval_section import compare, gallery, outcome_table
from unime_st.files import atomic_write, read_json
from unime_st.report.html import Content, Html, element, facts, join, page, table

__all__ = ["MODELS", "DemoResults", "render_table", "write_demo_report"]

_GROUPS = (
    ("UniME: distilled, then in-batch hard negatives", ("base", "stage1", "stage2")),
    ("Controls: the same pairs, plain in-batch InfoNCE", CONTROLS),
    ("UniME-V2", ("v2", "v2_reranker")),
    ("Best combination", (EVERYTHING,)),
)
_DIFFERENCES = (
    ("UniME-V2 − control, equal steps", "v2", "in_batch"),
    ("UniME-V2 − control, equal compute", "v2", "in_batch_compute"),
    ("reranker − UniME-V2 alone", "v2_reranker", "v2"),
    ("everything we know − control, equal compute", EVERYTHING, "in_batch_compute"),
)
_STAGES = {
    "Records": "Scenes are drawn from a seed and described as (query, positive) pairs; some scenes occur twice, so "
    "that there are false negatives among the candidates.",
    "Stage 1": "The similarities of a text-embedding teacher are distilled into the model, on texts alone.",
    "Stage 2": "Contrastive training with the hardest negatives of the batch, after false negatives are filtered.",
    "Mining": "For each query, the most similar positives of other pairs are its candidates.",
    "Judging": "The generative model is asked whether each candidate matches the query; its score is P(Yes).",
    "Selection": "Candidates scored about as high as the positive are filtered as false negatives; of the rest, hard "
    "negatives are sampled with a stride over the similarity ranks.",
    "UniME-V2": "The distribution of similarities over positive and negatives is aligned with the judge's scores.",
    "Reranker": "The generative model is trained on the same judged rows, pairwise (Yes or No) and listwise (the index "
    "of the best); it then reorders the first documents of the embedder.",
    "Controls": "The same pairs with plain in-batch InfoNCE: once for as many steps as UniME-V2, once with as much "
    "compute.",
    "Evaluation": "All models are evaluated with mteb on held-out scenes.",
}
_CATEGORY_NAMES = {"obj": "object", "att": "attribute", "rel": "relation"}


def write_demo_report(run: str | Path) -> Path:
    """Write ``report.html`` for a demo run.

    The page is static and loads nothing: images are embedded, charts are inline SVG.

    Args:
        run: Folder of the run, with ``results.json`` and one folder ``seed-<s>`` per seed. Parts of a seed's folder
            that are missing (a stage that was not run, a model without predictions) are named as such in the page.

    Returns:
        Path: The page.

    Raises:
        FileNotFoundError: If there is no ``results.json``.
        ValueError: If the results or a file of the run are malformed; the message names file and row.

    Example:
        >>> write_demo_report("runs/demo")  # doctest: +SKIP
        PosixPath('runs/demo/report.html')
    """
    run = Path(run)
    if not (run / "results.json").is_file():
        raise FileNotFoundError(
            f"{run}: no results.json found; run the demo first, or give the folder of a finished run"
        )
    results = DemoResults(read_json(run / "results.json"))
    seed = run / f"seed-{results.seeds[0]}"
    parts = [
        *_headline(results),
        *_stages(results),
        *_curves(run, results),
        *_judging(results, seed),
        *_retrieval(results, seed),
        *_compositional(results),
        *_setting(results),
    ]
    output = run / REPORT
    with atomic_write(output) as temporary:
        temporary.write_text(page("UniME-V2 demo report", *parts), encoding="utf-8")
    return output


def _number(summary: Summary | None, *, signed: bool = False) -> Html:
    if summary is None:
        return Html("–")
    mean, spread = summary.parts(signed=signed)
    return join([mean, element("span", f" {spread}", class_="spread") if spread else None])


def _headline(results: DemoResults) -> Iterator[Html | None]:
    seeds = len(results.seeds)
    yield element("h1", "UniME-V2 demo: training, judging, reranking and evaluation on one machine")
    intro = (
        "Results of one run of the demo on held-out scenes. The models are toys: the demo shows that the parts work "
        "together, not how large a gain to expect. "
    )
    yield element("p", intro, *_verdict(results))
    spread = "mean ± standard deviation over seeds" if seeds > 1 else "one seed, so no spread is known"
    caption = f"hit@1 and accuracy in percent; {seeds} seed{'s' * (seeds > 1)}; {spread}; best of each column in bold"
    yield _score_table(results, caption)
    yield _difference_table(results)
    yield element("p", _sampling_note(results), class_="muted")
    means = [(MODELS[model], results.values(model, MEAN), model in CONTROLS) for model in results.models]
    rows = [(name, [100 * value for value in values.values()], other) for name, values, other in means if values]
    if rows:
        title = f"Mean over the {len(results.columns)} columns: one dot per seed, a bar at their mean"
        chart = dot_chart(rows, x_label="percent")
        yield element("figure", element("figcaption", title), element("div", chart, class_="scroll"))


def _verdict(results: DemoResults) -> Iterator[str]:
    """UniME-V2 against the controls in words, whatever the sign."""
    difference = results.difference("v2", "in_batch", MEAN)
    if difference is None:
        yield "This run lacks UniME-V2 or the equal-steps control in some column, so there is no comparison."
        return
    columns = [found for column in results.columns if (found := results.difference("v2", "in_batch", column))]
    points = [round(100 * found.mean, 1) for found in columns]
    ahead, behind = sum(value > 0 for value in points), sum(value < 0 for value in points)
    amount = " ".join(filter(None, difference.parts(signed=True)))
    yield (
        f"On the mean over all columns UniME-V2 is {_direction(difference.mean)} the equal-steps control "
        f"({amount} points): ahead in {ahead} columns, behind in {behind}, equal in "
        f"{len(points) - ahead - behind}."
    )
    ours, theirs = results.values("v2", MEAN), results.values("in_batch", MEAN)
    shared = [seed for seed in ours if seed in theirs]
    if len(shared) > 1:
        yield f" It is ahead in {sum(ours[seed] > theirs[seed] for seed in shared)} of {len(shared)} seeds."
    compute = results.difference("v2", "in_batch_compute", MEAN)
    if compute is not None:
        amount = " ".join(filter(None, compute.parts(signed=True)))
        yield f" It is {_direction(compute.mean)} the equal-compute control ({amount} points)."
    everything = results.difference(EVERYTHING, "in_batch_compute", MEAN)
    if everything is not None:
        amount = " ".join(filter(None, everything.parts(signed=True)))
        yield f" Everything we know is {_direction(everything.mean)} that control ({amount} points)."


def _direction(difference: float) -> str:
    shown = round(100 * difference, 1)
    return "level with" if shown == 0 else "ahead of" if shown > 0 else "behind"


def _score_table(results: DemoResults, caption: str) -> Html:
    columns = [*results.columns, MEAN]
    best = {}
    for column in columns:
        means = [found.mean for model in results.models if (found := results.summary(model, column))]
        best[column] = round(100 * max(means), 1) if means else None

    def row(model: str) -> list[Content]:
        cells: list[Content] = [MODELS[model]]
        for column in columns:
            found = results.summary(model, column)
            is_best = found is not None and round(100 * found.mean, 1) == best[column]
            cells.append(element("span", _number(found), class_="best") if is_best else _number(found))
        seconds = results.model_seconds(model)
        return [*cells, "–" if seconds is None else f"{seconds:.0f}"]

    groups = [
        (label, [row(model) for model in models if model in results.models])
        for label, models in _GROUPS
        if any(model in results.models for model in models)
    ]
    return table(["model", *columns, "seconds"], groups, caption=caption)


def _difference_table(results: DemoResults) -> Html | None:
    columns = [*results.columns, MEAN]
    rows = [
        [label, *(_number(results.difference(model, other, column), signed=True) for column in columns)]
        for label, model, other in _DIFFERENCES
        if model in results.models and other in results.models
    ]
    caption = "Paired differences over seeds, in percentage points"
    return table(["", *columns], [("", rows)], caption=caption) if rows else None


def _sampling_note(results: DemoResults) -> str:
    queries = results.setting("eval_size", "the number of queries of each retrieval task")
    return (
        f"With {queries} queries per retrieval task, hit@1 has a standard error of up to "
        f"{100 * math.sqrt(0.25 / queries):.1f} points from the choice of queries alone. The spread over seeds does not "
        "include it, because all seeds answer the same queries. Seconds are those that a model takes beyond the one it "
        "starts from, per seed, without evaluation; UniME-V2's include mining and judging."
    )


def _stages(results: DemoResults) -> Iterator[Html]:
    yield element("h2", "Stages")
    yield element("ul", *(element("li", element("b", name), f": {text}") for name, text in _STAGES.items()))
    seconds = results.stage_seconds()
    if seconds:
        rows = [[stage, *_seconds(found)] for stage, found in seconds.items()]
        rows.append(["all stages", *_seconds(Summary(sum(found.mean for found in seconds.values())))])
        yield table(["stage", "seconds", "spread"], [("", rows)], caption="Seconds per stage and seed")


def _seconds(found: Summary) -> tuple[str, ...]:
    return found.parts(scale=1.0)


def _curves(run: Path, results: DemoResults) -> Iterator[Html]:
    yield element("h2", "Loss curves")
    charts = []
    for model in results.models:
        logs = {f"seed {seed}": run / f"seed-{seed}" / model / "log.jsonl" for seed in results.seeds}
        lines = {name: points for name, path in logs.items() if (points := _read_log(path))}
        if lines:
            charts.append(element("figure", element("figcaption", MODELS[model]), line_chart(lines, x_label="step")))
    if not charts:
        yield element("p", "This run kept no training logs.")
        return
    how = "One line per seed. The losses differ, so values cannot be compared between charts."
    yield element("p", how, class_="muted")
    yield element("div", *charts, class_="charts")


def _read_log(path: Path) -> list[tuple[float, float]]:
    if not path.is_file():
        return []
    points = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            points.append((float(entry["step"]), float(entry["loss"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: expected step and loss ({error!r}); train the model again"
            ) from error
    return points


def _judging(results: DemoResults, seed: Path) -> Iterator[Html]:
    yield element("h2", "Judge scores and selected negatives")
    yield element("p", f"Seed {results.seeds[0]}.", class_="muted")
    yield selection_statistics(seed)
    yield element("h3", "Judged pairs")
    yield judged_gallery(seed)


def _retrieval(results: DemoResults, seed: Path) -> Iterator[Html]:
    yield element("h2", "Retrieved documents of UniME-V2 and the control")
    comparisons = compare(seed, results.setting("eval_size", "the number of queries of each retrieval task"))
    if not comparisons:
        yield element("p", "This run kept no predictions of UniME-V2 and the equal-steps control.")
        return
    how = (
        f"Seed {results.seeds[0]}: the first held-out queries with each outcome, at most two per task, not picked by "
        "hand. A document is right if it is true of the query, so a query may have several right documents."
    )
    yield element("p", how, class_="muted")
    yield outcome_table(comparisons)
    yield element("h3", "UniME-V2 is right where the control is wrong")
    yield gallery(comparisons, ["only V2 right"])
    yield element("h3", "UniME-V2 is wrong")
    yield gallery(comparisons, ["only the control right", "both wrong"])


def _compositional(results: DemoResults) -> Iterator[Html]:
    if not results.categories:
        return
    yield element("h2", "Compositional understanding by category")
    band = 100 * results.chance_band()
    how = (
        "An image should be closer to its caption than to a foil with one replaced, swapped or added word; chance is 50 "
        f"percent. Accuracies within two standard errors of chance (50 ± {band:.1f}) are marked ≈."
    )
    yield element("p", how)
    for model in results.models:
        if model in ("v2", "v2_reranker", EVERYTHING):
            yield element("p", _chance_sentence(results, model))

    def cell(model: str, category: str) -> Html:
        number = _number(results.summary(model, category))
        if category in results.at_chance(model):
            return element("span", "≈ ", number, class_="chance")
        return number

    rows = [[MODELS[model], *(cell(model, name) for name in results.categories)] for model in results.models]
    yield table(["model", *map(_spoken, results.categories)], [("", rows)], caption="accuracy in percent")


def _chance_sentence(results: DemoResults, model: str) -> str:
    if not any(results.summary(model, name) for name in results.categories):
        return f"{MODELS[model]} was not evaluated on these categories."
    at, below = (", ".join(map(_spoken, found(model))) for found in (results.at_chance, results.below_chance))
    sentence = f"{MODELS[model]} is at chance in: {at}." if at else f"{MODELS[model]} is at chance in no category."
    return sentence + (f" It prefers the wrong caption in: {below}." if below else "")


def _spoken(category: str) -> str:
    action, what = category.split("_")
    return f"{action} {_CATEGORY_NAMES[what]}"


def _setting(results: DemoResults) -> Iterator[Html]:
    content = results.content
    yield element("h2", "Machine, versions, settings")
    notes = content.get("notes") or []
    if notes:
        yield element("ul", *(element("li", note) for note in notes))
    memory = content.get("peak_rss_mb")
    known: dict[str, Content] = {"seeds": ", ".join(map(str, results.seeds))}
    if memory is not None:
        known["peak memory"] = f"{float(memory):.0f} MB"
    known |= {"columns": join(_described(results), ", ")}
    for name in ("machine", "versions", "settings"):
        known |= _flat(name, content.get(name))
    yield facts(known)


def _described(results: DemoResults) -> Iterator[str]:
    for title in results.columns:
        task, metric = COLUMNS[title]
        yield f"{title} = {task} {metric}"


def _flat(name: str, value: Any) -> dict[str, Content]:
    """Flatten a nested setting to names and values."""
    if isinstance(value, Mapping):
        return {key: text for part in value for key, text in _flat(f"{name}: {part}", value[part]).items()}
    return {} if value is None else {name: element("code", value)}
