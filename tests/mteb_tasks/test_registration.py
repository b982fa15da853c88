"""Registration of tasks, benchmarks and model names with mteb."""

from __future__ import annotations

import subprocess
import sys

import mteb
import pytest
from mteb.abstasks import AbsTask

import mteb_tasks
from mteb_tasks.captions import CAPTION_TASKS
from mteb_tasks.mmeb.tasks import MMEB, MMEB_TASKS
from mteb_tasks.mmeb_v2.aggregate import MMEB_V2_TASKS, MMEBV2
from mteb_tasks.scenes import SCENES_TASKS, ScenesVQA
from mteb_tasks.sugarcrepe import SugarCrepeByCategory
from unime_st.compat import add_mteb_task

TASKS: list[type[AbsTask]] = [
    *SCENES_TASKS,
    *CAPTION_TASKS,
    SugarCrepeByCategory,
    *MMEB_V2_TASKS,
    MMEBV2,
    *MMEB_TASKS,
    MMEB,
]


def test_register_twice_and_find_every_task_by_name(caplog):
    mteb_tasks.register()
    mteb_tasks.register()
    home = sys.modules["mteb.get_tasks"]
    for task in TASKS:
        assert type(mteb.get_task(task.metadata.name)) is task
        assert home._TASKS_REGISTRY[task.metadata.name] is task
        assert task not in home.TASK_LIST  # selections by language or type are mteb's own
    assert not caplog.records


def test_a_name_that_mteb_has_stays_its_own(caplog):
    class Impostor(ScenesVQA):
        metadata = ScenesVQA.metadata.model_copy(update={"name": "Banking77Classification"})

    before = mteb.get_task("Banking77Classification")
    add_mteb_task(Impostor)
    assert type(mteb.get_task("Banking77Classification")) is type(before)
    assert "already has a task named Banking77Classification" in caplog.text


@pytest.mark.parametrize("module", ["mteb_tasks.records_task"])
@pytest.mark.slow
def test_whatever_is_imported_first_the_tasks_are_known(module):
    code = f"import {module}, mteb_tasks, mteb; mteb_tasks.register(); print(mteb.get_task('ScenesVQA').metadata.name)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "ScenesVQA" and "Warning" not in found.stderr


def test_every_alias_is_a_model_that_takes_images():
    mteb_tasks.register()
    for alias in ("unime-v2", "unime-v2-2b", "unime-v1-phi3.5", "unime-tiny", "unime-v2+reranker"):
        meta = mteb.get_model_meta(alias)
        video = [] if alias == "unime-v1-phi3.5" else ["video"]
        assert meta.name == f"unime/{alias}" and meta.modalities == ["text", "image", *video]
        assert mteb.get_model_meta(meta.name) is meta
    assert mteb.get_model_meta("unime-v2").revision != "main"


@pytest.mark.slow
def test_the_benchmark_has_the_columns_of_the_papers():
    mteb_tasks.register()
    benchmark = mteb.get_benchmark("MMEB(eng, v1)")
    assert mteb.get_benchmark("MMEB") is benchmark
    assert len(benchmark.tasks) == 36
    assert len(mteb.get_benchmark("MMEB(eng, v2)").tasks) == 78
    groups = {found.name: [group.label for group in found.groups] for found in benchmark.aggregations[1:]}
    assert groups == {
        "Meta-task": ["Classification", "Vqa", "Retrieval", "Grounding"],
        "Split": ["IND", "OOD"],
    }
