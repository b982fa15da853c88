"""Names for models: what ``SentenceTransformer("unime-v2")`` means on this machine.

Nothing heavy is imported here, so ``import unime_st`` stays cheap. The libraries that have to know about UniME are
told when they are imported: sentence-transformers learns the aliases, transformers' Auto classes learn the model types
of :mod:`unime_st.backbones`, and mteb learns our tasks and models through the entry point group ``mteb.plugins``.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unime_st._after_import import AfterImport, run
from unime_st.paths import ALIAS, PACKAGED, RESERVED_PREFIX, TINY, AliasError, home, local_folder

_done: set[str] = set()


def known_aliases() -> list[str]:
    """Aliases of the released models, of ``unime-tiny``, and of what lies in ``$UNIME_HOME/models``.

    Example:
        >>> "unime-v2" in known_aliases()
        True
    """
    from unime_st.recipes import RELEASED

    made = home() / "models"
    local = [path.name for path in made.iterdir() if ALIAS.fullmatch(path.name)] if made.is_dir() else []
    return sorted({*RELEASED, TINY, *local})


def is_alias(name: str) -> bool:
    """Whether ``name`` is ours to resolve: a known alias, or anything that begins with ``unime-``.

    Args:
        name: What was given to ``SentenceTransformer`` or ``CrossEncoder``.

    Example:
        >>> is_alias("unime-v2"), is_alias("all-MiniLM-L6-v2"), is_alias("./unime-v2")
        (True, False, False)
    """
    if not ALIAS.fullmatch(name):
        return False
    return name.startswith(RESERVED_PREFIX) or local_folder(name).is_dir()


def resolve(name: str, *, local_files_only: bool = False) -> Path:
    """Return the folder of a model, downloading and converting a released one if this machine has none yet.

    The order is: an existing directory of that name, ``$UNIME_HOME/models/<name>``, the model inside this package
    (``unime-tiny``), the hub.

    Args:
        name: An alias such as ``"unime-v2"``, or the path of a folder.
        local_files_only: Never go to the hub.

    Returns:
        A Sentence Transformers folder.

    Raises:
        AliasError: Nothing was found; the message says which command helps.

    Example:
        >>> resolve("unime-tiny").name
        'unime-tiny'
    """
    if Path(name).is_dir():
        return Path(name)
    if not ALIAS.fullmatch(name):
        raise AliasError(f"No folder {name!r}, and it is not an alias. Known aliases: {', '.join(known_aliases())}.")
    folder = local_folder(name)
    if folder.is_dir():
        return _checked(folder, name)
    if name == TINY:
        return _checked(PACKAGED, name)

    from unime_st.recipes import RELEASED

    if name not in RELEASED:
        raise AliasError(
            f"Unknown model {name!r}. Known aliases: {', '.join(known_aliases())}. "
            f"To give a model of your own this name: `unime convert FOLDER --recipe NAME --alias {name}`."
        )
    from unime_st.checkpoints.download import pull

    return pull(name, local_files_only=local_files_only)


def _checked(folder: Path, name: str) -> Path:
    """Return ``folder`` if it is whole, else say how to make it again."""
    if not (folder / "modules.json").is_file():
        how = f"`unime pull {name}`" if name != TINY else "`pip install --force-reinstall unime-st`"
        what = "is not a Sentence Transformers folder" if folder.is_dir() else "is missing"
        raise AliasError(f"{name!r} stands for {folder}, which {what} (no modules.json). Make it again: {how}.")
    broken = [path.name for path in folder.glob("*.safetensors") if not path.exists()]
    if broken:
        raise AliasError(
            f"{name!r} stands for {folder}, whose weights link to files that are gone ({', '.join(broken)}). "
            f"Make it again with `unime pull {name}` or `unime convert FOLDER --alias {name} --overwrite`."
        )
    return folder


def register() -> None:
    """Make sentence-transformers, transformers and mteb know the aliases, model types and tasks of this package.

    Called by ``import unime_st``; calling it again changes nothing. Libraries that are not loaded yet are told at the
    end of their own import, so this neither imports torch nor costs time.

    Example:
        >>> register()
    """
    actions: dict[str, Callable[[], None]] = {
        "sentence_transformers": _teach_sentence_transformers,
        "transformers.models.auto.configuration_auto": _teach_auto_config,
        "transformers.models.auto.processing_auto": _teach_auto_processor,
        "transformers.models.auto.image_processing_auto": _teach_auto_image_processor,
        "mteb": _teach_mteb,
    }
    waiting = {}
    for name, action in actions.items():
        if name in _done:
            continue
        module = sys.modules.get(name)
        if module is None or getattr(module.__spec__, "_initializing", False):
            waiting[name] = functools.partial(_once, name, action)
        else:
            run(name, functools.partial(_once, name, action))
    watched = {name for finder in sys.meta_path if isinstance(finder, AfterImport) for name in finder.watched}
    if missing := {name: action for name, action in waiting.items() if name not in watched}:
        sys.meta_path.insert(0, AfterImport(missing))


def _once(name: str, action: Callable[[], None]) -> None:
    # Marked first: teaching mteb imports our tasks, which import mteb's modules and may come back here.
    if name not in _done:
        _done.add(name)
        action()


def _teach_sentence_transformers() -> None:
    """Let every Sentence Transformers class resolve our aliases before it turns to the hub."""
    from sentence_transformers.base.model import BaseModel

    original = BaseModel.__init__

    @functools.wraps(original)
    def init(self: Any, model_name_or_path: str | None = None, **kwargs: Any) -> None:
        if isinstance(model_name_or_path, str) and not os.path.isdir(model_name_or_path):
            if is_alias(model_name_or_path):
                offline = kwargs.get("local_files_only", False)
                model_name_or_path = str(resolve(model_name_or_path, local_files_only=offline))
        original(self, model_name_or_path, **kwargs)

    BaseModel.__init__ = init  # type: ignore[method-assign]


def _before_first_load(auto_class: Any) -> None:
    """Register our backbones at the first ``from_pretrained`` of an Auto class: only then is their import worth it."""
    original = auto_class.__dict__["from_pretrained"]

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        auto_class.from_pretrained = original
        from unime_st import backbones

        backbones.register()
        return cls.from_pretrained(*args, **kwargs)

    auto_class.from_pretrained = classmethod(functools.wraps(original.__func__)(from_pretrained))


def _teach_auto_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    _before_first_load(AutoConfig)


def _teach_auto_processor() -> None:
    from transformers.models.auto.processing_auto import AutoProcessor

    _before_first_load(AutoProcessor)


def _teach_auto_image_processor() -> None:
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    _before_first_load(AutoImageProcessor)


def _teach_mteb() -> None:
    """Load our entry point of the group ``mteb.plugins``: this package must not know ``mteb_tasks`` by name."""
    from importlib.metadata import entry_points

    for entry_point in entry_points(group="mteb.plugins", name="unime"):
        entry_point.load()()
