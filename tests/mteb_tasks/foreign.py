"""A model and tasks of others: a text-only SentenceTransformer, an STS and a retrieval task with small data."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

WORDS = "a red blue circle star ring of the on left".split()


def text_model() -> SentenceTransformer:
    """Word vectors with seeded random numbers: takes texts only."""
    tokenizer = Tokenizer(WordLevel({word: row for row, word in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    weights = torch.randn(len(WORDS) + 1, 16, generator=torch.Generator().manual_seed(0))
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights.numpy())], device="cpu")


def write_text_model(folder: Path) -> Path:
    """Save `text_model`."""
    text_model().save_pretrained(str(folder))
    return folder


def _metadata(name: str, kind: str, main_score: str) -> TaskMetadata:
    return TaskMetadata(
        name=name, type=kind, main_score=main_score, dataset={"path": "x/y", "revision": "1"}, description="-",
        category="t2t", modalities=["text"], eval_splits=["test"], eval_langs=["eng-Latn"], reference=None, date=None,
        domains=None, task_subtypes=None, license=None, annotations_creators=None, dialect=None, sample_creation=None,
        bibtex_citation=None,
    )  # fmt: skip


class ForeignSTS(AbsTaskSTS):
    """Four pairs of texts with a similarity each."""

    metadata = _metadata("ForeignSTS", "STS", "cosine_spearman")
    min_score = 0
    max_score = 5

    def load_data(self, *args, **kwargs):
        first = ["a red circle", "a blue star", "the ring", "left of the star"]
        second = ["a red star", "a blue star", "the circle on the left", "a ring"]
        columns = {"sentence1": first, "sentence2": second, "score": [3.0, 5.0, 2.0, 1.0]}
        self.dataset = {"test": Dataset.from_dict(columns)}
        self.data_loaded = True


class ForeignRetrieval(AbsTaskRetrieval):
    """Two queries, three documents."""

    metadata = _metadata("ForeignRetrieval", "Retrieval", "ndcg_at_10")

    def load_data(self, *args, **kwargs):
        documents = {"id": ["d0", "d1", "d2"], "text": ["a red circle", "a blue star", "the ring on the left"]}
        split = {
            "corpus": Dataset.from_dict(documents),
            "queries": Dataset.from_dict({"id": ["q0", "q1"], "text": ["red circle", "left ring"]}),
            "relevant_docs": {"q0": {"d0": 1}, "q1": {"d2": 1}},
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True
