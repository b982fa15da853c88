"""Train on pairs of one's own: import, warm up, mine, judge, soft labels, evaluate beside the controls.

python -m train_scripts.demo.own_data train_scripts/demo/own_data.yaml --data TRAIN --test TEST [--option value ...]
"""

from __future__ import annotations

from train_scripts.demo.own_data_run import run_own_data
from train_scripts.demo.settings import OwnDataArguments
from unime_st.stages.command import run_script

if __name__ == "__main__":
    raise SystemExit(run_script(run_own_data, OwnDataArguments, __doc__))
