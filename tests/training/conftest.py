"""Folders of the pipeline between the trainings, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

import unime_st
from unime_st import stages
from unime_st.data.records import RecordSet
from unime_st.data.scenes import training_records


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records, pools, scores and judged rows of the real pipeline."""
    unime_st.register()
    folder = tmp_path_factory.mktemp("run")
    RecordSet.write(folder / "records", training_records(40), {})
    stages.run_mine(
        stages.MineArguments(
            data=str(folder / "records"), output=str(folder / "pools"), num_candidates=8, max_similarity="none"
        )
    )
    stages.run_judge(
        stages.JudgeArguments(
            data=str(folder / "pools"),
            template="tiny",
            scores=str(folder / "scores"),
            output=str(folder / "rows"),
            stride=1,
            num_negatives=5,
        )
    )
    return folder
