"""Scoring: logits of a generative vision-language model behind a query and its candidates.

Judging and reranking share this package: prompts and their checks (:mod:`~unime_st.scoring.prompts`), loading a model
as a scorer (:mod:`~unime_st.scoring.loading`), and the engine that computes the common prefix of prompts and every
image once (:mod:`~unime_st.scoring.pair_scorer`, :mod:`~unime_st.scoring.list_scorer`).
"""
