"""`UniMEReranker`: a CrossEncoder that scores candidates one by one or all in one prompt."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modality import is_image_url_or_path
from sentence_transformers.base.modules import Transformer

from unime_st.data import ImageRef, Item
from unime_st.data.images import padded_to_aspect, to_rgb
from unime_st.reranking.chat_features import PLACES, ChatEncoder, is_plain, like_lengths, run_in_parts
from unime_st.reranking.forward_counter import measured
from unime_st.reranking.parsing import Offer, check_query, foreign, refuse_foreign, to_item, to_offers, unreadable
from unime_st.reranking.ranker import UNREADABLE, Method, Ranker, Scored, ranked
from unime_st.scoring.loading import ImageTokens, generative_modules, is_cross_encoder, prepare_saved, resolve_name
from unime_st.scoring.prompt_encoder import check_length
from unime_st.scoring.prompts import check_template

logger = logging.getLogger(__name__)


class UniMEReranker(CrossEncoder):
    """Rerank texts, images and image+text with a generative vision-language model.

    A thin :class:`~sentence_transformers.cross_encoder.CrossEncoder`: what it saves loads in the plain class, with the
    chat template in the folder, and the reverse. It adds:

    - bare generative checkpoints (Qwen2-VL, Qwen2.5-VL, the released UniME-V2-Reranker) become pairwise rerankers;
    - :meth:`listwise_scores` and ``rank(..., method="listwise")`` score all candidates in one forward pass, where the
      authors' code generates an answer of up to 128 tokens and knows the winner only;
    - :meth:`rank` lets what its prompts have in common pass the model once, and each image the vision tower;
    - inputs may also be :class:`~unime_st.data.Item`, decoded batch by batch;
    - a prompt longer than the model takes is refused: cut, its end would no longer be where the answer is read.

    Pairwise scores are ``sigmoid(l_Yes - l_No)`` unless ``activation_fn`` says otherwise.

    Args:
        model_name_or_path: Folder, hub repository or alias ("unime-v2-reranker", "unime-tiny").
        template: Name or text of the chat template, see :func:`~unime_st.judging.load_template`. Defaults to the one a
            saved reranker carries, else "official".
        image_tokens: Fewest and most visual tokens per image. Defaults to those saved, else to what the template was
            made for (4 to 300 for "official").
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
        self._encoder: tuple[Any, ChatEncoder] | None = None
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
        modules = generative_modules(folder, template=template or "official", image_tokens=image_tokens, **own)
        super().__init__(modules=modules, num_labels=1, **kwargs)

    @property
    def _transformer(self) -> Transformer:
        return cast(Transformer, self[0])

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
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

        Example:
            >>> reranker.preprocess([("a red square", "a blue circle")])["input_ids"].shape[0]  # doctest: +SKIP
            1
        """
        opened: dict[Any, Any] = {}
        rows = [tuple(_plain(side, opened) for side in row) if _is_pair(row) else row for row in inputs]
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

    def forward(self, input: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Answer prompts; those of like length pass together, and each distinct image passes the vision tower once.

        Args:
            input: Features from :meth:`preprocess`.
            **kwargs: Passed on to the modules.

        Returns:
            dict: The features with "scores" and "causal_logits" behind each prompt.

        Example:
            >>> reranker(reranker.preprocess([("a red square", "a blue circle")]))["scores"].shape  # doctest: +SKIP
            torch.Size([1, 1])
        """
        if PLACES not in input:
            return super().forward(input, **kwargs)
        lengths = input["attention_mask"].sum(1).tolist()
        # Processes of a sharded model wait for each other in every forward pass, so all must make the same number.
        whole = torch.is_grad_enabled() and torch.distributed.is_available() and torch.distributed.is_initialized()
        parts = [list(range(len(lengths)))] if whole else like_lengths(lengths)
        return run_in_parts(
            input, lambda part: super(UniMEReranker, self).forward(part, **kwargs), self._transformer, parts
        )

    def preprocess_lists(
        self, queries: Sequence[Any], documents: Sequence[Sequence[Any]], *, share: bool = True
    ) -> dict[str, Any]:
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

        Example:
            >>> features = reranker.preprocess_lists(["a square"], [["a circle", "a box"]])  # doctest: +SKIP
        """
        self._check_lists()
        to_messages = self._transformer.input_formatter.pair_to_messages
        chats, opened = [], dict[Any, Any]()
        for row, (query, candidates) in enumerate(zip(queries, documents, strict=True)):
            if not len(candidates):
                raise ValueError(f"query {row} has no candidates to rank")
            asked = _plain(query, opened)
            pairs = [to_messages((asked, _plain(candidate, opened))) for candidate in candidates]
            chats.append([pairs[0][0], *(pair[1] for pair in pairs)])
        options: dict[str, Any] = {} if share else {"processing_kwargs": {}}
        return self.preprocess(chats, task="listwise", **options)

    def _check_lists(self) -> None:
        """Refuse a template that drops a part of a list."""
        processor = self._transformer.processor
        if processor.chat_template != self._listwise_template:
            check_template(processor, processor.chat_template, listwise=True)
            self._listwise_template = processor.chat_template

    def _engine(self) -> Ranker:
        """The engine for the weights, the template and the image limits as they are now."""
        if self._ranker is None or self._ranker.state != Ranker.state_of(self):
            self._ranker = Ranker(self)
        return self._ranker

    def listwise_scores(self, query: Any, documents: Sequence[Any], *, permutations: int = 1) -> np.ndarray:
        """Score all candidates of a query in one list.

        The prompt ends with ``Ans: (``; the scores are the logits of the tokens 1, 2, ..., n at that position, so
        their softmax is the probability of each candidate to be named the best. They depend on the order of the
        candidates and compare within one list only. Where 10 begins with the token of 1, as in Qwen's tokenizers, the
        two share its logit by what follows, which takes a second, short pass.

        Args:
            query: Item, text, image or dict.
            documents: Candidates, as many as the tokenizer has numbers for (99 where it splits them into digits).
            permutations: Orders to ask in, each a shift of the given one; the log-probabilities are averaged. As many
                as there are candidates removes what the place in the list does to a score. Defaults to 1.

        Returns:
            np.ndarray: float32 logits of shape (n,), in the order of ``documents``.

        Raises:
            BadImageError: If an image cannot be read.
            ValueError: If there are no candidates or too many to number, or the prompt is too long.
            FloatingPointError: If a logit is not finite.

        Example:
            >>> reranker.listwise_scores("a red square", ["a blue circle", "a red square"]).shape  # doctest: +SKIP
            (2,)
        """
        if not len(documents):
            raise ValueError("a list needs at least 1 candidate, got 0")
        if permutations < 1:
            raise ValueError(f"permutations must be at least 1, got {permutations}")
        self._check_lists()
        return self._engine().listwise(to_item(query), [to_item(document) for document in documents], permutations)

    def rank(  # type: ignore[override]
        self,
        query: Any,
        documents: Sequence[Any],
        top_k: int | None = None,
        return_documents: bool = False,
        *,
        method: Method = "pairwise",
        window: int = 10,
        permutations: int = 1,
        batch_size: int = 32,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        """Rank documents for a query.

        Equal documents are asked about once and get equal scores. A document whose image is missing or corrupt comes
        last, with score 0 and the reason under "error". What it cost is logged (level INFO).

        Args:
            query: Item, text, image or dict.
            documents: Candidates of the same kinds, also empty texts. Unlike an item, a str that names an existing
                image file is opened, as in sentence-transformers.
            top_k: How many to return at most. Defaults to all.
            return_documents: Whether to add each document under "text". Defaults to False.
            method: "pairwise" asks Yes or No about each document; "listwise" asks for the best of all, in windows that
                slide from the back to the front where there are more than ``window``, so it is best given documents in
                the order of a first stage; "hybrid" asks for the best of the ``window`` documents that did best pairwise.
            window: Most candidates of a list. Defaults to 10, as in the paper.
            permutations: Orders in which each list is asked about, see :meth:`listwise_scores`. Defaults to 1.
            batch_size: Prompts per forward pass. Defaults to 32.
            **kwargs: Passed to :meth:`CrossEncoder.rank` (pairwise only), for example ``prompt`` or ``pool``; except
                ``activation_fn``, these are for its own way, which shares nothing between pairs.

        Returns:
            list[dict]: ``{"corpus_id": int, "score": float}``, best first. Scores are, pairwise, probabilities of Yes
            (or what ``activation_fn`` makes of the log-odds); listwise, probabilities to be the best; hybrid, 1 plus
            that for documents of the list and the probability of Yes for the others.

        Raises:
            BadImageError: If the query's image cannot be read.
            ValueError: If an option is wrong, the tokenizer cannot number a list, or a prompt is longer than the model
                takes; the message names the document.

        Example:
            >>> reranker.rank("a red square", ["a circle", "a red box"], method="listwise", top_k=1)  # doctest: +SKIP
            [{'corpus_id': 1, 'score': 0.93}]
        """
        if method not in ("pairwise", "listwise", "hybrid"):
            raise ValueError(f"method={method!r}: expected 'pairwise', 'listwise' or 'hybrid'")
        if window < 2 or permutations < 1:
            raise ValueError(f"expected window >= 2 and permutations >= 1, got {window} and {permutations}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if top_k is not None and top_k < 0:
            raise ValueError(f"top_k must not be negative, got {top_k}")
        if method != "pairwise" and kwargs:
            raise TypeError(f"rank(method={method!r}) takes no {', '.join(sorted(kwargs))}")
        if not len(documents):
            return []
        activation = kwargs.pop("activation_fn", None) or self.activation_fn
        asked, *offered = to_offers([query, *documents])
        apart = method == "pairwise" and (kwargs or not self._shares() or foreign([asked, *offered]) is not None)
        if not apart:
            refuse_foreign(asked, offered)
            engine = self._engine()  # made before the cost is counted: it tries the model once
        if method != "pairwise":
            self._check_lists()
        with measured(self) as cost:
            if apart:
                options = {"activation_fn": activation, "batch_size": batch_size, **kwargs}
                scores, reasons = self._rank_apart([query, *documents], [asked, *offered], options)
            else:
                scores, reasons = engine.rank(
                    cast(Item, asked), offered, method, window=window, permutations=permutations, batch_size=batch_size
                )
                if method == "pairwise":
                    scores = cast(torch.nn.Module, activation)(torch.from_numpy(scores)).numpy()
        logger.info("ranked %d documents, %s: %s", len(documents), method, cost)
        ranking = ranked(scores, reasons)[:top_k]
        for entry in ranking if return_documents else ():
            entry["text"] = documents[entry["corpus_id"]]
        return ranking

    def _shares(self) -> bool:
        """Whether this model says Yes or No, so that the engine can share what its pairs have in common."""
        try:
            self._engine()
        except (TypeError, ValueError, AttributeError):
            return False
        return True

    def _rank_apart(self, given: list[Any], offers: list[Offer], options: dict[str, Any]) -> Scored:
        """Score each pair on its own, as sentence-transformers does; what cannot be read is left out."""
        check_query(offers[0])
        # With its image the item is shown, for which a URL has been fetched; else what was given, in its own form.
        query, *documents = (
            offer if isinstance(offer, Item) and offer.image is not None else value
            for value, offer in zip(given, offers, strict=True)
        )
        reasons = unreadable(offers[1:], decode=True)
        readable = [index for index, reason in enumerate(reasons) if reason is None]
        lowest = cast(torch.nn.Module, options["activation_fn"])(torch.tensor([UNREADABLE]))
        scores = np.full(len(documents), float(lowest))
        if readable:
            found = super().rank(query, [documents[index] for index in readable], **options)
            scores[[readable[entry["corpus_id"]] for entry in found]] = [entry["score"] for entry in found]  # type: ignore[index]
        return scores, reasons


def _is_pair(row: Any) -> bool:
    """Tell a pair of inputs from a chat, which is a list of dicts with roles."""
    return isinstance(row, (tuple, list)) and not (row and isinstance(row[0], dict) and "role" in row[0])


def _plain(value: Any, opened: dict[Any, Any]) -> Any:
    """Turn one side of a pair into what sentence-transformers takes, images decoded as RGB on white, each once."""
    if isinstance(value, Item):
        if value.image is not None and value.image not in opened:
            opened[value.image] = value.to_input()["image"]
        image = {} if value.image is None else {"image": opened[value.image]}
        return image if value.text is None else {**image, "text": value.text}
    if isinstance(value, Image.Image):
        if id(value) not in opened:
            # Kept with its original, whose id no other image can get meanwhile.
            opened[id(value)] = value, padded_to_aspect(value if value.mode == "RGB" else to_rgb(value))
        return opened[id(value)][1]
    if isinstance(value, str) and is_image_url_or_path(value) and os.path.isfile(value):
        if value not in opened:
            opened[value] = padded_to_aspect(ImageRef(path=value).open())
        return opened[value]
    if isinstance(value, dict) and "role" not in value:
        parts = {key: part if key == "text" else _plain(part, opened) for key, part in value.items()}
        return {key: part for key, part in parts.items() if part is not None}
    return value
