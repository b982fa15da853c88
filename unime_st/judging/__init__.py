"""Judging: judges that score (query, candidate) pairs, stored scores, selection of hard negatives, calibration."""

from __future__ import annotations

from unime_st.judging.cascade_judge import CascadeJudge
from unime_st.judging.http_judge import HttpJudge, ServerError
from unime_st.judging.local_judge import LocalJudge
from unime_st.scoring.groups import Group, Judge, PairError
from unime_st.scoring.prompts import (
    LIST_PROMPT,
    PAIR_PROMPT,
    answer_token_ids,
    as_item,
    check_template,
    clean_text,
    load_template,
)

__all__ = [
    "LIST_PROMPT",
    "PAIR_PROMPT",
    "CascadeJudge",
    "Group",
    "HttpJudge",
    "Judge",
    "LocalJudge",
    "PairError",
    "ServerError",
    "answer_token_ids",
    "as_item",
    "check_template",
    "clean_text",
    "load_template",
]
