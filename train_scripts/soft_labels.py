"""UniME-V2: align similarities with the judge's scores.

python train_scripts/soft_labels.py tiny [--option value ...]
"""

from __future__ import annotations

from unime_st.training.arguments import SoftLabelArguments, parse, set_up_logging

if __name__ == "__main__":
    set_up_logging()
    arguments = parse(SoftLabelArguments, __doc__)
    from unime_st.training.stages import train_soft_labels  # after --help: this imports torch

    train_soft_labels(arguments)
