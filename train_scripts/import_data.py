"""Make a record folder of MMEB-train, a released judge file, NLI pairs or data of one's own.

python train_scripts/import_data.py mmeb_train [--option value ...]
"""

from __future__ import annotations

from unime_st.training.arguments import ImportArguments, parse, set_up_logging

if __name__ == "__main__":
    set_up_logging()
    arguments = parse(ImportArguments, __doc__)
    from unime_st.stages.import_data import run_import  # after --help: this imports torch

    run_import(arguments)
