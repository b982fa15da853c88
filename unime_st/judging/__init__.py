"""The MLLM judge: prompts, the protocol of anything that scores pairs, and judges here and elsewhere."""

from __future__ import annotations

from unime_st.judging.cascade import CascadeJudge
from unime_st.judging.http import HttpJudge, ServerError
from unime_st.judging.judge import Group, Judge, LocalJudge, PairError
from unime_st.scoring.prompts import (
    LIST_PROMPT,
    PAIR_PROMPT,
    answer_token_ids,
    as_item,
    check_template,
    clean_text,
    index_token_ids,
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
    "index_token_ids",
    "load_template",
]
