"""UniME-V2-Reranker: pairwise and listwise answers from the judged rows.

python train_scripts/reranker.py tiny [--option value ...]
"""

from __future__ import annotations

from unime_st.training.arguments import RerankerArguments, parse, set_up_logging

if __name__ == "__main__":
    set_up_logging()
    arguments = parse(RerankerArguments, __doc__)
    from unime_st.training.stages import train_reranker  # after --help: this imports torch

    train_reranker(arguments)
