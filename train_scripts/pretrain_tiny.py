"""Pre-train the embedded default `unime-tiny` on drawn scenes.

python train_scripts/pretrain_tiny.py train_scripts/configs/pretrain_tiny/seeing.yaml [--option value ...]
"""

from __future__ import annotations

from unime_st.tiny.pretrain import PretrainArguments, pretrain
from unime_st.training.arguments import parse, set_up_logging

if __name__ == "__main__":
    set_up_logging()
    pretrain(parse(PretrainArguments, __doc__))
