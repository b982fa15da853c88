"""Files of a native Sentence Transformers folder: module list, module configurations, linked weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sentence_transformers
import torch
import transformers
from transformers.utils import logging as hf_logging

from unime_st.files import write_json
from unime_st.recipes import Recipe

CONVERSION_RECORD = "unime.json"
"""File in a converted folder with its recipe, source, commit and version."""

_BASE = "sentence_transformers.base.modules"
_ST = "sentence_transformers.sentence_transformer.modules"
_CE = "sentence_transformers.cross_encoder.modules"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' log messages and progress bars for what is checked and reported here."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def link_file(source: Path, target: Path) -> str:
    """Give a file, or the target of a link, a second name, without copying it if the file system can do so.

    Returns:
        ``"hard link"``, ``"symbolic link"`` or ``"copy"``, whichever was possible, in this order.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     _ = (Path(root) / "a").write_text("x")
        ...     link_file(Path(root) / "a", Path(root) / "b")
        'hard link'
    """
    real = source.resolve()
    for kind, make in (("hard link", os.link), ("symbolic link", os.symlink)):
        try:
            make(real, target)
        except OSError:
            continue
        return kind
    shutil.copyfile(real, target)
    return "copy"


def write_modules(
    folder: Path,
    recipe: Recipe,
    *,
    dimension: int,
    processing_kwargs: dict[str, object],
    yes_no_ids: tuple[int, int] | None,
    needs_unime_st: bool,
    takes_video: bool = False,
) -> None:
    """Write ``modules.json``, the configuration of every module and the settings of Sentence Transformers.

    The folder holds model and processor already. ``dimension`` is the width of the hidden states, ``yes_no_ids`` are
    the answers of a reranker. If the folder needs classes of this package, Sentence Transformers says so where it is
    missing.
    """
    reranker = recipe.task == "reranker"
    output = "logits" if reranker else "last_hidden_state"
    method = {"method": "forward", "method_output_name": output}
    config: dict[str, object] = {
        "transformer_task": "any-to-any" if reranker else "feature-extraction",
        "modality_config": {
            **dict.fromkeys(("text", "image", *(["video"] if takes_video else [])), method),
            "message": {**method, "format": "structured"},
        },
        "module_output_name": "causal_logits" if reranker else "token_embeddings",
        "unpad_inputs": False,
    }
    if processing_kwargs:
        config["processing_kwargs"] = processing_kwargs
    write_json(folder / "sentence_bert_config.json", config)
    types = [f"{_BASE}.transformer.Transformer"]
    if reranker:
        if yes_no_ids is None:
            raise ValueError(f"Recipe {recipe.name!r} is a reranker, so it needs the ids of its two answer tokens.")
        scorer = {
            "true_token_id": yes_no_ids[0],
            "false_token_id": yes_no_ids[1],
            "module_input_name": "causal_logits",
        }
        write_json(folder / "1_LogitScore" / "config.json", scorer)
        types.append(f"{_CE}.logit_score.LogitScore")
    else:
        pooling = {"embedding_dimension": dimension, "pooling_mode": recipe.pooling, "include_prompt": True}
        write_json(folder / "1_Pooling" / "config.json", pooling)
        write_json(folder / "2_Normalize" / "config.json", {})
        types += [f"{_ST}.pooling.Pooling", f"{_BASE}.normalize.Normalize"]
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": "" if index == 0 else f"{index}_{kind.rpartition('.')[2]}",
            "type": kind,
        }
        for index, kind in enumerate(types)
    ]
    write_json(folder / "modules.json", modules)
    settings: dict[str, object] = {
        "model_type": "CrossEncoder" if reranker else "SentenceTransformer",
        "__version__": {
            "sentence_transformers": sentence_transformers.__version__,
            "transformers": transformers.__version__,
            "pytorch": torch.__version__,
        },
        "prompts": dict(recipe.prompts) if reranker else {"query": "", "document": "", **recipe.prompts},
        "default_prompt_name": None,
    }
    if needs_unime_st:
        reason = "It holds the model class and the image rule of this model."
        settings["requirements"] = {"unime-st": {"specifier": ">=0.1", "reason": reason}}
    if reranker:
        settings["activation_fn"] = "torch.nn.modules.activation.Sigmoid"
    else:
        settings["similarity_fn_name"] = "cosine"
    write_json(folder / "config_sentence_transformers.json", settings)
