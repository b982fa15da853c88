"""List of the task classes of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask


def registered_tasks() -> list[type[AbsTask]]:
    """List the task classes that `mteb_tasks.register` makes known to mteb.

    Returns:
        The classes; the aggregate ``MMEB`` comes last.

    Example:
        >>> [task.metadata.name for task in registered_tasks()][-1]
        'MMEB'
    """
    from mteb_tasks.captions import CAPTION_TASKS
    from mteb_tasks.mmeb.tasks import MMEB, MMEB_TASKS
    from mteb_tasks.mmeb_v2.aggregate import MMEB_V2_TASKS, MMEBV2
    from mteb_tasks.scenes import SCENES_TASKS
    from mteb_tasks.sugarcrepe import SugarCrepeByCategory

    return [*SCENES_TASKS, *CAPTION_TASKS, SugarCrepeByCategory, *MMEB_V2_TASKS, MMEBV2, *MMEB_TASKS, MMEB]
