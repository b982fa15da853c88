"""Prompts of judge and reranker: instructions, chat templates, messages and answer tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from unime_st.data import ImageRef, Item, VideoRef
from unime_st.files import digest
from unime_st.losses.list_answers import check_list_prompt
from unime_st.paths import TINY

PAIR_PROMPT = (
    "I will provide you with a query and a candidate. Please evaluate whether the candidate meets the requirements of "
    "the query. If it does, respond with 'Yes'; if it doesn't, respond with 'No'."
)
"""Instruction of the pairwise prompt (UniME-V2, arXiv 2510.13515), byte for byte as the authors' code has it."""

LIST_PROMPT = (
    "I will provide you with a query followed by multiple candidates in the format: (1) cand1 (2) cand2, etc. "
    "Each candidate is independent of the others. Evaluate each candidate against the query, and respond with the "
    "number corresponding to the candidate that best meets the requirements of the query."
)
"""Instruction of the listwise prompt (UniME-V2, arXiv 2510.13515), byte for byte as the authors' code has it."""

ANSWERS = ("Yes", "No")
"""The two answers of the pairwise prompt: the candidate meets the requirements of the query, or it does not."""

LEAST_ANSWER_SHARE = 0.01
"""Probability that Yes and No must have together at the answer position, so that their ratio is an answer."""

NO_ANSWER_ADVICE = (
    f"Yes and No together have less than {LEAST_ANSWER_SHARE:.0%} of the probability at the first answer position: the "
    "model thinks or explains first, or does not know the prompt. Turn its thinking off, use its chat template, or "
    "another model"
)
"""Message for a model that does not answer Yes or No at the first token."""

TEMPLATES = {"official": "reranker.jinja", "tiny": "tiny_reranker.jinja"}
"""Chat templates that carry a query and its candidates: file names in ``unime_st/recipes/templates``."""

IMAGE_TOKENS = {"official": (4, 300)}
"""Minimum and maximum number of visual tokens per image, by template; others keep the processor's limits."""

# Order matters: a placeholder takes the line break that follows it along, as in the authors' code.
_PLACEHOLDERS = ("<|image_1|>\n", "<|image_1|>", "<|image_pad|>\n", "<|image_pad|>", "<image>\n", "<image>")

Message = dict[str, Any]
ItemLike = Item | str | Image.Image | Message


def load_template(name: str) -> str:
    """Return the text of a chat template.

    Args:
        name: "official" (UniME-V2's prompts in Qwen's chat format), "tiny" (a short one for ``unime-tiny``), or the
            text or file of a Jinja template that renders messages with the roles "query" and "document" and, with
            ``task == "listwise"``, numbers the documents and ends with ``Ans: (``.

    Returns:
        str: Jinja source.

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> from unime_st.judging import load_template
        >>> "Candidates:" in load_template("official")
        True
    """
    if "{{" in name or "{%" in name:
        return name
    if name not in TEMPLATES:
        if Path(name).is_file():
            return Path(name).read_text(encoding="utf-8")
        raise ValueError(
            f"unknown template {name!r}: expected one of {sorted(TEMPLATES)}, or the text or an existing file of a "
            "Jinja template"
        )
    return (resources.files("unime_st.recipes") / "templates" / TEMPLATES[name]).read_text(encoding="utf-8")


def template_for(template: str, model: str) -> str | None:
    """Template that an option of a stage names.

    ``auto`` is ``tiny`` for ``unime-tiny``, which knows no other prompts, else None: the template of a saved reranker
    or ``official``.

    Example:
        >>> template_for("auto", "unime-tiny"), template_for("official", "unime-tiny")
        ('tiny', 'official')
    """
    if template != "auto":
        return template
    return "tiny" if model == TINY else None


def clean_text(text: str) -> str:
    """Remove the image placeholders of training texts.

    Args:
        text: For example ``"<|image_1|>\\nRepresent the given image.\\n"``.

    Returns:
        str: The text without ``<|image_1|>``, ``<|image_pad|>`` and ``<image>``, each with the line break behind it.

    Example:
        >>> from unime_st.judging import clean_text
        >>> clean_text("<|image_1|> Find an image caption.")
        ' Find an image caption.'
    """
    for placeholder in _PLACEHOLDERS:
        text = text.replace(placeholder, "")
    return text


def as_item(value: ItemLike) -> Item:
    """Turn an input into an :class:`~unime_st.data.Item`.

    Args:
        value: An item, a text (never taken for a path), a Pillow image, or a dict with some of "text", "image" and
            "video", of which the others may be absent or None.

    Returns:
        Item: The same content.

    Raises:
        TypeError: If the value is of another type or a dict with other keys.
        ValueError: If the value holds neither a text nor an image nor a video.

    Example:
        >>> from unime_st.judging import as_item
        >>> as_item({"text": "a red square", "image": None}).modality
        'text'
    """
    if isinstance(value, Item):
        return value
    if isinstance(value, str):
        return Item(text=value)
    if isinstance(value, Image.Image):
        return Item(image=value)
    if isinstance(value, dict) and value.keys() <= {"text", "image", "video"}:
        return Item(**value)
    kind = f"a dict with keys {sorted(map(str, value))}" if isinstance(value, dict) else type(value).__name__
    raise TypeError(f"expected an Item, a str, a Pillow image or a dict with 'text', 'image' or 'video', got {kind}")


def message(role: str, text: str | None, image: object = None, video: object = None) -> Message:
    """Build one chat message, image and video before text.

    Args:
        role: "query" or "document".
        text: Text, cleaned with :func:`clean_text`; None for an image alone.
        image: A decoded image, True for the placeholder of an image that is processed elsewhere, or None.
        video: A list of decoded frames, True for the placeholder of a video, or None.

    Example:
        >>> from unime_st.scoring.prompts import message
        >>> message("query", "<|image_1|>\\nWhat is this?", image=True)
        {'role': 'query', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'What is this?'}]}
    """
    content: list[Message] = []
    if image is not None:
        content.append({"type": "image"} if image is True else {"type": "image", "image": image})
    if video is not None:
        content.append({"type": "video"} if video is True else {"type": "video", "video": video})
    if text is not None:
        content.append({"type": "text", "text": clean_text(text)})
    return {"role": role, "content": content}


def conversation(query: Item, documents: Sequence[Item], *, decode: bool = True) -> list[Message]:
    """Build the chat messages of a query with one candidate (pairwise) or several numbered ones (listwise).

    Images and videos are decoded, or with ``decode=False`` represented by placeholders.

    Example:
        >>> from unime_st.data import Item
        >>> from unime_st.scoring.prompts import conversation
        >>> [m["role"] for m in conversation(Item("a cat"), [Item("cat"), Item("dog")])]
        ['query', 'document', 'document']
    """

    def shown(media: ImageRef | VideoRef | None) -> object:
        return None if media is None else media.open() if decode else True

    items = [("query", query), *(("document", document) for document in documents)]
    return [message(role, item.text, shown(item.image), shown(item.video)) for role, item in items]


def answer_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Find the answer tokens of the pairwise prompt.

    Args:
        tokenizer: Tokenizer of a generative model.

    Returns:
        tuple[int, int]: Ids of "Yes" and "No".

    Raises:
        ValueError: If one of them is not a single token; the message lists similar tokens of the vocabulary.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from unime_st.judging import answer_token_ids
        >>> answer_token_ids(AutoTokenizer.from_pretrained("Qwen/Qwen2.5-VL-7B-Instruct"))  # doctest: +SKIP
        (9454, 2753)
    """
    found = []
    for word in ANSWERS:
        ids = tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            wanted = {answer.lower() for answer in ANSWERS}
            near = sorted(token for token in tokenizer.get_vocab() if token.strip(" \u0120\u2581").lower() in wanted)
            raise ValueError(
                f"the tokenizer splits {word!r} into {tokenizer.convert_ids_to_tokens(ids)}, so a score cannot be read "
                f"from one position. Similar tokens in its vocabulary: {near or 'none'}. Use another model, or build "
                "the CrossEncoder with a LogitScore of those ids and a template that asks for them."
            )
        found.append(ids[0])
    return found[0], found[1]


def lost_parts(render: Callable[[list[Message]], str], documents: int = 1) -> list[str]:
    """Parts of the input that a chat template silently drops, for a sample with some documents.

    Example:
        >>> from unime_st.scoring.prompts import lost_parts
        >>> lost_parts(lambda messages: str(messages[0]))
        ['image of document 1', 'text of document 1']
    """
    names = ["query", *(f"document {number}" for number in range(1, documents + 1))]
    full = [message(name.split()[0], f"word{index}", image=True) for index, name in enumerate(names)]
    prompt = render(full)
    lost = []
    for index, name in enumerate(names):
        for kind, changed in (("image", message("", f"word{index}")), ("text", message("", "other", image=True))):
            changed["role"] = full[index]["role"]
            if render([*full[:index], changed, *full[index + 1 :]]) == prompt:
                lost.append(f"{kind} of {name}")
    return lost


def query_comes_first(processor: ProcessorMixin, template: str) -> bool:
    """Whether a chat template shows the query before the candidate, so that the prompts of a query share it."""
    sample = [message("query", "first0"), message("document", "second0")]
    prompt = str(processor.apply_chat_template(sample, chat_template=template, tokenize=False))
    return prompt.find("first0") < prompt.find("second0")


def check_template(processor: ProcessorMixin, template: str, *, listwise: bool = False) -> None:
    """Raise an error for a chat template that drops a text or an image of a query and its candidates.

    Args:
        processor: Processor whose template engine is used.
        template: Jinja source.
        listwise: Check lists (``task="listwise"``) instead of pairs. Defaults to False.

    Raises:
        ValueError: If a part of the input does not reach the prompt, or a list is rendered like a pair.
    """
    options = {"task": "listwise"} if listwise else {}

    def render(messages: list[Message], **kwargs: Any) -> str:
        return str(processor.apply_chat_template(messages, chat_template=template, tokenize=False, **kwargs))

    try:
        lost = lost_parts(lambda messages: render(messages, **options), documents=2 if listwise else 1)
    except Exception as error:  # whatever a template of the user's raises, the answer is the same
        raise ValueError(f"the chat template cannot render a query and its candidates: {error!r}") from error
    what = "a query with a list of candidates" if listwise else "a query with a candidate"
    if lost:
        raise ValueError(
            f"the chat template drops a part of {what}: {', '.join(lost)} does not reach the prompt. Use a template "
            f"that renders the roles 'query' and 'document', for example one of {sorted(TEMPLATES)}."
        )
    if listwise:
        sample = [message("query", "first"), message("document", "first"), message("document", "second")]
        check_list_prompt(processor, sample, chat_template=template)


def prompt_hash(template: str, *options: object) -> str:
    """Fingerprint of a prompt apart from its items: template, and all else that changes the scores, as image limits.

    Example:
        >>> from unime_st.scoring.prompts import prompt_hash
        >>> len(prompt_hash("{{ messages }}", (4, 300)))
        16
    """
    return digest(repr((template, *options)), length=16)
