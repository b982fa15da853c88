"""Train on pairs of one's own: import, warm up, mine, judge, soft labels, evaluate beside the controls.

python train_scripts/own_data.py train_scripts/configs/own_data.yaml --data TRAIN --test TEST [--option value ...]
"""

from __future__ import annotations

from unime_st.demo.own_data import run_own_data
from unime_st.demo.settings import OwnDataArguments
from unime_st.training.arguments import parse, set_up_logging

if __name__ == "__main__":
    set_up_logging()
    run_own_data(parse(OwnDataArguments, __doc__))
