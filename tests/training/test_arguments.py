"""Options of the training stages: stock names, former names, checks in YAML, command line and Python."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.cross_encoder import CrossEncoderTrainingArguments

from unime_st import stages
from unime_st.options import OptionError, options_of, read_options
from unime_st.stages import STAGES, HardNegativeArguments, InBatchArguments, RerankerArguments, SoftLabelArguments
from unime_st.stages.command import main, parse
from unime_st.stages.mine import MineArguments

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "unime_st" / "configs"


def _yaml(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text)
    return str(path)


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = _yaml(tmp_path, "max_steps: 7\nlearning_rate: 3e-4\nuse_dora: true\n")
    arguments = parse(InBatchArguments, None, [path, "--max_steps", "9"])
    assert (arguments.max_steps, arguments.learning_rate, arguments.use_dora) == (9, 3e-4, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnig_rate: 1\n", "line 1: unknown option 'learnig_rate'; did you mean 'learning_rate'"),
        ("- 1\n", "expected `option: value`"),
        ("a: [1\n", "expected"),
        ("? [a]\n: b\n", "line 1: the name of an option must be a word"),
        ("seed: 1\nprecision: fp8\n", "precision: expected one of fp32, bf16, fp16, found fp8"),
        ("seed: 1\nlearning_rate: .nan\n", "line 2: learning_rate: expected a number above 0, found nan"),
        ("per_device_train_batch_size: true\n", "expected an integer of at least 1, found true"),
        ("save_steps: -5\n", "save_steps: expected a number above 0, found -5"),
        ("weight_decay: -1\n", "weight_decay: expected a number of at least 0, found -1"),
        (
            "learning_rate: 1e+30\n",
            "expected a number above 0, found 1e+30; numbers must lie between -2**63 and 2**63",
        ),
        ("seed: 9223372036854775808\n", "found 9223372036854775808; numbers must lie between -2**63 and 2**63"),
        ("lr_scheduler_type: liner\n", "did you mean linear?"),
        ("matryoshka_dims: []\n", "matryoshka_dims: expected a list of integers of at least 1"),
        ("matryoshka_dims: 64\n", "expected a list of integers"),
        ("model: 7\n", "model: expected text, found 7"),
        ("lora_rank: 2\nlora_rank: 4\n", "line 2: lora_rank was given in line 1 already"),
        ("matryoshka_dims: &a [*a]\n", "the anchor contains itself"),
        ("batch_size: 4\nper_device_train_batch_size: 8\n", "batch_size is the former name"),
        ("warmup_ratio: 5\n", "warmup_ratio: expected a number of at least 0 and below 1 (or none), found 5"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    path = _yaml(tmp_path, text)
    with pytest.raises(SystemExit) as end:
        parse(InBatchArguments, None, [path])
    error = capsys.readouterr().err
    assert end.value.code == 2 and path in error and message in error and len(error.strip().splitlines()) == 1


def test_other_encodings_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes("model: caf\xe9\n".encode("latin-1"))
    with pytest.raises(SystemExit):
        parse(InBatchArguments, None, [str(path)])
    assert "expected UTF-8 text" in capsys.readouterr().err


def test_a_missing_file_is_named(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse(InBatchArguments, None, ["absent.yaml"])
    assert "absent.yaml: no such configuration file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"learning_rate": float("nan")}, "learning_rate: expected a number above 0, found nan"),
        ({"max_steps": 0}, "max_steps: expected -1 or an integer of at least 1"),
        ({"gradient_accumulation_steps": True}, "expected an integer of at least 1, found true"),
        ({"num_train_epochs": -1}, "num_train_epochs: expected a number above 0"),
        ({"lora_dropout": -1}, "lora_dropout"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16 exclude each other"),
        ({"report_to": "nonsense"}, "report_to: expected one of all, none, .*tensorboard.*, found nonsense"),
        ({"report_to": "clearml"}, "clearml is not installed"),
        ({"batch_sampler": "no_duplicates"}, "batch_sampler cannot be set here: .* no item twice"),
        ({"eval_strategy": "steps"}, "eval_strategy needs held-out records"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end needs held-out records"),
        ({"quantize": "nf4", "lora_rank": 0}, "quantize needs an adapter"),
        ({"frozen": "visual"}, "frozen goes with lora_rank 0"),
        ({"mini_batch_size": 2, "token_budget": 64}, "exclude each other"),
        ({"bach_size": 2}, "bach_size is not an option of InBatchArguments: leave it out"),
        ({"batch_size": 2, "per_device_train_batch_size": 4}, "batch_size is the former name"),
    ],
)
def test_python_is_checked_like_the_file(option: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        InBatchArguments(**option)


def test_stock_options_have_their_stock_names_and_the_classes_are_the_stock_trainers() -> None:
    stock = {
        "optim": "sgd", "weight_decay": 0.1, "adam_beta2": 0.98, "run_name": "first", "push_to_hub": True,
        "hub_model_id": "me/model", "warmup_steps": 7, "lr_scheduler_kwargs": {"num_cycles": 2}, "data_seed": 3,
    }  # fmt: skip
    embedder, reranker = SoftLabelArguments(**stock), RerankerArguments(**stock)
    assert isinstance(embedder, SentenceTransformerTrainingArguments)
    assert isinstance(reranker, CrossEncoderTrainingArguments)
    for arguments in (embedder, reranker):
        assert {name: getattr(arguments, name) for name in stock} == stock


def test_former_names_work_with_one_warning_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    former = {
        "batch_size": 8, "epochs": 2.0, "save_every": 5, "log_every": 3, "scheduler": "cosine", "precision": "bf16",
        "workers": 1, "drop_last": False, "warmup_ratio": 0.3,
    }  # fmt: skip
    present = {
        "per_device_train_batch_size": 8, "num_train_epochs": 2.0, "save_steps": 5, "logging_steps": 3,
        "lr_scheduler_type": "cosine", "bf16": True, "fp16": False, "dataloader_num_workers": 1,
        "dataloader_drop_last": False, "warmup_steps": 0.3,
    }  # fmt: skip
    with pytest.warns(FutureWarning) as warned:
        found = [InBatchArguments(**former)]
    assert len(warned) == len(former)
    words = [word for name, value in former.items() for word in (f"--{name}", str(value))]
    lines = "".join(f"{name}: {str(value).lower() if value is False else value}\n" for name, value in former.items())
    for argv in (words, [_yaml(tmp_path, lines)]):
        caplog.clear()
        with pytest.warns(FutureWarning) as warned:  # of the stock name warmup_ratio
            found.append(parse(InBatchArguments, None, argv))
        assert len(warned) + len(caplog.records) == len(former)
    for arguments in found:
        assert {name: getattr(arguments, name) for name in present} == present


def test_where_the_result_lies_is_not_part_of_the_plan() -> None:
    first, second = HardNegativeArguments(output="a", dataloader_num_workers=2), HardNegativeArguments(output="b")
    assert first.plan() == second.plan() and first.plan() != HardNegativeArguments(num_negatives=4).plan()
    assert first.plan() != HardNegativeArguments(weight_decay=0.1).plan()
    assert "weight_decay" not in first.plan()  # a newer transformers with more options does not change the plan


def test_options_may_be_none(tmp_path: Path) -> None:
    path = _yaml(tmp_path, "label_temperature:\nmini_batch_size: 4\n")
    arguments = parse(SoftLabelArguments, None, [path])
    assert arguments.label_temperature is None and arguments.mini_batch_size == 4


@pytest.mark.parametrize(("text", "value"), [("positive", "positive"), ("None", None), ("0.5", 0.5)])
def test_ceiling(text: str, value: object) -> None:
    assert MineArguments(max_similarity=text).max_similarity == value


def test_a_strange_ceiling_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a number, or one of positive \(or none\)"):
        MineArguments(max_similarity="high")


@pytest.mark.parametrize("option", [{"token_budget": "200"}, {"sub_batch_size": 4}, {"dataset_temperature": 2.0}])
def test_what_the_reranker_would_ignore_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))} .* leave it out"):
        RerankerArguments(**option)


@pytest.mark.parametrize("stage", STAGES)
def test_source_and_imported_class_declare_the_same(stage: str) -> None:
    """The command line reads the source, Python the class."""
    read = read_options(f"unime_st.stages.{stage}", STAGES[stage].options)
    assert read == options_of(getattr(stages, STAGES[stage].options))


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "train_scripts").glob("*.py")))
def test_every_script_explains_itself(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "train_scripts" / script), run_name="__main__")
    text = capsys.readouterr().out
    assert end.value.code in (0, None) and "\n  --output FOLDER\n" in text and "example: " in text
    assert "default: )" not in text and text.count("--output ") == 1 + text.partition("options:")[0].count("--output ")


def test_the_help_of_a_stage_lists_every_option_once(capsys: pytest.CaptureFixture) -> None:
    assert main("soft_labels", ["--help_all"], program="unime soft_labels") == 0
    text = capsys.readouterr().out
    names = [line.split()[0][2:] for line in text.splitlines() if line.startswith("  --")]
    assert len(names) == len(set(names)) and {"weight_decay", "optim", "push_to_hub", "divergence"} <= set(names)


@pytest.mark.parametrize("config", sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml")))
def test_every_config_is_read_by_its_stage(
    config: str, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    stage = config.split("/")[0]
    kind = getattr(stages, STAGES[stage].options)
    words = ["--image_root", str(ROOT)] if config.endswith("released.yaml") else []
    words += ["--cluster_pools", str(ROOT)] if config.endswith("clusters.yaml") else []
    if "bf16: true" in (CONFIGS / config).read_text():
        words += ["--use_cpu", "true"]
    assert parse(kind, None, [str(CONFIGS / config), *words])
    assert not caplog.records and not [entry for entry in recwarn if entry.category is FutureWarning]


@pytest.mark.parametrize("config", sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/*.yaml")))
def test_every_line_of_a_papers_row_says_where_it_is_from(config: str) -> None:
    lines = (CONFIGS / config).read_text().splitlines()
    if any("[paper]" in line for line in lines if not line.startswith("#")):
        bare = [line for line in lines if line and not line.startswith("#") and "# [" not in line]
        assert [line for line in bare if not line.startswith(("model: unime-tiny", "layout:", "pairs:", " "))] == []
