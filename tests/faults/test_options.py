"""Options: the values of public reports are refused in one line, by file, by command line and in Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from unime_st.options import OptionError, check_needs, check_required, read_options
from unime_st.stages import STAGES
from unime_st.stages.command import read_values

REPORTED: list[tuple[str, str, Any, str]] = [
    ("in_batch", "batch_size", 0, "integer of at least 1, found 0"),
    ("in_batch", "batch_size", True, "integer of at least 1, found true"),
    ("in_batch", "learning_rate", float("nan"), "number above 0, found nan"),
    ("in_batch", "epochs", -1, "number above 0, found -1"),
    ("in_batch", "save_every", 0, "number above 0, found 0"),
    ("in_batch", "warmup_ratio", 5, "at least 0 and below 1"),
    ("in_batch", "lora_dropout", -1, "at least 0 and below 1"),
    ("in_batch", "token_budget", 0, "integer of at least 1"),
    ("judge", "score_divisor", -1, "number above 0, found -1"),
    ("judge", "margin", -1, "number of at least 0, found -1"),
    ("judge", "shard_size", -1, "integer of at least 1, found -1"),
    ("judge", "strong_band", -1, "number of at least 0, found -1"),
    ("hard_negatives", "parallelism_config", 7, "found 7"),
    ("in_batch", "batch_sampler", 7, "found 7"),
    ("import_data", "pairs", [], "list of mappings"),
]


@pytest.mark.parametrize(("stage", "name", "value", "message"), REPORTED)
def test_reported_options(tmp_path: Path, stage: str, name: str, value: Any, message: str):
    known = read_options(f"unime_st.stages.{stage}", STAGES[stage].options)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({name: value}), encoding="utf-8")
    with pytest.raises(OptionError, match=f"line 1: .*{message}") as found:
        read_values([str(path)], known)
    assert "\n" not in str(found.value)
    if not isinstance(value, list):
        with pytest.raises(OptionError, match=message):
            read_values([f"--{name}", str(value).lower()], known)


@pytest.mark.parametrize(
    ("stage", "name", "value", "needed"),
    [
        ("in_batch", "cluster_size", 4, "cluster_pools"),
        ("in_batch", "hardness_mode", "all_negatives", "hardness_strength"),
        ("in_batch", "partition_mode", "per_direction", "directions"),
        ("soft_labels", "false_negative_margin", 0.0, "in_batch_weight"),
        ("judge", "strong_band", 3.0, "strong_model"),
        ("judge", "concurrency", 8, "url"),
        ("mine", "workers", 4, "engine"),
    ],
)
def test_options_without_effect_are_refused(stage: str, name: str, value: object, needed: str) -> None:
    known = read_options(f"unime_st.stages.{stage}", STAGES[stage].options)
    with pytest.raises(
        OptionError, match=f"^{name} has no effect without {needed}: set {needed}, or leave out {name}.$"
    ):
        check_required({name: value}, known)
    check_needs({name: value, needed: "ray" if needed == "engine" else 1}, known)
    check_needs({name: known[name].default}, known)


@pytest.mark.parametrize(
    ("name", "words"), [("quantization_aware", "int8 binary int8"), ("matryoshka_dims", "64 32 64")]
)
def test_values_of_a_list_come_once(name: str, words: str) -> None:
    with pytest.raises(OptionError, match=f"{name}: expected each value once, found {words.split()[0]} twice"):
        read_values(
            [f"--{name}", *words.split()], read_options("unime_st.stages.in_batch", STAGES["in_batch"].options)
        )


@pytest.mark.parametrize("words", ["--seed 1 --seed 2", "--seed 1 --seed=1", "--overwrite --no_overwrite"])
def test_option_given_twice(words: str):
    with pytest.raises(OptionError, match="given twice"):
        read_values(words.split(), read_options("unime_st.stages.in_batch", STAGES["in_batch"].options))
