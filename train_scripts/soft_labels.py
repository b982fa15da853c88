"""UniME-V2: ``python train_scripts/soft_labels.py [CONFIG] [--option value ...]``."""

from __future__ import annotations

from unime_st.stages.command import main

if __name__ == "__main__":
    raise SystemExit(main("soft_labels"))
