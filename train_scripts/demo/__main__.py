"""The whole method on the embedded default: train, mine, judge, rerank, evaluate; on a laptop CPU in minutes.

python -m train_scripts.demo [CONFIG.yaml] [--seeds 3 --output runs/demo ...]
"""

from __future__ import annotations

from train_scripts.demo.run_demo import run_demo
from train_scripts.demo.settings import DemoArguments
from unime_st.stages.command import run_script

if __name__ == "__main__":
    raise SystemExit(run_script(run_demo, DemoArguments, __doc__))
