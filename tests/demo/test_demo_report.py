"""HTML report of the demo: numbers, tables, galleries, and malformed runs."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from report_page import Page
from tiny_embedder import tiny_embedder

from mteb_tasks.in_process import evaluate
from mteb_tasks.scenes import ScenesVQA
from train_scripts.demo.charts import histogram, line_chart
from train_scripts.demo.report import MODELS, DemoResults, render_table, write_demo_report
from train_scripts.demo.results import COLUMNS, TASKS
from unime_st.data import ImageRef, Item, RecordSet, read_manifest
from unime_st.data.scenes import FOIL_CATEGORIES, retrieval_data, training_records
from unime_st.judging import Group
from unime_st.judging.judge_pools import judge_pools
from unime_st.judging.select_rows import select_rows
from unime_st.report.charts import ticks
from unime_st.report.html import element, embed_image, show_item
from unime_st.retrieval import mine

SIZE, FOILS, SEEDS = 12, 100, (3, 5)
NASTY = "<script>alert('x')</script> & \"quotes\""


class LotteryJudge:
    """Answers that depend on the pair and nothing else."""

    name, revision, prompt_hash = "lottery", "1", "none"

    def score(self, groups: Sequence[Group], *, errors: object = None) -> list[np.ndarray]:
        number = lambda item: int(item.id[:4], 16)
        return [
            np.array([(number(group.query) ^ number(item)) / 8192 - 4 for item in group.candidates], np.float32)
            for group in groups
        ]


def made_up_rows(models: Sequence[str] = tuple(MODELS), seeds: Sequence[int] = SEEDS) -> list[dict]:
    rng = np.random.default_rng(0)
    cells = [*COLUMNS.values(), *(("compositional", name) for name in FOIL_CATEGORIES)]
    return [
        {"model": model, "seed": seed, "task": task, "metric": metric, "value": float(rng.uniform(0.3, 0.9))}
        for model in models
        for seed in seeds
        for task, metric in cells
    ]


def made_up(rows: list[dict]) -> dict:
    seconds = {"records": 1.5, "stage1": 10.0, "mine": 2.0, "judge": 4.0, "select": 0.5, "v2": 20.0}
    return {
        "rows": rows,
        "seconds": seconds,
        "seconds_by_seed": {"3": seconds, "5": {name: 3 * value for name, value in seconds.items()}},
        "peak_rss_mb": 1234.5,
        "versions": {"torch": "2.0"},
        "machine": {"cores": 2},
        "settings": {"eval_size": SIZE, "foil_size": FOILS, "note": NASTY},
        "notes": [NASTY],
    }


def write_predictions(folder: Path, model: str, right: Sequence[bool]) -> None:
    """Rankings with a right or a wrong document first; documents not in order of score in the file."""
    for task, name in TASKS.items():
        data, found = retrieval_data(task, size=SIZE, seed=0), {}
        for hit, (query, relevant) in zip(right, data.relevant.items()):
            wrong = [d for d in (data.candidates or {}).get(query, data.corpus) if d not in relevant][:3]
            best = min(relevant) if hit else wrong.pop()
            found[query] = {**{document: 0.1 * index for index, document in enumerate(wrong)}, best: 0.9}
        (folder / "eval" / model).mkdir(parents=True, exist_ok=True)
        path = folder / "eval" / model / f"{name}_predictions.json"
        path.write_text(json.dumps({"mteb_model_meta": {}, "default": {"test": found}}))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two seeds: real records, pools, scores and rows; made-up results, logs and predictions."""
    run = tmp_path_factory.mktemp("run")
    (run / "results.json").write_text(json.dumps(made_up(made_up_rows())))
    seed = run / "seed-3"
    records = RecordSet.write(seed / "records", training_records(60), {})
    pools = mine(records, tiny_embedder(), seed / "pools", num_candidates=12, max_similarity=None)
    select_rows(judge_pools(pools, LotteryJudge(), seed / "scores"), seed / "rows", num_negatives=4)
    write_predictions(seed, "v2", [index % 2 == 0 for index in range(SIZE)])
    write_predictions(seed, "in_batch", [index % 3 == 0 for index in range(SIZE)])
    for number in SEEDS:
        for model in list(MODELS)[1:]:
            log = [{"loss": 3.0 / step, "step": step, "learning_rate": 0.1} for step in range(1, 7)]
            (run / f"seed-{number}" / model).mkdir(parents=True)
            (run / f"seed-{number}" / model / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in log))
    return run


@pytest.fixture(scope="module")
def report(run: Path) -> Page:
    path = write_demo_report(run)
    assert path == run / "report.html" and not list(run.glob("*.tmp"))
    return Page(path.read_text(encoding="utf-8"))


def values(model: str, column: str) -> list[float]:
    task, metric = COLUMNS[column]
    rows = made_up_rows()
    return [row["value"] for row in rows if (row["model"], row["task"], row["metric"]) == (model, task, metric)]


def test_page_stands_alone(run: Path, report: Page):
    text = (run / "report.html").read_text(encoding="utf-8")
    assert not any(word in text for word in ("url(", "@import", "http://", "https://"))
    tags = {tag for tag, _ in report.tags}
    assert not tags & {"script", "link", "iframe", "object"}
    for tag, attributes in report.tags:
        assert not {"href", "onclick", "srcset"} & set(attributes)
        assert tag != "img" or (attributes["src"] or "").startswith("data:image/png;base64,")
    assert sum(tag == "img" for tag, _ in report.tags) > 50


def test_text_is_escaped(report: Page):
    assert report.text.count(NASTY) == 2  # the note and the setting, as text


def test_headline_numbers(report: Page):
    table = report.table("model", "short t2i")
    assert list(table) == list(MODELS.values())
    for model, name in MODELS.items():
        for index, column in enumerate(COLUMNS):
            found = values(model, column)
            expected = f"{100 * statistics.mean(found):.1f} ±{100 * statistics.stdev(found):.1f}"
            assert table[name][index] == expected
        means = [statistics.mean(pair) for pair in zip(*(values(model, column) for column in COLUMNS))]
        assert table[name][-2] == f"{100 * statistics.mean(means):.1f} ±{100 * statistics.stdev(means):.1f}"
    columns = [[row[index] for row in table.values()] for index in range(len(COLUMNS) + 1)]
    best = [max((cell.split()[0] for cell in column), key=float) for column in columns]
    assert sorted(report.bold) == sorted(best)


def test_seconds_of_models_and_stages(report: Page):
    table = report.table("model", "short t2i")
    assert table[MODELS["base"]][-1] == "–"
    assert table[MODELS["stage1"]][-1] == "20"  # mean of 10 and 30
    assert table[MODELS["v2"]][-1] == "53"  # mining, judging, selection and training
    stages = report.table("stage", "seconds")
    assert stages["judge"] == ["8.0", "±5.7"] and stages["all stages"] == ["76.0", ""]


def test_differences_are_paired_and_signed(report: Page):
    table = report.table("", "short t2i")
    for label, ours, theirs in (
        ("UniME-V2 − control, equal steps", "v2", "in_batch"),
        ("UniME-V2 − control, equal compute", "v2", "in_batch_compute"),
        ("reranker − UniME-V2 alone", "v2_reranker", "v2"),
        ("everything we know − control, equal compute", "everything", "in_batch_compute"),
    ):
        for index, column in enumerate(COLUMNS):
            paired = [a - b for a, b in zip(values(ours, column), values(theirs, column))]
            cell = table[label][index].replace("−", "-")
            assert float(cell.split()[0]) == pytest.approx(100 * statistics.mean(paired), abs=0.051)
            assert cell.split()[1] == f"±{100 * statistics.stdev(paired):.1f}"
            assert cell[0] in "+-"


@pytest.mark.parametrize(("shift", "words"), [(0.1, "is ahead of"), (-0.1, "is behind"), (0.0, "is level with")])
def test_verdict_follows_the_sign(shift: float, words: str, tmp_path: Path):
    rows = [{**row, "value": 0.5} for row in made_up_rows(("in_batch", "v2"))]
    for row in rows:
        row["value"] += shift * (row["model"] == "v2")
    (tmp_path / "results.json").write_text(json.dumps(made_up(rows)))
    text = Page(write_demo_report(tmp_path).read_text(encoding="utf-8")).text
    assert f"UniME-V2 {words} the equal-steps control" in text
    counts = [9 * (shift > 0), 9 * (shift < 0), 9 * (shift == 0)]
    assert "ahead in {} columns, behind in {}, equal in {}.".format(*counts) in text
    assert f"It is ahead in {2 * (shift > 0)} of 2 seeds." in text


def test_loss_curves(report: Page):
    lines = [attributes for tag, attributes in report.tags if tag == "polyline"]
    assert len(lines) == (len(MODELS) - 1) * len(SEEDS)
    assert all(len((line["points"] or "").split()) == 6 for line in lines)
    heights = [float(point.split(",")[1]) for point in (lines[0]["points"] or "").split()]
    assert heights == sorted(heights) and heights[0] < heights[-1]  # a falling loss falls


def test_selection_statistics(run: Path, report: Page):
    facts = read_manifest(run / "seed-3" / "rows")["statistics"]
    assert facts["false_negatives_filtered"] > 0
    for count, whole, of in (
        ("false_negatives_filtered", "candidates", "candidates"),
        ("rows_with_filtered", "rows", "pairs"),
        ("short", "rows", "pairs"),
        ("none_left", "rows", "pairs"),
    ):
        share = 100 * facts[count] / facts[whole]
        assert f"{facts[count]} of {facts[whole]} {of} ({share:.1f} %)" in report.text


def test_judged_gallery_follows_the_rule(run: Path, report: Page):
    scores = [float(found) for found in re.findall(r"P\(Yes\) (\d\.\d\d)cosine -?\d\.\d\d[✗✓]", report.text)]
    marks = re.findall(r"cosine -?\d\.\d\d(✗ filtered|✓ chosen)", report.text)
    assert len(scores) == len(marks) and {"✗ filtered", "✓ chosen"} == set(marks)
    cards = re.split(r"Candidates: \d+ of \d+ shown, (?=\d+ filtered in all)", report.text)[1:]
    kinds = {record.dataset for record in RecordSet.load(run / "seed-3" / "records")}
    assert 3 <= len(cards) <= len(kinds)
    positives = re.findall(r"Its positive.*?P\(Yes\) (\d\.\d\d)", report.text)
    assert len(positives) == len(cards)
    for own, card in zip(positives, cards):
        for score, mark in re.findall(r"P\(Yes\) (\d\.\d\d)cosine -?\d\.\d\d([✗✓])", card):
            difference = float(score) - (float(own) - 0.01)
            assert difference > -0.011 if mark == "✗" else difference < 0.011


def test_who_is_right(report: Page):
    table = report.table("task", "both right")
    assert list(table) == [task.replace("_", " ") for task in TASKS]
    assert set(map(tuple, table.values())) == {("2", "4", "2", "4")}  # of 12, by multiples of 2 and of 3
    fixed, failed = report.text.split("UniME-V2 is right where the control is wrong")[1].split("UniME-V2 is wrong", 1)
    failed = failed.split("Compositional understanding")[0]
    assert fixed.count("First 3 of UniME-V2") == failed.count("First 3 of UniME-V2") == 2 * len(TASKS)
    for part, ours_right in ((fixed, True), (failed, False)):
        for card in part.split("First 3 of UniME-V2")[1:]:
            ours = card.split("First 3 of control")[0]
            assert ("1. score 0.90✓ right" in ours) == ours_right


def test_gallery_agrees_with_mteb(tmp_path: Path):
    rows = made_up_rows(("in_batch", "v2"), (0,))
    task = ScenesVQA(size=SIZE)
    for model in ("in_batch", "v2"):
        scores = evaluate(tiny_embedder(), [task], tmp_path / "seed-0" / "eval" / model)
    (tmp_path / "results.json").write_text(json.dumps(made_up(rows)))
    table = Page(write_demo_report(tmp_path).read_text(encoding="utf-8")).table("task", "both right")
    hits = round(SIZE * scores["ScenesVQA"]["default"]["hit_rate_at_1"])
    assert table == {"vqa": [str(hits), "0", "0", str(SIZE - hits)]}


def test_chance_is_named(tmp_path: Path):
    rows = [row for row in made_up_rows(seeds=(0,)) if row["metric"] not in FOIL_CATEGORIES]
    made = dict(zip(FOIL_CATEGORIES, (0.9, 0.59, 0.61, 0.41, 0.39, 0.5, 0.8)))  # band: 0.5 ± 0.1
    rows += [
        {"model": "v2", "seed": 0, "task": "compositional", "metric": name, "value": value}
        for name, value in made.items()
    ]
    results = DemoResults(made_up(rows))
    assert results.at_chance("v2") == ["replace_att", "swap_obj", "add_obj"]
    assert results.below_chance("v2") == ["swap_att"]
    (tmp_path / "results.json").write_text(json.dumps(made_up(rows)))
    page = Page(write_demo_report(tmp_path).read_text(encoding="utf-8"))
    assert "is at chance in: replace attribute, swap object, add object." in page.text
    assert "It prefers the wrong caption in: swap attribute." in page.text
    assert "UniME-V2 + reranker was not evaluated on these categories." in page.text
    table = page.table("model", "replace object")
    assert table[MODELS["v2"]] == ["90.0", "≈ 59.0", "61.0", "≈ 41.0", "39.0", "≈ 50.0", "80.0"]
    assert set(table[MODELS["base"]]) == {"–"}


def test_little_is_there(tmp_path: Path):
    rows = made_up_rows(("base", "v2"), (0,))
    content = {"rows": rows, "seconds": {"v2": 7.0}, "settings": {"eval_size": SIZE, "foil_size": FOILS}}
    (tmp_path / "results.json").write_text(json.dumps(content))
    page = Page(write_demo_report(tmp_path).read_text(encoding="utf-8"))
    assert list(page.table("model", "short t2i")) == [MODELS["base"], MODELS["v2"]]
    assert "±" not in "".join(chain.from_iterable(page.table("model", "short t2i").values()))
    for missing in (
        "one seed, so no spread is known",
        "so there is no comparison",
        "kept no training logs",
        "no finished selection",
        "no judged pairs",
        "kept no predictions",
    ):
        assert missing in page.text


def test_plain_table():
    rows = [row for row in made_up_rows(("base", "v2")) if row["metric"] != "swap" or row["model"] == "base"]
    lines = render_table(made_up(rows)).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 4
    head, rule, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert head == ["model", *COLUMNS, "mean", "seconds"] and set("".join(rule)) == {":", "-"}
    found = values("base", "VQA")
    assert body[0][head.index("VQA")] == f"{100 * np.mean(found):.1f} ±{100 * np.std(found, ddof=1):.1f}"
    # A model that lacks a column has no mean that could be compared.
    assert body[1][0] == MODELS["v2"] and body[1][head.index("swap")] == body[1][head.index("mean")] == "–"
    single = render_table(made_up(made_up_rows(("v2",), (0,))))
    assert "±" not in single


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": float("nan")}, "row 2: value is nan"),
        ({"value": 55.0}, "row 2: value is 55.0, expected a fraction"),
        ({"seed": "0"}, "row 2: seed is '0'"),
        ({"model": "v3"}, "unknown model 'v3'; expected one of base"),
        ({"metric": "hit_rate_at_1", "task": "short_i2t"}, "row 2: base, short_i2t, seed 3 occurs twice"),
    ],
)
def test_damaged_results(change: dict, message: str):
    rows = made_up_rows()
    rows[2] |= change
    with pytest.raises(ValueError, match=message):
        DemoResults(made_up(rows))


def test_missing_results(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="run the demo first"):
        write_demo_report(tmp_path)
    with pytest.raises(ValueError, match="has not evaluated a model"):
        DemoResults({"rows": []})
    (tmp_path / "results.json").write_text(json.dumps({**made_up(made_up_rows()), "settings": {"foil_size": 9}}))
    with pytest.raises(ValueError, match=r"settings.eval_size is None"):
        write_demo_report(tmp_path)


def test_damaged_folders(run: Path, tmp_path: Path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    content = made_up(made_up_rows())
    content["settings"]["eval_size"] = SIZE + 1
    (copy / "results.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not about the 13 queries"):
        write_demo_report(copy)
    path = copy / "seed-3" / "eval" / "v2" / "ScenesVQA_predictions.json"
    path.write_text(path.read_text()[:100])
    content["settings"]["eval_size"] = SIZE
    (copy / "results.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"ScenesVQA_predictions.json: not the predictions"):
        write_demo_report(copy)
    (copy / "seed-5" / "v2" / "log.jsonl").write_text('{"loss": 1.0, "step": 1}\n{"loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"log.jsonl, line 2"):
        write_demo_report(copy)


def test_elements_escape():
    assert element("p", "a < b", element("b", 1), class_="x\"'", title=None) == (
        '<p class="x&quot;&#x27;">a &lt; b<b>1</b></p>'
    )
    long = " ".join(f"word{index}" for index in range(60))
    folded = Page(show_item(Item(long), style="good"))
    assert long in folded.text and folded.classes("div", "good") == 1
    assert "cannot be" in embed_image(ImageRef(data=b"no image"))


def test_charts():
    for low, high in ((0.0, 0.0), (0.3, 0.3), (-2.5, 7.1), (0.0, 100.0), (1e-6, 3e-6), (12345.0, 99999.0)):
        found = ticks(low, high)
        assert found == sorted(set(found)) and 2 <= len(found) <= 8 and found[0] <= low and high <= found[-1]
    line = Page(line_chart({"one": [(5, 1.0)]}, x_label="step"))  # a single point is drawn too
    assert [attributes["points"] for tag, attributes in line.tags if tag == "polyline"]
    bars = [
        attributes for tag, attributes in Page(histogram([1, 3, 0], low=0, high=3, x_label="x")).tags if tag == "rect"
    ]
    heights = [float(bar["height"] or 0) for bar in bars]
    assert heights[1] == pytest.approx(3 * heights[0], rel=0.01) and heights[2] == 0.0
    for empty in (lambda: histogram([0, 0], low=0, high=1, x_label="x"), lambda: line_chart({}, x_label="x")):
        with pytest.raises(ValueError, match="at least one"):
            empty()
