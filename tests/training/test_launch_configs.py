"""The configurations for ``accelerate launch`` hold nothing that accelerate does not know."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from unime_st.data.records import RecordSet
from unime_st.data.scenes import training_records
from unime_st.stages import InBatchArguments, train_in_batch

CONFIGS = Path(__file__).resolve().parents[2] / "train_scripts" / "accelerate"


def _launched(name: str, section: str) -> Namespace:
    """What the launcher makes of a configuration; it refuses unknown keys, but not those within a section."""
    parser = launch_command_parser()
    known = {action.dest for action in parser._actions}
    assert yaml.safe_load((CONFIGS / name).read_text())[section].keys() <= known
    arguments, _, _ = _validate_launch_command(parser.parse_args(["--config_file", str(CONFIGS / name), "script.py"]))
    assert arguments.mixed_precision == "no"  # or `precision: fp32` would be computed in something else
    return arguments


def test_fsdp2(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _launched("fsdp2.yaml", "fsdp_config")
    assert arguments.use_fsdp
    for name, value in prepare_multi_gpu_env(arguments).items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert plugin.cpu_ram_efficient_loading is False


def test_deepspeed() -> None:
    arguments = _launched("deepspeed_zero2.yaml", "deepspeed_config")
    assert arguments.use_deepspeed and arguments.zero_stage == 2


def test_deepspeed_with_gradient_caching_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = RecordSet.write(tmp_path / "records", training_records(8), {})
    options = InBatchArguments(
        data=str(records.folder), output=str(tmp_path / "out"), per_device_train_batch_size=4, mini_batch_size=2
    )
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as the launcher sets it
    with pytest.raises(ValueError, match=r"DeepSpeed cannot train with gradient caching.* mini_batch_size"):
        train_in_batch(options)
