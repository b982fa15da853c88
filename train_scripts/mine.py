"""Global retrieval: find the hard candidates of every pair.

python train_scripts/mine.py tiny [--option value ...]
"""

from __future__ import annotations

from unime_st.training.arguments import MineArguments, parse, set_up_logging

if __name__ == "__main__":
    set_up_logging()
    arguments = parse(MineArguments, __doc__)
    from unime_st.training.offline import run_mine  # after --help: this imports torch

    run_mine(arguments)
