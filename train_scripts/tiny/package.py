"""Package a pre-trained checkpoint as the folder of `unime-tiny`: embedder, judge and reranker in one file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import AutoModelForImageTextToText

from train_scripts.tiny.pretrain import LOG

PRETRAINING = "pretraining.jsonl"
"""File in the folder of the model: the log of all its stages."""
CARD = """---
library_name: sentence-transformers
license: apache-2.0
---
# unime-tiny

A Qwen2-VL of 1.4 million parameters, pre-trained from scratch on procedurally drawn scenes: captioning, question
answering, judging pairs with Yes or No, choosing from a list, and reconstructing an item from its embedding. `unime-st`
ships it as the default of its demo: backbone of the embedders, judge, and start of the reranker. It had no contrastive
training, so it is not a retriever yet, and it knows nothing of the real world.

Made by `python -m train_scripts.tiny.make`, which runs these commands; loss and accuracy per task are in
`pretraining.jsonl`:

```
{commands}
python -c "from train_scripts.tiny.package import package; package('{last}', 'unime_st/models/unime-tiny')"
```
"""


def package(checkpoint: str | Path, output: str | Path) -> Path:
    """Write a native Sentence Transformers folder that still holds the whole language model.

    Args:
        checkpoint: Folder written by :func:`train_scripts.tiny.pretrain.pretrain`.
        output: Folder to write; an existing one is replaced.

    Returns:
        The folder. ``SentenceTransformer(folder)`` embeds with it, ``AutoModelForImageTextToText`` generates.
    """
    output = Path(output)
    shutil.rmtree(output, ignore_errors=True)
    # Truncation of a long input with an image would cut the end of the prompt, where the embedding is read.
    whole = {"text": {"truncation": False}}
    transformer = Transformer(str(checkpoint), unpad_inputs=False, processing_kwargs=whole)
    pooling = Pooling(transformer.get_embedding_dimension(), "lasttoken")
    SentenceTransformer(modules=[transformer, pooling, Normalize()]).save_pretrained(str(output))
    # The embedder's weights lack the language-model head, which judge and reranker need.
    AutoModelForImageTextToText.from_pretrained(checkpoint).save_pretrained(output)
    shutil.copy(Path(checkpoint) / LOG, output / PRETRAINING)
    (output / "README.md").write_text(_card(output / PRETRAINING), encoding="utf-8")
    return output


def _card(log: Path) -> str:
    """Model card with the commands that made the weights, read from their log."""
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    runs = [entry["arguments"] for entry in entries if "arguments" in entry]
    commands = [
        " ".join(
            [
                "python -m train_scripts.tiny",
                *(f"--{name} {value}" for name, value in run.items() if value != ""),
            ]
        )
        for run in runs
    ]
    return CARD.format(commands="\n".join(commands), last=runs[-1]["output"])
