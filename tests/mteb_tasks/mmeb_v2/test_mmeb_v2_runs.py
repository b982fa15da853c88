"""Runs of the tasks of MMEB-V2 as users start them: the command, the report, two stages, data of several tasks."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import mteb
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from mteb_tasks import TwoStage
from mteb_tasks.loader import UniMELoader, wrap
from mteb_tasks.mmeb.location import MMEBDataError
from mteb_tasks.mmeb_v2.aggregate import mmeb_v2_tasks
from mteb_tasks.mmeb_v2.image_tasks import IMAGE_TASKS
from mteb_tasks.mmeb_v2.profiles import PAGE_QUERY
from mteb_tasks.mmeb_v2.visdoc_sets import visdoc_set
from mteb_tasks.mmeb_v2.visdoc_tasks import VISDOC_TASKS, VisDocTask
from mteb_tasks.report import write_report
from unime_st import UniMEReranker
from unime_st.data.items import Item

HL = visdoc_set("ViDoRe_esg_reports_human_labeled_v2")
Command = Callable[..., str]


def _task(key: str) -> VisDocTask:
    (found,) = (task() for task in VISDOC_TASKS if task.key == key)
    return found


@pytest.fixture
def command(
    mini: Path, square_model: SentenceTransformer, tmp_path: Path, mteb_run: Callable[..., Command]
) -> Command:
    """mteb's command line in this process: gives the table that it wrote to standard output."""
    square_model.save_pretrained(str(tmp_path / "model"))
    run = mteb_run(MMEB_V2_DIR=mini, UNIME_MODEL=tmp_path / "model")

    def table(*arguments: str) -> str:
        shown = run("unime-local", *arguments)
        return shown[shown.index("MMEB-V2 (") :]

    return table


@pytest.mark.slow
def test_the_command_twice_and_the_report(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published rows stand beside ours in table and report; the second run makes no forward pass."""
    arguments = ["-t", "MMEB-V2", "--allow-missing", "--output-folder"]
    table = command(*arguments, str(tmp_path / "out"))
    shown = re.search(rf"^MMEB-V2-{HL.key} +\d+\.\d +\d+\.\d +45\.8 +71\.4$", table, re.MULTILINE)
    assert shown and "MMEB-V2 Overall" not in table
    assert "No overall score: 76 of 78 tasks are missing" in table
    monkeypatch.setattr(SentenceTransformer, "forward", lambda *args, **kwargs: pytest.fail("a forward pass"))
    assert command(*arguments, str(tmp_path / "out")) == table
    assert command(*arguments, str(tmp_path / "again")) == table  # without the results of the first run
    page = write_report([tmp_path / "out"], tmp_path / "report", failures=9).read_text()
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert re.search(rf"^\| MMEB-V2-{HL.key} \| \d+\.\d \| \d+\.\d \| 45\.8 \|  \| 71\.4 \|", markdown, re.MULTILINE)
    gallery = page[page.index("Wrong answers") :]
    wrong = sum(map(int, re.findall(r"MMEB-V2-\S+: (\d+) of \d+ wrong", gallery)))
    assert wrong and gallery.count("<img") >= 3 * wrong and "cannot be read" not in gallery
    assert len(re.findall(r"1\. \S+ score", gallery)) == wrong  # pages by their ids


def test_all_data_are_checked_before_the_first_page(
    command: Command, mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks named one by one are checked together, and the row at fault is named."""
    (mini / "visdoc-tasks" / HL.folder / "57.png").unlink()
    monkeypatch.setattr(UniMELoader, "embed", lambda *args, **kwargs: pytest.fail("encoded before all was checked"))
    with pytest.raises(MMEBDataError, match=r"1 MMEB-V2 task cannot be evaluated:\n.*row 1: page .*57.png is missing"):
        command("-t", "MMEB-V2-VisRAG_ChartQA", f"MMEB-V2-{HL.key}", "--output-folder", str(tmp_path / "out"))


@pytest.mark.parametrize("arguments", [("-t", "MMEB-V2-VisRAG_ChartQA"), ("-b", "MMEB(eng, v2)")])
def test_an_unknown_profile_is_named(
    arguments: tuple[str, str], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMEB_V2_PROFILE", "mine")
    with pytest.raises(ValueError, match="MMEB_V2_PROFILE=mine: expected one of vlm2vec, qwen3-vl, model"):
        command(*arguments)


def test_tasks_of_one_call_are_checked_together(
    mini: Path, square_model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a program, too; what was checked together in one call is not in the next one."""
    monkeypatch.setenv("MMEB_V2_DIR", str(mini))
    (mini / "visdoc-tasks" / HL.folder / "57.png").unlink()
    chart, loader = _task("VisRAG_ChartQA"), wrap(square_model, "unime/golden")
    with monkeypatch.context() as patched:
        patched.setattr(UniMELoader, "embed", lambda *args, **kwargs: pytest.fail("encoded before all was checked"))
        with pytest.raises(MMEBDataError, match=r"row 1: page .*57.png is missing"):
            mteb.evaluate(loader, [chart, _task(HL.key)], cache=None)
    assert mteb.evaluate(loader, chart, cache=None).task_results[0].scores["test"][0]["num_queries"] == 3


def test_a_missing_archive_part_is_named(mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "hub" / "visdoc-tasks"
    hub.mkdir(parents=True)
    (hub / "visdoc-tasks.data.tar.gz-01").write_bytes(b"second part")
    monkeypatch.setenv("MMEB_V2_DIR", str(hub.parent))
    for allowed in ("0", "1"):
        monkeypatch.setenv("MMEB_ALLOW_MISSING", allowed)
        with pytest.raises(MMEBDataError, match=r"visdoc-tasks.data.tar.gz-00 is missing: download this part"):
            _task(HL.key).load_data()
        mmeb_v2_tasks()  # made when mteb is imported: says nothing yet


def test_pages_of_several_tasks_are_encoded_once(
    mini: Path, square_model: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ViDoSeek-doc` has the pages of `ViDoSeek-page-fixed`; both are loaders of our own."""
    for key in ("ViDoSeek-page-fixed", "ViDoSeek-doc"):
        shutil.copytree(mini / "annotations" / HL.hub, tmp_path / "data" / visdoc_set(key).hub)
    monkeypatch.setenv("MMEB_V2_DIR", str(tmp_path / "data"))
    loader = UniMELoader("unime/tiny", "1", model=square_model, cache_folder=tmp_path / "embeddings")
    rows: list[int] = []
    forward = type(square_model).forward

    def counted(self, features, *args, **kwargs):
        rows.append(len(features["input_ids"]))
        return forward(self, features, *args, **kwargs)

    monkeypatch.setattr(type(square_model), "forward", counted)
    first = mteb.evaluate(loader, _task("ViDoSeek-page-fixed"), cache=None).task_results[0].scores["test"][0]
    assert sum(rows) == first["num_queries"] + first["num_documents"] and "ndcg_at_5_official" not in first
    rows.clear()
    second = mteb.evaluate(loader, _task("ViDoSeek-doc"), cache=None).task_results[0].scores["test"][0]
    assert rows == [] and second["ndcg_at_5"] == first["ndcg_at_5"] and "ndcg_at_5_official" in second


class _Oracle:
    """A judge that knows the pages of the highest grade."""

    name, revision, prompt_hash = "oracle", "1", ""

    def __init__(self, task: VisDocTask) -> None:
        data = task.retrieval_data(task.hf_subsets[0], "test")
        self.grade_of = {
            (data.queries[query].text, data.corpus[page].id): grade
            for query, grades in (data.grades or {}).items()
            for page, grade in grades.items()
        }
        self.texts: set[str | None] = set()

    def listwise_scores(self, query: Item, documents: list[Item]) -> np.ndarray:
        self.texts |= {item.text for item in documents}
        return np.array([self.grade_of.get((query.text, page.id), 0) for page in documents], np.float32)

    def score(self, groups):
        return [self.listwise_scores(group.query, group.candidates) for group in groups]


@pytest.mark.parametrize("method", ["pairwise", "listwise"])
def test_the_second_stage_orders_pages_by_grade(
    method: str, mini: Path, square_model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge that knows the grades gets 1.0 of the correct nDCG; the official one is wrong even then."""
    monkeypatch.setenv("MMEB_V2_DIR", str(mini))
    task = _task(HL.key)
    oracle = _Oracle(task)
    model = TwoStage(wrap(square_model, "unime/golden"), oracle, top_k=9, method=method)
    found = mteb.evaluate(model, task, cache=None).task_results[0]
    scores = found.scores["test"][0]
    assert scores["ndcg_at_5"] == pytest.approx(1.0) and scores["ndcg_at_5_official"] < 0.95
    assert all(text.startswith("<|image_1|> Understand") for text in oracle.texts)


def test_a_real_reranker_reads_pages(
    mini: Path, square_model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMEB_V2_DIR", str(mini))
    model = TwoStage(wrap(square_model, "unime/golden"), UniMEReranker("unime-tiny", template="tiny"), top_k=3)
    result = mteb.evaluate(model, _task("VisRAG_ChartQA"), cache=None).task_results[0]
    alone = mteb.evaluate(model.embedder, _task("VisRAG_ChartQA"), cache=None).task_results[0]
    assert 0 < result.scores["test"][0]["ndcg_at_5"] <= 1
    assert result.scores["test"][0]["hit_rate_at_5"] == alone.scores["test"][0]["hit_rate_at_5"]


def test_image_tasks_alone_in_the_folder_of_mmeb(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `$MMEB_EVAL_DIR` alone, visual documents come from the hub and are not looked for there."""
    monkeypatch.delenv("MMEB_V2_DIR", raising=False)
    monkeypatch.setenv("MMEB_ALLOW_MISSING", "1")
    tasks = mmeb_v2_tasks()
    assert [task.key for task in tasks if task.local_root()] == ["CIRR", "OVEN"] and len(tasks) == 44
    next(task for task in tasks if task.key == "OVEN").load_data()


@pytest.mark.parametrize(("profile", "asked"), [("vlm2vec", PAGE_QUERY), ("qwen3-vl", PAGE_QUERY.replace(":", "."))])
def test_foreign_models_get_bodies_whatever_the_profile(
    one: Path, mini: Path, monkeypatch: pytest.MonkeyPatch, profile: str, asked: str
) -> None:
    monkeypatch.setenv("MMEB_V2_DIR", str(mini))
    monkeypatch.setenv("MMEB_V2_PROFILE", profile)
    task = _task(HL.key)
    task.load_data()
    assert task.metadata.prompt["query"] == asked
    assert "What is scope 3?" in task.dataset[task.hf_subsets[0]]["test"]["queries"]["text"]
    (images,) = (found() for found in IMAGE_TASKS if found.key == "OVEN")
    images.load_data()
    tables = images.dataset[images.hf_subsets[0]]["test"]
    for text in (*tables["queries"]["text"], *tables["corpus"]["text"]):
        assert "<|image_1|>" not in text and "Retrieve a Wikipedia" not in text
    assert images.metadata.prompt["query"].startswith("Retrieve a Wikipedia")
