"""mteb's own command with our tasks and models, and the table at its end."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys

import pytest
from mteb.models.model_implementations import MODEL_REGISTRY

from benchmarks.synthetic_mmeb import write_synthetic_mmeb
from mteb_tasks import published, two_stage
from mteb_tasks.cli import main
from mteb_tasks.loader import UniMELoader
from mteb_tasks.mmeb.location import MMEBDataError
from mteb_tasks.mmeb.subsets import SUBSETS, subset_named
from mteb_tasks.models import metas
from mteb_tasks.run_context import current_run
from mteb_tasks.run_hook import with_scores
from mteb_tasks.scenes import ScenesVQA
from mteb_tasks.scores import score_table
from unime_st import UniMEReranker


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    subsets = [subset_named(name) for name in ("OK-VQA", "WebQA", "CIRR")]
    return write_synthetic_mmeb(tmp_path_factory.mktemp("mini"), subsets=subsets, queries=6, candidates=4)


@pytest.fixture
def command(mini, tiny_folder, tmp_path, mteb_run):
    """mteb's command line in this process: gives the table that it wrote to standard output."""
    run = mteb_run(MMEB_EVAL_DIR=mini, UNIME_MODEL=tiny_folder)

    def table(*arguments, model="unime-local"):
        shown = run(model, *arguments, "--output-folder", str(tmp_path / "out"))
        return shown[shown.index(f"{model.removeprefix('unime/')} ") :]

    return table


def test_a_run_ends_with_the_score_table_and_the_next_one_repeats_it(command, tmp_path, monkeypatch):
    with pytest.raises(MMEBDataError, match="33 MMEB subsets cannot be evaluated"):
        command("-t", "MMEB")
    table = command("-t", "MMEB", "--allow-missing")
    rows = dict(re.findall(r"^(MMEB\S*(?: \S+)*?)\s{2,}(\d+\.\d)", table, re.MULTILINE))
    assert {"MMEB-OK-VQA", "MMEB-WebQA", "MMEB-CIRR", "MMEB (3 of 36) overall", "MMEB (3 of 36) vqa"} <= set(rows)
    (written,) = (tmp_path / "out").rglob("MMEB.json")
    (scores,) = json.loads(written.read_text())["scores"]["test"]
    assert float(rows["MMEB (3 of 36) overall"]) == pytest.approx(100 * scores["main_score"], abs=0.06)
    assert len(scores["left_out"]) == 33
    monkeypatch.setattr(UniMELoader, "embed", lambda *args, **kwargs: pytest.fail("scored again"))
    assert command("-t", "MMEB", "--allow-missing") == table


def test_single_subsets_are_checked_together_and_left_out_where_allowed(command, monkeypatch, caplog):
    with monkeypatch.context() as patched:
        patched.setattr(UniMELoader, "embed", lambda *args, **kwargs: pytest.fail("encoded before all was checked"))
        with pytest.raises(MMEBDataError, match=r"1 MMEB subset cannot .* \(set MMEB_ALLOW_MISSING=1.*\n.*GQA"):
            command("-t", "MMEB-OK-VQA", "MMEB-GQA")
    table = command("-t", "MMEB-OK-VQA", "MMEB-GQA", "--allow-missing")
    assert "MMEB-OK-VQA" in table and "MMEB-GQA" not in table
    assert "no data of them: MMEB-GQA" in caplog.text


def test_the_full_name_of_a_model_finds_its_published_scores(command, monkeypatch):
    monkeypatch.setitem(published.MMEB_TASKS, "unime-local", {"CIRR": 50.0})
    table = command("-t", "MMEB-CIRR", model="unime/unime-local")
    assert re.search(r"^MMEB-CIRR +\d+\.\d +50\.0 ", table, re.MULTILINE)
    assert table == command("-t", "MMEB-CIRR")


def test_captions_are_shown_at_all_depths_under_their_names():
    scores = {"hit_rate_at_1": 0.9, "hit_rate_at_5": 0.95, "hit_rate_at_10": 1.0, "main_score": 0.9}
    scores |= {"recall_at_1": 0.18, "recall_at_5": 0.76, "recall_at_10": 0.96}
    table = score_table({"Flickr30k1kI2TRetrieval": {"default": scores}}, "unime-v2")
    assert re.search(r"^Flickr30k1kI2TRetrieval +90\.0 +93\.7 +-3\.7$", table, re.MULTILINE)
    head, values = table.splitlines()[-3], table.splitlines()[-1]
    shown = dict(zip(head.split()[1:], values.split()[1:]))
    assert shown == {
        "hit@1": "90.0", "hit@5": "95.0", "hit@10": "100.0", "recall@1": "18.0", "recall@5": "76.0", "recall@10": "96.0"
    }  # fmt: skip


def test_two_stages_end_with_what_reranking_took(command, tmp_path, monkeypatch):
    reranker = tmp_path / "reranker"
    UniMEReranker("unime-tiny", template="tiny").save_pretrained(str(reranker))
    monkeypatch.setenv("UNIME_RERANKER", str(reranker))
    monkeypatch.setattr(two_stage, "COSTS", {})
    name = "unime-tiny+reranker"
    monkeypatch.setitem(MODEL_REGISTRY, name, metas()[name])
    took = r"^MMEB-OK-VQA: reranking took, per query, [\d.]+ forwards, \d+ tokens, \d+ image patches$"
    assert re.search(took, command("-t", "MMEB-OK-VQA", model=name), re.MULTILINE)


@pytest.mark.slow
def test_our_tasks_are_listed_in_a_process_that_only_knows_mteb_s_command():
    code = "from mteb_tasks.cli import main; main()"
    arguments = ["available-tasks", "-t", "MMEB-GQA", "Urban1KT2IRetrieval", "SugarCrepeByCategory", "MMEB"]
    listed = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    for name in (*arguments[2:], "Any2AnyRetrieval"):
        assert name in listed.stdout


@pytest.mark.slow
def test_mteb_s_own_trial_of_a_model_passes(tmp_path, converted):
    """With a model of texts and images: for those that take videos mteb asks for the package av."""
    command = [sys.executable, "-m", "mteb", "mock-run", "-m", "unime-local+reranker"]
    environment = {**os.environ, "UNIME_MODEL": str(converted("llava-1.6")), "UNIME_RERANKER": "unime-tiny"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    assert "`unime/unime-local+reranker` passed all expected checks" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("model", "variables"),
    [("unime-local", "UNIME_MODEL"), ("unime/unime-local+reranker", "UNIME_MODEL and UNIME_RERANKER")],
)
def test_a_model_without_its_variables_says_which_to_set(monkeypatch, model, variables):
    monkeypatch.delenv("UNIME_MODEL", raising=False)
    monkeypatch.delenv("UNIME_RERANKER", raising=False)
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(ValueError, match=f"set {variables}$"):
        main(["run", "-m", model, "-t", "ScenesVQA"])


def test_published_scores_stand_beside_a_complete_mmeb_only():
    scores = {f"MMEB-{subset.name}": {"default": {"main_score": 0.712}} for subset in SUBSETS}
    table = score_table(scores, "unime-v2")
    assert re.search(r"MMEB overall +71\.2 +71\.2 +\+0\.0$", table, re.MULTILINE)
    assert re.search(r"MMEB OOD +71\.2 +66\.7 +\+4\.5$", table, re.MULTILINE)
    del scores["MMEB-GQA"]
    assert re.search(r"MMEB \(35 of 36\) overall +71\.2$", score_table(scores, "unime-v2"), re.MULTILINE)


def test_sugarcrepe_is_shown_by_category_and_group():
    scores = {
        "SugarCrepeByCategory": {"swap_obj-local-1": {"main_score": 0.5}, "swap_att-local-1": {"main_score": 0.7}}
    }
    table = score_table(scores, "unime-v2")
    assert re.search(r"SugarCrepeByCategory swap +60\.0 +73\.7 +-13\.7$", table, re.MULTILINE)
    assert re.search(r"SugarCrepeByCategory mean +60\.0$", table, re.MULTILINE)  # published over seven categories
    del scores["SugarCrepeByCategory"]["swap_att-local-1"]
    assert re.search(r"SugarCrepeByCategory swap +50\.0$", score_table(scores, "unime-v2"), re.MULTILINE)


def test_no_scores_no_table():
    assert score_table({}, "unime-v2") == ""


def test_help_is_shown_without_arguments_and_lists_allow_missing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["unime-mteb"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "--allow-missing" in shown and "available-tasks" in shown


def test_a_run_ends_well_although_its_table_cannot_be_made(tmp_path, caplog):
    """The results are written by then: a damaged one is logged with its cause."""
    task, meta = ScenesVQA(size=1), metas()["unime-tiny"]

    def run(args):
        current = current_run()
        current.tasks, current.model_meta = [task], meta
        file = tmp_path / "results" / meta.name.replace("/", "__") / meta.revision / f"{task.metadata.name}.json"
        file.parent.mkdir(parents=True)
        file.write_text('{"scores": ')

    with_scores(run)(
        argparse.Namespace(verbosity=2, model="unime-tiny", tasks=None, benchmarks=None, output_folder=str(tmp_path))
    )
    assert "the table of scores could not be made; the results are written" in caplog.text
