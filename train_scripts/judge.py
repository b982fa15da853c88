"""Let a multimodal language model judge mined candidates, and choose the negatives.

python train_scripts/judge.py tiny [--option value ...]
"""

from __future__ import annotations

from unime_st.training.arguments import JudgeArguments, parse, set_up_logging

if __name__ == "__main__":
    set_up_logging()
    arguments = parse(JudgeArguments, __doc__)
    from unime_st.training.offline import run_judge  # after --help: this imports torch

    run_judge(arguments)
