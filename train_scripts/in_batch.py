"""Control: plain in-batch InfoNCE on the same records.

python train_scripts/in_batch.py tiny [--option value ...]
"""

from __future__ import annotations

from unime_st.training.arguments import InBatchArguments, parse, set_up_logging

if __name__ == "__main__":
    set_up_logging()
    arguments = parse(InBatchArguments, __doc__)
    from unime_st.training.stages import train_in_batch  # after --help: this imports torch

    train_in_batch(arguments)
