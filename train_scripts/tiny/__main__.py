"""Pre-train the embedded default `unime-tiny` on drawn scenes.

python -m train_scripts.tiny train_scripts/tiny/configs/seeing.yaml [--option value ...]
"""

from __future__ import annotations

from train_scripts.tiny.pretrain import PretrainArguments, pretrain
from unime_st.stages.command import run_script

if __name__ == "__main__":
    raise SystemExit(run_script(pretrain, PretrainArguments, __doc__))
