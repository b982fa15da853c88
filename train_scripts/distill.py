"""UniME stage 1: distil a text-embedding teacher into the language model.

python train_scripts/distill.py tiny [--option value ...]
"""

from __future__ import annotations

from unime_st.training.arguments import DistillArguments, parse, set_up_logging

if __name__ == "__main__":
    set_up_logging()
    arguments = parse(DistillArguments, __doc__)
    from unime_st.training.stages import distill  # after --help: this imports torch

    distill(arguments)
