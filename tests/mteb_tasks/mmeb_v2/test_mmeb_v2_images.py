"""Image tasks of MMEB-V2: rows of MMEB, native pixels, own names; and the pixel rule of the released code."""

from __future__ import annotations

import copy
import io
import json
import tarfile
from pathlib import Path

import mteb
import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer

from benchmarks.synthetic_mmeb import write_synthetic_mmeb
from mteb_tasks.columns import setting_of
from mteb_tasks.loader import wrap
from mteb_tasks.mmeb.subsets import SUBSETS, subset_named
from mteb_tasks.mmeb.tasks import MMEB_TASKS
from mteb_tasks.mmeb_v2.image_tasks import IMAGE_TASKS, system_turn, text_alone
from mteb_tasks.mmeb_v2.profiles import PROFILES
from mteb_tasks.ruled_images import RuledItem, open_image, prescribed_model
from unime_st.data.images import ImageRef
from unime_st.data.items import Item
from unime_st.encoding.replicas import with_processor


def _image(size: tuple[int, int], mode: str = "RGB", **options) -> ImageRef:
    buffer = io.BytesIO()
    Image.new(mode, size, 0 if mode == "P" else None).save(buffer, "PNG", **options)
    return ImageRef(data=buffer.getvalue())


def test_image_sizes_are_those_of_the_released_code(golden_v2: Path, golden_model: SentenceTransformer) -> None:
    rule = PROFILES["vlm2vec"].pixels
    model = prescribed_model(golden_model, rule, None)
    for case in json.loads((golden_v2 / "texts" / "behaviour.json").read_text())["sizes"]:
        if case["kind"] == "image":
            image = open_image(_image(tuple(case["size"])), rule)
            features = model[0].processor.image_processor(images=[image], return_tensors="pt")
            assert features["image_grid_thw"].tolist() == [case["grid_thw"]], case["size"]


def test_transparency_and_orientation_are_dropped() -> None:
    rule, exif = PROFILES["vlm2vec"].pixels, Image.Exif()
    exif[0x0112] = 6
    assert open_image(_image((60, 40), exif=exif), rule).size == (60, 40)
    assert open_image(_image((60, 40), "RGBA"), rule).getpixel((0, 0)) == (0, 0, 0)
    assert Item(image=_image((60, 40), "RGBA")).to_input()["image"].getpixel((0, 0)) == (255, 255, 255)
    assert open_image(_image((10, 40), "P"), rule).size == (56, 56)


def test_the_model_stays_as_it_is(square_model: SentenceTransformer) -> None:
    before = (square_model[0].processor.image_size, dict(square_model[0].processor.image_processor.size))
    twin = prescribed_model(square_model, PROFILES["vlm2vec"].pixels, None)
    assert twin[0].processor.image_side is None and square_model[0].processor.image_side == 112
    assert before == (square_model[0].processor.image_size, dict(square_model[0].processor.image_processor.size))


def test_images_fit_into_a_small_context(square_model: SentenceTransformer, caplog: pytest.LogCaptureFixture) -> None:
    """A model that takes few tokens gets smaller images, and a warning."""
    small = with_processor(square_model, lambda processor: processor)
    small[0].processor.tokenizer = copy.copy(small[0].processor.tokenizer)
    small[0].processor.tokenizer.model_max_length = 1024
    rule = PROFILES["vlm2vec"].pixels
    model = prescribed_model(small, rule, None)
    features = model.preprocess([RuledItem.of(Item(image=_image((2000, 2000))), rule).to_input()])
    assert 800 < features["input_ids"].shape[1] <= 1024 and "takes 1024 tokens" in caplog.text


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows of OVEN and CIRR in the layout of MMEB-V2: annotations, and images in the archive of the hub."""
    source, root = tmp_path / "source", tmp_path / "v2"
    write_synthetic_mmeb(source, subsets=[subset_named("OVEN"), subset_named("CIRR")], queries=3, candidates=3)
    for name in ("OVEN", "CIRR"):
        target = root / "annotations" / "ziyjiang" / "MMEB_Test_Instruct" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (source / name).rename(target)
    (root / "image-tasks").mkdir()
    with tarfile.open(root / "image-tasks" / "mmeb_v1.tar.gz", "w:gz") as archive:
        archive.add(source / "images", "MMEB")
    monkeypatch.setenv("MMEB_V2_DIR", str(root))
    return root


def test_scores_are_those_of_native_images(rows: Path, square_model: SentenceTransformer) -> None:
    """Rows are those of MMEB; embeddings are those of the model without its square."""
    loader = wrap(square_model, "unime/golden")
    for name in ("OVEN", "CIRR"):
        (task,) = (task() for task in IMAGE_TASKS if task.key == name)
        assert "3 queries (published: 1,000)" in task.check_data(rows)
        found = mteb.evaluate(loader, task, cache=None).task_results[0]
        assert found.task_name == f"MMEB-V2-{name}" and found.scores["test"][0]["profile"] == "vlm2vec"
        task.load_data()
        corpus = task.dataset[task.hf_subsets[0]]["test"]["corpus"]
        assert setting_of(corpus).pixels == "3136-1003520-28" and setting_of(corpus).style == "mmeb"
        data = task.retrieval_data(task.hf_subsets[0], "test")
        item, rule = next(iter(data.queries.values())), PROFILES["vlm2vec"].pixels
        model = prescribed_model(square_model, rule, None)
        expected = model.encode([RuledItem.of(item, rule).to_input()])
        assert abs(loader.embed([[item]], setting=setting_of(corpus)) - expected).max() < 1e-6
        assert abs(loader.embed([[item]]) - expected).max() > 1e-3  # the square of the recipe


def test_names_and_texts() -> None:
    """Names are the leaderboard's; the system turn of Qwen3-VL has the instruction alone."""
    assert [task.metadata.name for task in IMAGE_TASKS] == [f"MMEB-V2-{subset.name}" for subset in SUBSETS]
    assert not {task.__name__ for task in IMAGE_TASKS} & {task.__name__ for task in MMEB_TASKS}
    assert system_turn(subset_named("OK-VQA")) == "Represent the given image with the following question:"
    assert system_turn(subset_named("RefCOCO")).endswith("language expressions.")
    assert system_turn(subset_named("MSCOCO")) == "Crop the image to to isolate the object labeled as."
    dialogue = (
        "<|image_1|>\nRepresent the given dialogue about an image, which is used for image retrieval: Q:a\nA:b\n\n"
    )
    assert text_alone(subset_named("VisDial"), "query", dialogue.partition("\n")[2]) == "Q:a\nA:b"
    assert text_alone(subset_named("OK-VQA"), "target", " yes ") == " yes "
    stray = "<|image_1|>\nFind a Wikipedia image that answers this question: Who?\n"
    assert text_alone(subset_named("WebQA"), "query", stray) == "Who?"
