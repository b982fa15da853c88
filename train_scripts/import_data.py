"""Import of training data: ``python train_scripts/import_data.py [CONFIG] [--option value ...]``."""

from __future__ import annotations

from unime_st.stages.command import main

if __name__ == "__main__":
    raise SystemExit(main("import_data"))
