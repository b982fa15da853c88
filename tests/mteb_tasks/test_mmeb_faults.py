"""MMEB data that are missing, damaged or not what the benchmark prescribes."""

from __future__ import annotations

import mteb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mmeb_rows import rewrite
from noisy_encoder import Noisy
from PIL import Image

from benchmarks.synthetic_mmeb import write_synthetic_mmeb
from mteb_tasks import evaluate
from mteb_tasks.mmeb.location import MMEBDataError
from mteb_tasks.mmeb.subsets import subset_named
from mteb_tasks.mmeb.tasks import MMEB, MMEB_TASKS, mmeb_tasks
from unime_st.data.images import BadImageError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1].update(qry_text="<|image_1|>\nFind it: x\n"), r"row 1: the query text .*Find it"),
        (lambda rows: rows[2].update(qry_img_path=""), "row 2: query path is '', expected an image"),
        (lambda rows: rows[1].update(tgt_text=[], tgt_img_path=[]), "row 1 has an empty candidate list"),
        (lambda rows: rows[0]["tgt_text"].pop(), "row 0 has not as many candidate texts"),
        (lambda rows: rows[0]["tgt_text"].__setitem__(1, "plain"), "row 0: the target text 'plain'"),
        (lambda rows: rows[0].update(tgt_text=["x"] * 1001, tgt_img_path=["y"] * 1001), "row 0 has 1001 candidates"),
        (
            lambda rows: rows[0].update(qry_img_path="OVEN/gone.png"),
            "row 0: image OVEN/gone.png of the query is missing",
        ),
        (
            lambda rows: rows[2]["tgt_img_path"].__setitem__(1, "OVEN/gone.png"),
            "row 2: image OVEN/gone.png of the candidate is missing",
        ),
        (lambda rows: rows[0].update(qry_img_path="../OVEN/q0.png"), "is missing"),
    ],
)
def test_a_faulty_row_is_named_before_anything_is_encoded(one, change, message):
    rewrite(one, change)
    task = next(task for task in MMEB_TASKS if task.subset.name == "OVEN")()
    with pytest.raises(MMEBDataError, match=message) as caught:
        task.load_data()
    assert "test-00000-of-00001.parquet" in str(caught.value)


def _dangling(file):
    image = file.parents[1] / "images" / "OVEN" / "q0.png"
    image.unlink()
    image.symlink_to("nowhere.png")


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("instruction", ["Show it.", "", None])
def test_a_target_instruction_of_its_own_is_named_in_the_fields_of_v2_too(tmp_path, monkeypatch, listed, instruction):
    write_synthetic_mmeb(tmp_path, subsets=[subset_named("CIRR")], queries=3, candidates=3, layout="v2")
    task = next(task for task in MMEB_TASKS if task.subset.name == "CIRR")
    monkeypatch.setenv("MMEB_EVAL_DIR", str(tmp_path))

    def change(rows, at=None):
        for row, content in enumerate(rows):
            given = [content["tgt_inst"]] * 3 if listed else content["tgt_inst"]
            if row == at:
                given = [given[0], instruction, given[2]] if listed else instruction
            content.update(tgt_inst=given)

    rewrite(tmp_path, change, name="CIRR")
    task().load_data()
    write_synthetic_mmeb(tmp_path, subsets=[subset_named("CIRR")], queries=3, candidates=3, layout="v2")
    rewrite(tmp_path, lambda rows: change(rows, 2), name="CIRR")
    with pytest.raises(MMEBDataError, match=f"row 2: target instruction '{instruction or ''}'"):
        task().load_data()


def test_a_quoted_instruction_needs_both_quotes():
    assert subset_named("RefCOCO").body("query", subset_named("RefCOCO").query.replace('{}"', "")) is None


def _bomb(file):
    Image.new("1", (10_000, 10_000)).save(file.parents[1] / "images" / "OVEN" / "q0.png")


def _other_types(file):
    table = pq.read_table(file)
    lists = pa.array([[{"a": "b"}]] * table.num_rows)
    pq.write_table(table.set_column(2, "tgt_text", lists).set_column(3, "tgt_img_path", lists), file)


def _second_shard_at_fault(file):
    table = pq.read_table(file)
    pq.write_table(table.slice(0, 2), file.with_name("test-00000-of-00002.parquet"))
    rest = table.slice(2).set_column(0, "qry_text", pa.array(["other words"]))
    pq.write_table(rest, file.with_name("test-00001-of-00002.parquet"))
    file.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_types, "test-00000-of-00001.parquet: its columns are not strings and lists of strings"),
        (_second_shard_at_fault, "test-00001-of-00002.parquet: row 0: the query text 'other words'"),
        (lambda file: file.write_bytes(b""), "test-00000-of-00001.parquet cannot be read"),
        (lambda file: (file.unlink(), file.mkdir()), "subset OVEN is missing"),
        (_dangling, "image OVEN/q0.png of the query is broken"),
        (_bomb, "image OVEN/q0.png of the query is broken: .* 10000 x 10000 is more than"),
    ],
)
def test_strange_files_are_named(one, change, message):
    change(one / "OVEN" / "test-00000-of-00001.parquet")
    with pytest.raises(MMEBDataError, match=message):
        next(task for task in MMEB_TASKS if task.subset.name == "OVEN")().load_data()


def test_a_second_run_in_the_same_process_checks_all_again(one, monkeypatch):
    monkeypatch.setenv("MMEB_ALLOW_MISSING", "1")
    mteb.evaluate(Noisy(), MMEB(), cache=None)
    (one / "images" / "OVEN" / "q0.png").unlink()  # CIRR, which comes first, is as it was
    monkeypatch.setattr(Noisy, "encode", lambda *args, **kwargs: pytest.fail("encoded before all was checked"))
    with pytest.raises(MMEBDataError, match=r"image OVEN/q0.png of the query is missing"):
        mteb.evaluate(Noisy(), MMEB(), cache=None)


def test_truncated_files_are_found(one):
    image = one / "images" / "OVEN" / "q0.png"
    image.write_bytes(image.read_bytes()[:-60])
    table = one / "CIRR" / "test-00000-of-00001.parquet"
    table.write_bytes(table.read_bytes()[:-20])
    tasks = [task for task in mmeb_tasks() if task.subset.name in ("OVEN", "CIRR")]
    for task in tasks:
        task.run = tasks
    with pytest.raises(MMEBDataError, match="2 MMEB subsets") as caught:
        tasks[0].load_data()
    assert "q0.png" in str(caught.value) and "CIRR/test-00000-of-00001.parquet cannot be read" in str(caught.value)


def _damage(image):
    content = bytearray(image.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 20] = bytes(20)
    image.write_bytes(content)


def test_damage_in_the_middle_of_a_image_is_found_before_and_named_after_the_start(one, tiny, monkeypatch):
    image = one / "images" / "CIRR" / "t1.png"
    task = next(task for task in mmeb_tasks() if task.subset.name == "CIRR")
    task.run = ()
    task.load_data()
    # The damage comes after the last look at the data.
    monkeypatch.setattr("mteb_tasks.evaluate_hook.follow_environment", lambda task: None)
    _damage(image)
    with pytest.raises(BadImageError, match=r"MMEB-CIRR, document \w+ of query q\d: .*t1.png: cannot be decoded"):
        evaluate(tiny, [task])
    with pytest.raises(MMEBDataError, match=r"row \d: image CIRR/t1.png of the candidate is broken") as caught:
        next(task for task in MMEB_TASKS if task.subset.name == "CIRR")().load_data()
    assert "MMEB_ALLOW_MISSING" not in str(caught.value)


def test_missing_subsets_stop_the_run_or_are_listed_in_the_result(one, monkeypatch):
    with pytest.raises(MMEBDataError, match=r"34 MMEB subsets cannot be evaluated \(set MMEB_ALLOW_MISSING=1"):
        mteb.evaluate(Noisy(), MMEB(), cache=None)
    monkeypatch.setenv("MMEB_ALLOW_MISSING", "1")
    (scores,) = mteb.evaluate(Noisy(), MMEB(), cache=None)[0].scores["test"]
    assert scores["num_tasks"] == 2 and len(scores["left_out"]) == 34 and "OK-VQA" in scores["left_out"]
