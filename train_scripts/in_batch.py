"""Control: in-batch InfoNCE: ``python train_scripts/in_batch.py [CONFIG] [--option value ...]``."""

from __future__ import annotations

from unime_st.stages.command import main

if __name__ == "__main__":
    raise SystemExit(main("in_batch"))
