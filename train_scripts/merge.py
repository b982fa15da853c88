"""Merging of models: ``python train_scripts/merge.py [CONFIG] [--option value ...]``."""

from __future__ import annotations

from unime_st.stages.command import main

if __name__ == "__main__":
    raise SystemExit(main("merge"))
