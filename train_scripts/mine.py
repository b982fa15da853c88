"""Mining of hard negatives: ``python train_scripts/mine.py [CONFIG] [--option value ...]``."""

from __future__ import annotations

from unime_st.stages.command import main

if __name__ == "__main__":
    raise SystemExit(main("mine"))
