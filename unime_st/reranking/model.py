"""`UniMEReranker`: a CrossEncoder that scores candidates one by one or all in one prompt."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modality import is_image_url_or_path
from sentence_transformers.base.modules import Transformer
from sentence_transformers.util import batch_to_device

from unime_st.data import ImageRef, Item
from unime_st.data.images import to_rgb
from unime_st.judging.features import check_length
from unime_st.judging.loading import ImageTokens, generative_modules, is_cross_encoder, prepare_saved, resolve_name
from unime_st.judging.prompts import check_template, index_token_ids
from unime_st.reranking.features import PLACES, ChatEncoder, is_plain, like_lengths, run_in_parts


class UniMEReranker(CrossEncoder):
    """Rerank texts, images and image+text with a generative vision-language model.

    A thin :class:`~sentence_transformers.cross_encoder.CrossEncoder`: what it saves loads in the plain class, with the
    chat template in the folder, and the reverse. It adds:

    - bare generative checkpoints (Qwen2-VL, Qwen2.5-VL, the released UniME-V2-Reranker) become pairwise rerankers;
    - :meth:`listwise_scores` and ``rank(..., method="listwise")`` score all candidates in one forward pass, where the
      authors' code generates an answer of up to 128 tokens and knows the winner only;
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
        """Answer prompts; those of like length pass together, and each distinct picture passes the vision tower once.

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
        return run_in_parts(input, lambda part: super(UniMEReranker, self).forward(part, **kwargs), self[0], parts)

    def preprocess_lists(self, queries: Sequence[Any], documents: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Turn queries, each with its own candidates, into features of listwise prompts.

        Args:
            queries: Items, texts, images or dicts.
            documents: Per query its candidates in the order in which they are numbered.

        Returns:
            dict: Features whose last position is followed by the index of the best candidate.

        Raises:
            ValueError: If a query has no candidates, a prompt is longer than the model takes, or the model's template
                knows no lists.

        Example:
            >>> features = reranker.preprocess_lists(["a square"], [["a circle", "a box"]])  # doctest: +SKIP
        """
        transformer = self._transformer
        template = transformer.processor.chat_template
        if template != self._listwise_template:
            check_template(transformer.processor, template, listwise=True)
            self._listwise_template = template
        to_messages = transformer.input_formatter.pair_to_messages
        chats, opened = [], dict[Any, Any]()
        for row, (query, candidates) in enumerate(zip(queries, documents, strict=True)):
            if not len(candidates):
                raise ValueError(f"query {row} has no candidates to rank")
            asked = _plain(query, opened)
            pairs = [to_messages((asked, _plain(candidate, opened))) for candidate in candidates]
            chats.append([pairs[0][0], *(pair[1] for pair in pairs)])
        return self.preprocess(chats, task="listwise")

    @torch.inference_mode()
    def listwise_scores(self, query: Any, documents: Sequence[Any]) -> np.ndarray:
        """Score all candidates of a query in one forward pass.

        The prompt ends with ``Ans: (``; the scores are the logits of the tokens 1, 2, ..., n at that position, so
        their softmax is the probability of each candidate to be named the best. They depend on the order of the
        candidates and compare within one list only.

        Args:
            query: Item, text, image or dict.
            documents: Candidates, as many as the tokenizer has index tokens for (9 where it splits numbers).

        Returns:
            np.ndarray: float32 logits of shape (n,), in the order of ``documents``.

        Raises:
            ValueError: If there are no candidates or more than index tokens, or the prompt is too long.
            FloatingPointError: If a logit is not finite.

        Example:
            >>> reranker.listwise_scores("a red square", ["a blue circle", "a red square"]).shape  # doctest: +SKIP
            (2,)
        """
        ids = index_token_ids(self.tokenizer, len(documents))
        features = batch_to_device(self.preprocess_lists([query], [documents]), self.device)
        training = self.training
        self.eval()
        logits = self(features)["causal_logits"][0, -1, ids].float().cpu().numpy()
        self.train(training)
        if not np.isfinite(logits).all():
            raise FloatingPointError(f"the index logits are {logits.tolist()} (dtype {self.dtype}); load in bfloat16")
        return logits

    def rank(  # type: ignore[override]
        self,
        query: Any,
        documents: Sequence[Any],
        top_k: int | None = None,
        return_documents: bool = False,
        *,
        method: Literal["pairwise", "listwise"] = "pairwise",
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        """Rank documents for a query.

        Args:
            query: Item, text, image or dict.
            documents: Candidates of the same kinds. Unlike an item, a str that names an existing image file is
                opened, as in sentence-transformers.
            top_k: How many to return. Defaults to all.
            return_documents: Whether to add each document under "text". Defaults to False.
            method: "pairwise" asks Yes or No about each document, "listwise" asks once for the best of all.
            **kwargs: Passed to :meth:`CrossEncoder.rank` (pairwise only), for example ``batch_size``.

        Returns:
            list[dict]: ``{"corpus_id": int, "score": float}``, best first; pairwise scores after the activation
            function, listwise scores as probabilities over the documents.

        Raises:
            ValueError: If the method is unknown, or a list is longer than the tokenizer has index tokens for.

        Example:
            >>> reranker.rank("a red square", ["a circle", "a red box"], method="listwise", top_k=1)  # doctest: +SKIP
            [{'corpus_id': 1, 'score': 0.93}]
        """
        if method == "pairwise":
            return super().rank(query, documents, top_k, return_documents, **kwargs)  # type: ignore[return-value]
        if method != "listwise":
            raise ValueError(f"method={method!r}: expected 'pairwise' or 'listwise'")
        if kwargs:
            raise TypeError(f"rank(method='listwise') takes no {', '.join(sorted(kwargs))}")
        if not len(documents):
            return []
        scores = torch.from_numpy(self.listwise_scores(query, documents)).softmax(-1).tolist()
        ranking: list[dict[str, Any]] = [{"corpus_id": place, "score": score} for place, score in enumerate(scores)]
        for entry in ranking if return_documents else ():
            entry["text"] = documents[entry["corpus_id"]]
        return sorted(ranking, key=lambda entry: -entry["score"])[:top_k]


def _is_pair(row: Any) -> bool:
    """Tell a pair of inputs from a chat, which is a list of dicts with roles."""
    return isinstance(row, (tuple, list)) and not (row and isinstance(row[0], dict) and "role" in row[0])


def _plain(value: Any, opened: dict[Any, Any]) -> Any:
    """Turn one side of a pair into what sentence-transformers takes, images decoded as RGB on white, each once."""
    if isinstance(value, Item):
        if value.image is not None and value.image not in opened:
            opened[value.image] = value.to_input()["image"]
        picture = {} if value.image is None else {"image": opened[value.image]}
        return picture if value.text is None else {**picture, "text": value.text}
    if isinstance(value, Image.Image):
        if value.mode != "RGB":
            # Kept with its original, whose id no other image can get meanwhile.
            return opened.setdefault(id(value), (value, to_rgb(value)))[1]
        return value
    if isinstance(value, str) and is_image_url_or_path(value) and os.path.isfile(value):
        if value not in opened:
            opened[value] = ImageRef(path=value).open()
        return opened[value]
    if isinstance(value, dict) and "role" not in value:
        parts = {key: part if key == "text" else _plain(part, opened) for key, part in value.items()}
        return {key: part for key, part in parts.items() if part is not None}
    return value
