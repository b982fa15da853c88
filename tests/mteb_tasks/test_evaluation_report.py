"""`unime report` on results and predictions that mteb wrote."""

from __future__ import annotations

import csv
import html.parser
import json
import shutil

import mteb
import pytest
from mteb.results import TaskResult

import mteb_tasks
from mteb_tasks import wrap
from mteb_tasks.mmeb.subsets import SUBSETS
from mteb_tasks.mmeb.tasks import MMEB, mmeb_tasks
from mteb_tasks.report import write_report
from mteb_tasks.report.result_reader import read_results
from mteb_tasks.sugarcrepe import SugarCrepeByCategory
from unime_st.cli import main


@pytest.fixture(scope="module")
def run(tiny, official, tmp_path_factory):
    """Output folder of a run on small MMEB and SugarCrepe sets, as `mteb run` leaves it."""
    root = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _environment(official).items():
            patch.setenv(name, value)
        model = wrap(tiny, "unime/tiny-random", "r1")
        predictions = root / "predictions" / "r1"
        predictions.mkdir(parents=True)
        tasks = [*mmeb_tasks(), MMEB(), SugarCrepeByCategory()]
        cache = mteb.ResultCache(root)
        mteb.evaluate(model, tasks, cache=cache, prediction_folder=predictions, co2_tracker=False)
    return root


def _environment(official):
    folders = {"MMEB_EVAL_DIR": official / "eval/mmeb", "UNIME_EVAL_DIR": official / "eval", "MMEB_ALLOW_MISSING": 1}
    return {name: str(value) for name, value in folders.items()}


@pytest.fixture
def data(official, monkeypatch):
    for name, value in _environment(official).items():
        monkeypatch.setenv(name, value)


class _Page(html.parser.HTMLParser):
    """Text and images of a page; fails on anything that is loaded from elsewhere."""

    def __init__(self, source):
        super().__init__()
        self.text, self.images, self.bars = "", 0, 0
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.images += tag == "img"
        self.bars += tag == "rect"
        for name, value in attributes:
            if name in ("src", "href"):
                assert value.startswith("data:image/")

    def handle_data(self, data):
        self.text += data


def _table(file):
    return list(csv.DictReader(file.read_text().splitlines()))


def test_the_command_writes_page_markdown_and_table(run, data, tmp_path, capsys):
    assert main(["report", str(run), "--output", str(tmp_path), "--failures", "2"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    rows = _table(tmp_path / "report.csv")
    scores = {row["name"]: float(row["score"]) for row in rows}
    for file in (run / "results").rglob("MMEB-*.json"):
        (found,) = json.loads(file.read_text())["scores"]["test"]
        assert scores[file.stem] == pytest.approx(100 * found["main_score"])
    (whole,) = json.loads(next(run.rglob("MMEB.json")).read_text())["scores"]["test"]
    assert scores["MMEB (4 of 36) overall"] == pytest.approx(100 * whole["mean"], abs=1e-3)
    assert scores["SugarCrepeByCategory mean"] == pytest.approx(
        sum(scores[f"SugarCrepeByCategory {group}"] for group in ("replace", "swap", "add")) / 3, abs=1e-3
    )
    assert {row["revision"] for row in rows} == {"r1"} and {row["published"] for row in rows} == {""}
    page = _Page((tmp_path / "report.html").read_text())
    for expected in ("MMEB-RefCOCO: ", "wrong", "Right answer", "tiny-random", "MMEB (4 of 36) overall"):
        assert expected in page.text
    assert page.images > 4 and page.bars > 4
    assert "| **MMEB (4 of 36) overall** |" in (tmp_path / "report.md").read_text()


def test_wrong_queries_are_those_that_mteb_counts_as_wrong(run, data, tmp_path):
    page = _Page(write_report([run], tmp_path).read_text())
    for file in (run / "results").rglob("MMEB-*.json"):
        (found,) = json.loads(file.read_text())["scores"]["test"]
        total = len(next(iter(json.loads(next(run.rglob(f"{file.stem}_predictions.json")).read_text())[
            found["hf_subset"]].values())))  # fmt: skip
        wrong = round(total * (1 - found["main_score"]))
        assert f"{file.stem}: {wrong} of {total} wrong" in page.text


def test_published_scores_stand_beside_a_complete_mmeb(tmp_path):
    cache = mteb.ResultCache(tmp_path)
    meta = mteb.get_model_meta("unime-v2")
    for subset in SUBSETS:
        entry = {"hf_subset": "default", "languages": ["eng-Latn"], "main_score": 0.712, "hit_rate_at_1": 0.712}
        result = TaskResult(
            dataset_revision="main", task_name=subset.task_name, mteb_version="2", evaluation_time=1.0,
            scores={"test": [entry]},
        )  # fmt: skip
        cache.save_to_cache(result, meta)
    write_report([tmp_path], tmp_path / "out")
    rows = {row["name"]: row for row in _table(tmp_path / "out" / "report.csv")}
    assert (rows["MMEB overall"]["published"], rows["MMEB overall"]["difference"]) == ("71.2", "0.0")
    assert rows["MMEB OOD"]["difference"] == "4.5"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "+4.5" in page and "No predictions were found" in page
    assert "71.2 (+4.5)" in (tmp_path / "out" / "report.md").read_text()


def _result(folder, task, scores, revision="main"):
    result = TaskResult(
        dataset_revision=revision, task_name=task, mteb_version="2", evaluation_time=1.0, scores=scores
    )  # fmt: skip
    mteb.ResultCache(folder).save_to_cache(result, mteb.get_model_meta("unime-v2"))


def test_scores_of_the_same_model_on_other_data_are_said_to_be_left_out(tmp_path):
    for name, score in (("first", 0.25), ("second", 0.75)):
        entry = {"hf_subset": f"local-{name}", "languages": ["eng-Latn"], "main_score": score}
        _result(tmp_path / name, "MMEB-GQA", {"test": [entry]}, f"local-{name}")
    page = write_report([tmp_path / "first", tmp_path / "second"], tmp_path / "out").read_text()
    (row,) = _table(tmp_path / "out" / "report.csv")
    assert (row["score"], row["data"]) == ("75.0000", "second")
    assert "unime-v2: scores on other data were left out for MMEB-GQA" in page
    page = write_report([tmp_path / "second", tmp_path / "second"], tmp_path / "out").read_text()
    assert "left out" not in page


def test_splits_of_other_tasks_do_not_take_each_other_s_place(tmp_path):
    entry = {"hf_subset": "default", "languages": ["eng-Latn"]}
    scores = {"dev": [{**entry, "main_score": 0.5}], "test": [{**entry, "main_score": 0.75}]}
    _result(tmp_path, "Another", scores)
    write_report([tmp_path], tmp_path / "out")
    shown = {row["name"]: row["score"] for row in _table(tmp_path / "out" / "report.csv")}
    assert shown == {"Another default (dev)": "50.0000", "Another default (test)": "75.0000"}


def test_profiles_in_several_folders_stand_beside_each_other(tmp_path):
    for profile, score in (("vlm2vec", 0.25), ("qwen3-vl", 0.75)):
        entry = {"hf_subset": profile, "languages": ["eng-Latn"], "main_score": score, "profile": profile}
        _result(tmp_path / profile, "MMEB-V2-VisRAG_ChartQA", {"test": [entry]})
    write_report([tmp_path / "vlm2vec", tmp_path / "qwen3-vl"], tmp_path / "out")
    shown = {row["name"]: row["score"] for row in _table(tmp_path / "out" / "report.csv")}
    assert shown == {
        "MMEB-V2-VisRAG_ChartQA (vlm2vec)": "25.0000",
        "MMEB-V2-VisRAG_ChartQA (qwen3-vl)": "75.0000",
    }


def test_results_are_a_data_frame(tmp_path):
    _result(tmp_path, "MMEB-GQA", {"test": [{"hf_subset": "default", "languages": ["eng-Latn"], "main_score": 0.5}]})
    _result(tmp_path, "=cmd()", {"test": [{"hf_subset": "default", "languages": ["eng-Latn"], "main_score": 0.25}]})
    frame = mteb_tasks.results(tmp_path)
    assert list(frame["name"]) == ["MMEB-GQA", "=cmd()"] and list(frame["score"]) == [50.0, 25.0]
    write_report([tmp_path], tmp_path / "out")
    assert [row["name"] for row in _table(tmp_path / "out" / "report.csv")] == ["MMEB-GQA", "'=cmd()"]


def test_strange_names_do_not_break_the_tables(tmp_path):
    meta = {"name": "some/<script>one</script>", "revision": "a|b\nc"}
    (tmp_path / "model_meta.json").write_text(json.dumps(meta))
    rows = [{"hf_subset": "default", "main_score": 0.5}]
    content = {"task_name": "A|<b>task</b>", "scores": {"test": rows}, "dataset_revision": "<i>", "mteb_version": "2"}
    (tmp_path / "A.json").write_text(json.dumps(content))
    page = write_report([tmp_path], tmp_path / "out").read_text()
    table = (tmp_path / "out" / "report.md").read_text()
    assert not any(mark in text for text in (page, table) for mark in ("<script", "<b>task", "<i>"))
    assert "| A\\|&lt;b&gt;task&lt;/b&gt; | 50.0 |" in table and "| a\\|b c |" in table


def test_captions_are_shown_with_hits_and_recall(tmp_path):
    entry = {"hf_subset": "default", "languages": ["eng-Latn"], "main_score": 0.9}
    entry |= {f"hit_rate_at_{k}": 0.9 + k / 1000 for k in (1, 5, 10)} | {f"recall_at_{k}": k / 100 for k in (1, 5, 10)}
    _result(tmp_path, "Flickr30k1kI2TRetrieval", {"test": [entry]})
    page = write_report([tmp_path], tmp_path / "out").read_text()
    assert '<th scope="col">hit@5</th>' in page and "<td>10.0</td>" in page
    rows = {row["name"]: row for row in _table(tmp_path / "out" / "report.csv")}
    assert rows["Flickr30k1kI2TRetrieval recall@10"]["score"] == "10.0000"
    assert rows["Flickr30k1kI2TRetrieval hit@5"]["kind"] == "metric"
    line = "| unime-v2 | Flickr30k1kI2TRetrieval | 90.1 | 90.5 | 91.0 | 1.0 | 5.0 | 10.0 |"
    assert line in (tmp_path / "out" / "report.md").read_text()


def test_two_revisions_of_a_model_are_two_columns(run, data, tmp_path):
    for revision in ("r1", "r2"):
        shutil.copytree(run / "results", tmp_path / revision)
        for meta in (tmp_path / revision).rglob("model_meta.json"):
            content = json.loads(meta.read_text())
            meta.write_text(json.dumps({**content, "revision": revision}))
    found = read_results([tmp_path / "r1", tmp_path / "r2"])
    assert [model.label for model in found] == ["tiny-random r1", "tiny-random r2"]
    page = write_report([tmp_path], tmp_path / "out", failures=0).read_text()
    assert "tiny-random r2" in page and "Wrong answers" not in page


def test_data_that_changed_since_are_not_shown_as_the_model_s_mistakes(run, tmp_path, monkeypatch):
    monkeypatch.delenv("MMEB_EVAL_DIR", raising=False)
    monkeypatch.delenv("UNIME_EVAL_DIR", raising=False)
    page = _Page(write_report([run], tmp_path).read_text())
    assert "MMEB-OK-VQA: the data cannot be read (the predictions were made on other data" in page.text
    assert page.images == 0


def test_faulty_folders_are_named(tmp_path, capsys):
    assert main(["report", str(tmp_path / "none")]) == 1
    assert "is not a folder; give the --output-folder" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 1
    assert "no results of mteb" in capsys.readouterr().err
    broken = tmp_path / "MMEB-GQA.json"
    broken.write_text('{"task_name": "MMEB-GQA", "sc')
    with pytest.raises(ValueError, match=r"MMEB-GQA.json is damaged"):
        read_results([tmp_path])
    broken.write_text('{"task_name": "MMEB-GQA", "scores": {"test": [{"hf_subset": "default"}]}}')
    with pytest.raises(ValueError, match=r"MMEB-GQA.json is not a result of mteb"):
        read_results([tmp_path])
    with pytest.raises(ValueError, match="failures must be 0 or more"):
        write_report([tmp_path], failures=-1)
