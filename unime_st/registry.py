"""Model names: what ``SentenceTransformer("unime-v2")`` stands for, and registration with the libraries that load it.

Registration imports nothing heavy, so ``import unime_st`` stays cheap. Libraries are patched at the end of their own
import: sentence-transformers resolves the aliases, transformers' Auto classes know the model types of
:mod:`unime_st.backbones`, and mteb gets tasks and models through the entry point group ``mteb.plugins``.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from unime_st import compat
from unime_st._after_import import AfterImport, run
from unime_st.paths import (
    ALIAS_PATTERN,
    PACKAGED,
    RESERVED_PREFIX,
    TINY,
    AliasError,
    alias_of,
    find_model,
    local_aliases,
    local_folder,
)

if TYPE_CHECKING:
    from huggingface_hub import CardData
    from sentence_transformers.base.model import BaseModel

_AUTO_CLASSES = {
    "transformers.models.auto.configuration_auto": "AutoConfig",
    "transformers.models.auto.processing_auto": "AutoProcessor",
    "transformers.models.auto.image_processing_auto": "AutoImageProcessor",
}
_registered: set[str] = set()
"""Modules whose action has run."""


def known_aliases() -> list[str]:
    """Aliases of the released models, of ``unime-tiny`` and of the folders in ``$UNIME_HOME/models``, sorted.

    Example:
        >>> "unime-v2" in known_aliases()
        True
    """
    from unime_st.recipes import RELEASED

    return sorted({*RELEASED, TINY, *local_aliases()})


def is_alias(name: str) -> bool:
    """Whether a name is an alias: that of a folder in ``$UNIME_HOME/models``, or any that begins with ``unime-``.

    Example:
        >>> is_alias("unime-v2"), is_alias("all-MiniLM-L6-v2"), is_alias("./unime-v2")
        (True, False, False)
    """
    if not ALIAS_PATTERN.fullmatch(name):
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
        Path: A Sentence Transformers folder.

    Raises:
        AliasError: Nothing was found; the message says which command helps.

    Example:
        >>> resolve("unime-tiny").name
        'unime-tiny'
    """
    if (folder := find_model(name)) is not None:
        return folder
    if not ALIAS_PATTERN.fullmatch(name):
        raise AliasError(f"No folder {name!r}, and it is not an alias. Known aliases: {', '.join(known_aliases())}.")
    from unime_st.recipes import RELEASED

    if name not in RELEASED:
        raise AliasError(
            f"Unknown model {name!r}. Known aliases: {', '.join(known_aliases())}. "
            f"To give a model of your own this name: `unime convert FOLDER --recipe NAME --alias {name}`."
        )
    from unime_st.checkpoints.download import pull

    return pull(name, local_files_only=local_files_only)


def resolve_alias(name: str, local_files_only: bool = False) -> str | None:
    """Folder of an alias, see :func:`resolve`; None for other names.

    Example:
        >>> resolve_alias("all-MiniLM-L6-v2") is None
        True
    """
    if Path(name).is_dir() or not is_alias(name):
        return None
    return str(resolve(name, local_files_only=local_files_only))


def register() -> None:
    """Register aliases, model types and tasks with sentence-transformers, transformers and mteb.

    Called by ``import unime_st``; calling it again changes nothing. A library that is not loaded yet is patched at the
    end of its own import, so this neither imports torch nor costs time.
    """
    actions: dict[str, Callable[[], None]] = {
        "sentence_transformers": functools.partial(
            compat.patch_sentence_transformers, resolve_alias, _check_kind, _card_data
        ),
        "sentence_transformers.base.modules.transformer": _patch_transformer,
        **{
            module: functools.partial(compat.patch_auto_class, module, name, _register_backbones)
            for module, name in _AUTO_CLASSES.items()
        },
        "transformers.modeling_utils": functools.partial(compat.patch_adapter_base, _folder_of_alias),
        "transformers.models.auto.auto_factory": functools.partial(compat.patch_adapter_revision, _folder_of_alias),
        "peft.config": functools.partial(compat.patch_peft, _folder_of_alias, alias_of),
        "transformers.utils.output_capturing": compat.patch_output_capturing,
        "mteb": _load_mteb_plugin,
    }
    waiting = {}
    for name, action in actions.items():
        if name in _registered:
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
    # Marked first: our mteb plug-in imports our tasks, which import modules of mteb and may come back here.
    if name not in _registered:
        _registered.add(name)
        action()


def _patch_transformer() -> None:
    compat.patch_max_seq_length()
    compat.patch_preprocess(_image_error)


def _image_error(value: object) -> Exception | None:
    from unime_st.encoding.model_inputs import undecodable_image

    return undecodable_image(value)


def _check_kind(kind: type[BaseModel], folder: Path) -> None:
    """Refuse a reranker as an embedder and the reverse, where Sentence Transformers would convert it.

    The vectors of a reranker mean nothing, because they were never trained.
    """
    if not (folder / "config_sentence_transformers.json").is_file() or not (folder == PACKAGED or _made_here(folder)):
        return
    from sentence_transformers import CrossEncoder, SentenceTransformer

    from unime_st.files import read_json

    saved = read_json(folder / "config_sentence_transformers.json").get("model_type", "SentenceTransformer")
    if saved == "CrossEncoder" and issubclass(kind, SentenceTransformer):
        raise ValueError(
            f"{folder} holds a reranker, not an embedding model: load it with UniMEReranker or CrossEncoder"
        )
    if saved == "SentenceTransformer" and issubclass(kind, CrossEncoder):
        raise ValueError(
            f"{folder} holds an embedding model, not a reranker: load it with UniME or SentenceTransformer. "
            "UniMEReranker also takes the generative checkpoint that it came from."
        )


def _card_data(kind: type[BaseModel], folder: Path, local_files_only: bool) -> CardData | None:
    alias = alias_of(folder)
    if alias is None and not _made_here(folder):
        return None
    from unime_st.checkpoints.card import card_data

    return card_data(kind, folder, base=alias, local_files_only=local_files_only)


def _made_here(folder: Path) -> bool:
    """Whether a folder was converted by this package or trained from such a folder; cheap, asked for every model."""
    if (folder / "unime.json").is_file():
        return True
    try:
        with (folder / "README.md").open(encoding="utf-8") as card:
            return "- unime-st\n" in card.read(4096)
    except (OSError, ValueError):
        return False


def _folder_of_alias(name: str) -> Path | None:
    return find_model(name) if is_alias(name) and not Path(name).is_dir() else None


def _register_backbones() -> None:
    from unime_st import backbones

    backbones.register()


def _load_mteb_plugin() -> None:
    """Load our entry point of the group ``mteb.plugins``: this package must not import ``mteb_tasks`` by name."""
    from importlib.metadata import entry_points

    for entry_point in entry_points(group="mteb.plugins", name="unime"):
        entry_point.load()()
