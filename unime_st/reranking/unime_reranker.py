"""`UniMEReranker`: a CrossEncoder that scores documents one by one (pairwise) or all in one prompt (listwise)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore

from unime_st.checkpoints.card import card_data
from unime_st.data import BadImageError
from unime_st.encoding.model_inputs import Features
from unime_st.options import check_count
from unime_st.paths import alias_of
from unime_st.reranking.chat_features import IMAGE_INDEX, ChatEncoder, group_by_length, is_plain, run_in_parts
from unime_st.reranking.parsing import ParsedInputs, image_error, is_pair, listed, parse_inputs, plain_input, to_item
from unime_st.reranking.ranker import Method, Ranker, Ranking, sort_by_score
from unime_st.scoring.chat_tokenizer import check_length
from unime_st.scoring.forward_counter import ForwardCounter
from unime_st.scoring.groups import PairOrder, orders_of
from unime_st.scoring.loading import ImageTokens, generative_modules, is_cross_encoder, prepare_saved, resolve_name
from unime_st.scoring.pair_scorer import PairScores
from unime_st.scoring.prompts import check_template

logger = logging.getLogger(__name__)

_LOWEST_LOG_ODDS = -1e4  # of a document whose image cannot be read: below all others, and finite


class UniMEReranker(CrossEncoder):
    """Reranks texts, images and image+text with a generative vision-language model.

    A thin :class:`~sentence_transformers.cross_encoder.CrossEncoder`: a folder saved by it loads in the plain class,
    with the chat template in the folder, and the reverse. It adds:

    - bare generative checkpoints (Qwen2-VL, Qwen2.5-VL, the released UniME-V2-Reranker) become pairwise rerankers;
    - :meth:`listwise_scores` and ``rank(..., method="listwise")`` score all candidates in one forward pass, where the
      authors' code generates an answer of up to 128 tokens and only knows the winner;
    - :meth:`rank` computes the common prefix of its prompts once, and every image once;
    - inputs may also be :class:`~unime_st.data.Item`, decoded batch by batch;
    - a prompt longer than the model takes is refused, because truncation would remove the position of the answer.

    Pairwise scores are ``sigmoid(l_Yes - l_No)`` unless ``activation_fn`` says otherwise.

    Args:
        model_name_or_path: Folder, hub repository or alias ("unime-v2-reranker", "unime-tiny").
        template: Name or text of the chat template, see :func:`~unime_st.judging.load_template`. Defaults to that of a
            saved reranker, else "tiny" for "unime-tiny" and "official" for other checkpoints.
        image_tokens: Minimum and maximum number of visual tokens per image. Defaults to those saved, else to those of
            the template (4 to 300 for "official").
        **kwargs: As for :class:`~sentence_transformers.cross_encoder.CrossEncoder`.

    Raises:
        ValueError: If the checkpoint cannot answer Yes or No, or the template drops a part of its input.

    References:
        UniME-V2 (https://arxiv.org/abs/2510.13515), "UniME-V2-Reranker".

    Example:
        >>> from unime_st import UniMEReranker
        >>> reranker = UniMEReranker("unime-tiny", template="tiny")
        >>> ranking = reranker.rank("a red square", ["a blue circle", "a red square"])
        >>> sorted(entry["corpus_id"] for entry in ranking)
        [0, 1]
        >>> reranker.listwise_scores("a red square", ["a blue circle", "a red square"]).shape
        (2,)
    """

    def __init__(
        self,
        model_name_or_path: str | Path | None = None,
        *,
        template: str | None = None,
        image_tokens: ImageTokens | None = None,
        **kwargs: Any,
    ) -> None:
        self._listwise_template: str | None = None
        self._encoder: tuple[object, ChatEncoder] | None = None
        self._ranker: Ranker | None = None
        if model_name_or_path is None:
            super().__init__(**kwargs)
            return
        folder = resolve_name(model_name_or_path)
        if is_cross_encoder(folder):
            super().__init__(folder, **kwargs)
            prepare_saved(self, folder, template, image_tokens)
            return
        own = {key: kwargs.pop(key) for key in ("model_kwargs", "processor_kwargs", "config_kwargs") if key in kwargs}
        kwargs.setdefault("model_card_data", card_data(type(self), Path(folder), base=alias_of(folder)))
        modules = generative_modules(folder, template=template, image_tokens=image_tokens, **own)
        super().__init__(modules=modules, num_labels=1, **kwargs)

    def __getstate__(self) -> dict[str, object]:
        """Leave the engine and its images out of copies and pickles; they are made again when needed."""
        return {**self.__dict__, "_encoder": None, "_ranker": None}

    @property
    def _transformer(self) -> Transformer:
        return cast(Transformer, self[0])

    def preprocess(self, inputs: Sequence[object], prompt: str | None = None, **kwargs: Any) -> Features:
        """Turn pairs, or conversations, into features of the model, see :meth:`CrossEncoder.preprocess`.

        Args:
            inputs: Pairs of items, texts, images or dicts of them; or chats with the roles "query" and "document".
            prompt: Replaces the system turn of the template.
            **kwargs: Passed on; ``task="listwise"`` renders chats as lists.

        Returns:
            dict: Features for :meth:`forward`.

        Raises:
            BadImageError: If an image cannot be decoded.
            ValueError: If a prompt is longer than the model takes.
        """
        opened: dict[object, object] = {}
        rows = [tuple(plain_input(side, opened) for side in row) if is_pair(row) else row for row in inputs]
        if prompt is None and not kwargs.keys() - {"task"}:
            to_messages = self._transformer.input_formatter.pair_to_messages
            chats = [to_messages(row) if isinstance(row, tuple) else row for row in rows]
            encoder = self._chat_encoder()
            if rows and encoder.applies and is_plain(chats):
                features = encoder(chats, **kwargs)
                check_length(self._transformer, features["input_ids"].shape[1])
                return features
        options = {**(kwargs.pop("processing_kwargs", None) or {})}
        options["text"] = {**options.get("text", {}), "truncation": False}
        features = super().preprocess(rows, prompt=prompt, processing_kwargs=options, **kwargs)
        if "attention_mask" in features:
            check_length(self._transformer, int(features["attention_mask"].sum(-1).max()))
        return features

    def _chat_encoder(self) -> ChatEncoder:
        """The encoder of the processor and the image limits as they are now."""
        transformer = self._transformer
        state = (transformer.processor.image_processor, dict(transformer.processing_kwargs.get("image", {})))
        if self._encoder is None or self._encoder[0] != state:
            self._encoder = state, ChatEncoder(transformer)
        return self._encoder[1]

    def forward(self, input: Features, **kwargs: Any) -> Features:
        """Run prompts; those of similar length pass together, and each distinct image passes the vision tower once.

        Args:
            input: Features from :meth:`preprocess`.
            **kwargs: Passed on to the modules.

        Returns:
            dict: The features with "scores" and "causal_logits" at the end of each prompt.
        """
        if IMAGE_INDEX not in input:
            return super().forward(input, **kwargs)
        lengths = input["attention_mask"].sum(1).tolist()
        # Processes of a sharded model wait for each other in every forward pass, so all must make the same number.
        whole = torch.is_grad_enabled() and torch.distributed.is_available() and torch.distributed.is_initialized()
        parts = [list(range(len(lengths)))] if whole else group_by_length(lengths)
        return run_in_parts(
            input, lambda part: super(UniMEReranker, self).forward(part, **kwargs), self._transformer, parts
        )

    def preprocess_lists(
        self, queries: Sequence[object], documents: Sequence[Sequence[object]], *, share: bool = True
    ) -> Features:
        """Turn queries, each with its own candidates, into features of listwise prompts.

        Args:
            queries: Items, texts, images or dicts.
            documents: Per query its candidates in the order in which they are numbered.
            share: Whether an image that occurs twice is processed once, which only :meth:`forward` understands;
                False gives what the model of transformers takes. Defaults to True.

        Returns:
            dict: Features whose last position is followed by the index of the best candidate.

        Raises:
            ValueError: If a query has no candidates, a prompt is longer than the model takes, or the model's template
                knows no lists.
        """
        self.check_lists()
        to_messages = self._transformer.input_formatter.pair_to_messages
        chats, opened = [], dict[object, object]()
        for row, (query, candidates) in enumerate(zip(queries, documents, strict=True)):
            if not len(candidates):
                raise ValueError(f"query {row} has no candidates to rank")
            asked = plain_input(query, opened)
            pairs = [to_messages((asked, plain_input(candidate, opened))) for candidate in candidates]
            chats.append([pairs[0][0], *(pair[1] for pair in pairs)])
        options: dict[str, Any] = {} if share else {"processing_kwargs": {}}
        return self.preprocess(chats, task="listwise", **options)

    def check_lists(self) -> None:
        """Raise an error for a template that cannot render lists.

        Raises:
            ValueError: If the template has no prompt for lists or drops a part of one.

        Example:
            >>> UniMEReranker("unime-tiny", template="tiny").check_lists()
        """
        processor = self._transformer.processor
        if processor.chat_template != self._listwise_template:
            check_template(processor, processor.chat_template, listwise=True)
            self._listwise_template = processor.chat_template

    def ranker(self) -> Ranker:
        """Return the engine for the present weights, template and image limits.

        Example:
            >>> UniMEReranker("unime-tiny", template="tiny").ranker().pairs.obstacle is None
            True
        """
        if self._ranker is None or self._ranker.state != Ranker.state_of(self):
            self._ranker = Ranker(self)
        return self._ranker

    def predict(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Score pairs, see :meth:`CrossEncoder.predict`; they may also come as an iterator or a pandas Series."""
        return super().predict(listed(inputs), *args, **kwargs)

    def listwise_scores(self, query: object, documents: Iterable[object], *, permutations: int = 1) -> np.ndarray:
        """Score all candidates of a query in one list.

        The prompt ends with ``Ans: (``; the scores are the logits of the tokens 1, 2, ..., n at that position, so
        their softmax is the probability of each candidate to be named the best. They depend on the order of the
        candidates and compare within one list only. Where 10 begins with the token of 1, as in Qwen's tokenizers, the
        two share its logit by what follows, which takes a second, short pass.

        Args:
            query: Item, text, image or dict.
            documents: Candidates, as many as the tokenizer has numbers for (99 where it splits them into digits).
            permutations: Orders in which the list is shown, each a shift of the given one; the log-probabilities are
                averaged. As many orders as candidates remove the effect of the position in the list. Defaults to 1.

        Returns:
            np.ndarray: float32 logits of shape (n,), in the order of ``documents``.

        Raises:
            BadImageError: If an image cannot be read.
            ValueError: If there are no candidates or too many to number, or the prompt is too long.
            FloatingPointError: If a logit is not finite.
        """
        documents = listed(documents)
        if not documents:
            raise ValueError("a list needs at least 1 candidate, got 0")
        check_count("permutations", permutations)
        self.check_lists()
        return self.ranker().listwise(to_item(query), [to_item(document) for document in documents], permutations)

    def rank(  # type: ignore[override]
        self,
        query: object,
        documents: Iterable[object],
        top_k: int | None = None,
        return_documents: bool = False,
        *,
        method: Method = "pairwise",
        window: int = 10,
        permutations: int = 1,
        pair_order: PairOrder = "query_first",
        batch_size: int = 32,
        **kwargs: Any,
    ) -> Ranking:
        """Rank documents for a query.

        Equal documents are scored once. A document whose image is missing or corrupt comes last, with score 0 and the
        reason under "error". The cost is logged (level INFO).

        Args:
            query: Item, text, image or dict.
            documents: Candidates of the same kinds, also empty texts. Unlike an item, a str that names an existing
                image file is opened, as in sentence-transformers.
            top_k: Maximum number of documents to return. Defaults to all.
            return_documents: Whether to add each document under "text". Defaults to False.
            method: "pairwise" asks Yes or No about each document; "listwise" asks for the best of all; "hybrid" asks
                for the best of the ``window`` documents with the best pairwise scores. Defaults to "pairwise".
            window: Maximum length of a list. A window slides from the back to the front over more documents, so they
                should be in the order of a first stage. Defaults to 10, as in the paper.
            permutations: Orders in which each list is shown, see :meth:`listwise_scores`. Defaults to 1.
            pair_order: Order of query and document in the pairwise prompt: "query_first", "candidate_first", or "both",
                whose log-odds are averaged, at twice the cost. Defaults to "query_first", as in training.
            batch_size: Prompts per forward pass. Defaults to 32.
            **kwargs: Options of :meth:`CrossEncoder.rank` (pairwise only), for example ``prompt`` or ``pool``. Any but
                ``activation_fn`` makes it compute every pair by itself.

        Returns:
            list[dict]: ``{"corpus_id": int, "score": float}``, best first. Scores are, pairwise, probabilities of Yes
            (or what ``activation_fn`` makes of the log-odds); listwise, probabilities to be the best; hybrid, 1 plus
            that for documents of the list and the probability of Yes for the others.

        Raises:
            BadImageError: If the query's image cannot be read.
            ValueError: If an option is wrong, the tokenizer cannot number a list, or a prompt is longer than the model
                takes; the message names the document.
        """
        if method not in ("pairwise", "listwise", "hybrid"):
            raise ValueError(f"method={method!r}: expected 'pairwise', 'listwise' or 'hybrid'")
        check_count("window", window, at_least=2)
        check_count("permutations", permutations)
        check_count("batch_size", batch_size)
        if top_k is not None:
            check_count("top_k", top_k, at_least=0)
        if method != "pairwise" and kwargs:
            raise TypeError(f"rank(method={method!r}) takes no {', '.join(sorted(kwargs))}")
        listing: list[object] = listed(documents)
        if not listing:
            return []
        activation = cast(torch.nn.Module, kwargs.pop("activation_fn", None) or self.activation_fn)
        parsed = parse_inputs([query, *listing])
        whole_pairs = method == "pairwise" and (bool(kwargs) or not self._supports(parsed))
        if orders_of(pair_order) != ["query_first"] and (whole_pairs or method == "listwise"):
            raise ValueError(
                f"pair_order={pair_order!r} needs pairwise prompts of items, and no options of CrossEncoder.rank: leave "
                "it out, or use method='pairwise' alone"
            )
        if not whole_pairs:
            parsed.raise_for_invalid(["query", *(f"document {index}" for index in range(len(listing)))])
            self.ranker()  # made before the cost is counted: it runs the model once
        if method != "pairwise":
            self.check_lists()
        if isinstance(parsed.errors[0], BadImageError):
            raise parsed.errors[0]
        with ForwardCounter(self) as count:
            if whole_pairs:
                options = {"activation_fn": activation, "batch_size": batch_size, **kwargs}
                scores, reasons = self._rank_whole_pairs([query, *listing], parsed, options)
            else:
                scores, reasons = self._rank_items(parsed, method, window, permutations, batch_size, pair_order)
        if method == "pairwise" and not whole_pairs:
            scores = activation(torch.from_numpy(np.nan_to_num(scores, nan=_LOWEST_LOG_ODDS))).numpy()
        elif method != "pairwise":
            scores = np.nan_to_num(scores)
        logger.info("ranked %d documents, %s: %s", len(listing), method, count)
        ranking = sort_by_score(range(len(listing)), scores, reasons, "document {}")[:top_k]
        for entry in ranking if return_documents else ():
            entry["text"] = listing[entry["corpus_id"]]
        return ranking

    def _supports(self, parsed: ParsedInputs) -> bool:
        """Return whether pairs can share prefixes: the model answers Yes or No, and the inputs are items."""
        head = self[-1]
        answers = isinstance(head, LogitScore) and head.false_token_id is not None
        return answers and all(error is None or isinstance(error, BadImageError) for error in parsed.errors)

    def _rank_items(
        self,
        parsed: ParsedInputs,
        method: Method,
        window: int,
        permutations: int,
        batch_size: int,
        pair_order: PairOrder,
    ) -> PairScores:
        """Score documents with the engine; those without an item get NaN and their error."""
        query, *documents = parsed.items
        assert query is not None
        given = [index for index, document in enumerate(documents) if document is not None]
        found = self.ranker().rank(
            query,
            [document for document in documents if document is not None],
            method,
            window=window,
            permutations=permutations,
            batch_size=batch_size,
            names=[f"document {index}" for index in given],
            pair_order=pair_order,
        )
        scores = np.full(len(documents), np.nan, dtype=found.scores.dtype)
        scores[given] = found.scores
        reasons = [error if isinstance(error, ValueError) else None for error in parsed.errors[1:]]
        for index, reason in zip(given, found.reasons, strict=True):
            reasons[index] = reason
        return PairScores(scores, reasons)

    def _rank_whole_pairs(self, given: list[object], parsed: ParsedInputs, options: dict[str, Any]) -> PairScores:
        """Score each pair by itself, as sentence-transformers does; what cannot be read is left out."""
        reasons = [
            error if isinstance(error, BadImageError) else None if item is None else image_error(item)
            for item, error in zip(parsed.items, parsed.errors, strict=True)
        ]
        if reasons[0] is not None:
            raise reasons[0]
        # An image is passed as its item, for which a URL has been fetched; other inputs are passed as they were given.
        query, *documents = (
            value if item is None or item.image is None else item
            for value, item in zip(given, parsed.items, strict=True)
        )
        readable = [index for index, reason in enumerate(reasons[1:]) if reason is None]
        lowest = float(options["activation_fn"](torch.tensor([_LOWEST_LOG_ODDS])))
        scores = np.full(len(documents), lowest)
        if readable:
            found = cast(Ranking, super().rank(query, [documents[index] for index in readable], **options))
            scores[[readable[entry["corpus_id"]] for entry in found]] = [entry["score"] for entry in found]
        return PairScores(scores, [*reasons[1:]])
