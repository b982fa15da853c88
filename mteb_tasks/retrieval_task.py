"""Base of the retrieval tasks of this package: data as items, scored by ``hit_rate_at_1``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mteb.abstasks import AbsTaskRetrieval
from mteb.timing import TimingStack

from mteb_tasks.columns import Setting, category_modalities, to_dataset
from mteb_tasks.task_base import UniMETask

if TYPE_CHECKING:
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

    from unime_st.data.scenes import RetrievalData


def retrieval_split(
    data: RetrievalData,
    category: str,
    *,
    query_body: Callable[[str], str] | None = None,
    document_body: Callable[[str], str] | None = None,
    image_prompt: str | None = None,
    setting: Setting | None = None,
    document_setting: Setting | None = None,
) -> RetrievalSplitData:
    """Turn retrieval data into the tables mteb evaluates.

    Args:
        data: Queries, corpus, relevant documents and, where each query has its own, candidates.
        category: mteb's modality code of the task.
        query_body: Takes the instruction off a query for foreign models; None leaves texts as they are.
        document_body: The same for documents.
        image_prompt: Name of the prompt that our models put to images without a text.
        setting: How the benchmark prescribes that queries and documents are encoded.
        document_setting: The same for documents, where it differs.

    Returns:
        mteb's split: ``queries``, ``corpus``, ``relevant_docs`` and ``top_ranked`` (None = whole corpus). Candidates
        listed twice for a query are kept once, so that a copy of the positive cannot beat it by position.

    Raises:
        ValueError: If a query has no relevant document, or lists a document the corpus lacks.

    Example:
        >>> from unime_st.data.items import Item
        >>> from unime_st.data.scenes import RetrievalData
        >>> d = RetrievalData({"q": Item(text="cat")}, {"d": Item(text="a cat")}, {"q": {"d"}}, {"q": ["d", "d"]})
        >>> retrieval_split(d, "t2t")["top_ranked"]
        {'q': ['d']}
    """
    query_modalities, document_modalities = category_modalities(category)
    _check(data)
    queries = to_dataset(data.queries, query_modalities, body=query_body, prompt_name=image_prompt, setting=setting)
    corpus = to_dataset(
        data.corpus,
        document_modalities,
        body=document_body,
        prompt_name=image_prompt,
        setting=document_setting or setting,
    )
    return {
        "queries": queries,
        "corpus": corpus,
        "relevant_docs": data.grades
        or {query: dict.fromkeys(sorted(docs), 1) for query, docs in data.relevant.items()},
        "top_ranked": None
        if data.candidates is None
        else {query: list(dict.fromkeys(docs)) for query, docs in data.candidates.items()},
    }


def _check(data: RetrievalData) -> None:
    known = set(data.corpus)
    for query in data.queries:
        if not data.relevant.get(query):
            raise ValueError(f"query {query!r} has no relevant document")
        listed: list[Collection[str]] = [data.relevant[query]]
        if data.candidates is not None:
            if not data.candidates.get(query):
                raise ValueError(f"query {query!r} has an empty candidate list")
            listed.append(data.candidates[query])
        if not all(map(known.issuperset, listed)):
            unknown = sorted(set().union(*listed) - known)
            raise ValueError(f"query {query!r} lists documents that the corpus lacks, the first is {unknown[0]!r}")


@dataclass(frozen=True)
class ScoredSplit:
    """Data of a split with what a model found in them.

    Args:
        tables: The data.
        results: Scores of the documents that were found, by query.
        scores: mteb's scores by query.
    """

    tables: RetrievalSplitData
    results: Mapping[str, Mapping[str, float]]
    scores: Mapping[str, Mapping[str, float]]


class ItemRetrievalTask(UniMETask, AbsTaskRetrieval):
    """A retrieval task whose data are items.

    Subclasses give ``metadata`` and `retrieval_data`. Data once loaded stay loaded, so that a list of task objects can
    be evaluated with model after model.
    """

    ignore_identical_ids = False
    # Ten documents per query are enough for reranking and keep prediction files and metrics small.
    k_values = (1, 5, 10)

    @abstractmethod
    def retrieval_data(self, subset: str, split: str) -> RetrievalData:
        """Read the data of one subset.

        Args:
            subset: Name of the subset, ``"default"`` when there is only one.
            split: Name of the split.

        Returns:
            The items and who is relevant to whom.
        """

    def split_tables(self, data: RetrievalData) -> RetrievalSplitData:
        """Turn the data of one subset into mteb's tables; see `retrieval_split`.

        Args:
            data: From `retrieval_data`.

        Returns:
            The tables.
        """
        return retrieval_split(data, self.metadata.category or "it2it")

    def load_data(self, num_proc: int | None = None, *, timer: TimingStack | None = None, **kwargs: object) -> None:
        """Load all subsets; see `mteb.AbsTask.load_data`. A second call does nothing."""
        if self.data_loaded:
            return
        with (timer or TimingStack())("Data loading"):
            self.dataset = {
                subset: {split: self.split_tables(self.retrieval_data(subset, split)) for split in self.eval_splits}
                for subset in self.hf_subsets
            }
        self.data_loaded = True

    def task_specific_scores(
        self,
        scores: Mapping[str, Mapping[str, float]],
        qrels: Mapping[str, Mapping[str, int]],
        results: Mapping[str, Mapping[str, float]],
        hf_split: str,
        hf_subset: str,
    ) -> dict[str, Any]:
        """Add `added_scores`; see `mteb.abstasks.AbsTaskRetrieval.task_specific_scores`."""
        return self.added_scores(ScoredSplit(self.dataset[hf_subset][hf_split], results, scores))

    def added_scores(self, split: ScoredSplit) -> dict[str, Any]:
        """Scores and facts that stand in a result beside mteb's scores.

        Args:
            split: Data, rankings and mteb's scores.

        Returns:
            ``{"chance": mean over queries of relevant candidates / candidates}``, the score of a random ranking.
        """
        everything, listed = len(split.tables["corpus"]), split.tables["top_ranked"]
        shares = [
            len(docs) / (everything if listed is None else len(listed[query]))
            for query, docs in split.tables["relevant_docs"].items()
        ]
        return {"chance": sum(shares) / len(shares)}
