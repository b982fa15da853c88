"""``python -m mteb_tasks.mmeb_v2``: checks the data in ``$MMEB_V2_DIR`` and says what is there, missing and faulty."""

from __future__ import annotations

import sys

from mteb_tasks.mmeb.location import MMEBDataError
from mteb_tasks.mmeb_v2.aggregate import MMEB_V2_TASKS
from mteb_tasks.mmeb_v2.data_folder import MMEB_V2_FOLDER_VARIABLE, local_root
from mteb_tasks.mmeb_v2.preflight import options_without_blank


def main() -> int:
    """Check all tasks on local data.

    Returns:
        Number of faulty tasks; missing ones do not count.
    """
    root = local_root()
    if root is None:
        sys.stderr.write(f"set {MMEB_V2_FOLDER_VARIABLE} to the folder of the data\n")
        return 1
    faulty, missing = 0, []
    for task in (made() for made in MMEB_V2_TASKS):
        try:
            folder = task.local_root() or root
            if task.is_missing(folder):
                missing.append(task.key)
                continue
            line = task.check_data(folder)
        except MMEBDataError as error:
            faulty, line = faulty + 1, f"{task.key}: FAULTY: {error}"
        sys.stdout.write(f"{line}\n")
    for key, rows in options_without_blank(root).items():
        sys.stdout.write(
            f"{key}: {rows:,} questions with an option that the official code cuts to its last character\n"
        )
    if missing:
        sys.stdout.write(f"missing: {', '.join(missing)}\n")
    return faulty


if __name__ == "__main__":
    sys.exit(main())
