"""UniME stage 2: in-batch hard negatives after filtering false ones.

python train_scripts/hard_negatives.py tiny [--option value ...]
"""

from __future__ import annotations

from unime_st.training.arguments import HardNegativeArguments, parse, set_up_logging

if __name__ == "__main__":
    set_up_logging()
    arguments = parse(HardNegativeArguments, __doc__)
    from unime_st.training.stages import train_hard_negatives  # after --help: this imports torch

    train_hard_negatives(arguments)
