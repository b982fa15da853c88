"""UniME-V2-Reranker: ``python train_scripts/reranker.py [CONFIG] [--option value ...]``."""

from __future__ import annotations

from unime_st.stages.command import main

if __name__ == "__main__":
    raise SystemExit(main("reranker"))
