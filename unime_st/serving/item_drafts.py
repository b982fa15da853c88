"""Items of request bodies: texts, images in data URIs or behind URLs, chat messages; nothing is decoded here."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from unime_st.data.items import Item
from unime_st.serving.api_errors import ApiError, bad_request

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Image formats that are accepted."""

_LONGEST_FIELD = 10_000
"""Characters of a field that is not an item, such as a prompt."""

_TOKENS = (
    "token ids are not supported, because they belong to the tokenizer of another model: send texts (in LangChain: "
    "check_embedding_ctx_length=False)"
)


@dataclass(frozen=True)
class ItemDraft:
    """An item of a request, before its image is fetched and checked.

    Args:
        param: Where it stands in the request body.
        text: Its text.
        data: Its encoded image, or
        url: where the image is.
    """

    param: str
    text: str | None = None
    data: bytes | None = None
    url: str | None = None

    def finish(self, max_pixels: int, fetched: bytes | None = None) -> Item:
        """The item; ApiError if there is nothing in it, or its image is not one that is accepted."""
        data = self.data if fetched is None else fetched
        if data is not None:
            _check_image(data, self.param, max_pixels)
        try:
            return Item(self.text, data)
        except ValueError as error:
            raise bad_request(f"{self.param}: {error}", self.param) from error


def _check_image(data: bytes, param: str, max_pixels: int) -> None:
    """Refuse other files than images, and images with too many pixels, by their headers."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise bad_request(f"{param}: the image has more than {max_pixels} pixels", param, "image_too_large") from error
    except Exception as error:  # decoders raise arbitrary exception types on corrupt bytes
        raise bad_request(f"{param}: not an image in one of the formats {', '.join(FORMATS)}", param) from error
    if width * height > max_pixels:
        message = f"{param}: the image has {width} x {height} pixels, expected at most {max_pixels}"
        raise bad_request(message, param, "image_too_large")


def read_item(value: object, param: str) -> ItemDraft:
    """Item of a request: a text, ``{"text": ..., "image": ...}``, or ``{"content": [parts]}``.

    Example:
        >>> read_item({"text": "a ship", "image": "data:image/png;base64,aGVsbG8="}, "input")
        ItemDraft(param='input', text='a ship', data=b'hello', url=None)
    """
    if isinstance(value, str):
        return ItemDraft(param, value)
    if isinstance(value, int) or (isinstance(value, list) and value and isinstance(value[0], int)):
        raise bad_request(f"{param}: {_TOKENS}", param)
    if isinstance(value, dict) and "content" in value:
        check_fields(value, ("content", "role"), param)
        return _read_content(value["content"], f"{param}.content")
    if not isinstance(value, dict) or not value.keys() & {"text", "image", "image_url"}:
        raise bad_request(
            f'{param}: expected a text or {{"text": ..., "image": data URI}}, found {_kind(value)}', param
        )
    check_fields(value, ("text", "image", "image_url"), param)
    text, image = value.get("text"), value.get("image", value.get("image_url"))
    if text is not None and not isinstance(text, str):
        raise bad_request(f"{param}.text: expected a text, found {_kind(text)}", f"{param}.text")
    return _with_image(ItemDraft(param, text), image, f"{param}.image")


def read_messages(value: object) -> tuple[ItemDraft, str | None]:
    """Item of a chat, and its instruction: the text of the system message, None if there is none."""
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise bad_request("messages: expected a list of messages with role and content", "messages")
    draft: ItemDraft | None = None
    prompt: str | None = None
    for number, message in enumerate(value):
        param = f"messages[{number}]"
        check_fields(message, ("role", "content", "name"), param)
        role, content = message.get("role"), message.get("content")
        if role == "assistant" and content in (None, "", [], [{"type": "text", "text": ""}]):
            continue  # as clients of vLLM end a chat
        if role not in ("system", "user"):
            raise bad_request(f"{param}.role: expected 'system' or 'user'", f"{param}.role")
        found = _read_content(content, f"{param}.content")
        if role == "system" and prompt is None and found.data is None and found.url is None:
            prompt = _checked_text(found.text or "", f"{param}.content")
        elif role == "user" and draft is None:
            draft = found
        else:
            raise bad_request(f"{param}: expected one user message, and at most one system message of text", param)
    if draft is None:
        raise bad_request("messages: there is no user message", "messages")
    return draft, prompt


def _read_content(content: object, param: str) -> ItemDraft:
    """Item of the content of a message: texts are joined by line breaks, and the image comes first."""
    if isinstance(content, str):
        return ItemDraft(param, content)
    if not isinstance(content, list) or not content:
        raise bad_request(f"{param}: expected a text or a list of parts, found {_kind(content)}", param)
    texts, draft = [], ItemDraft(param)
    for number, part in enumerate(content):
        where = f"{param}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url" and "image_url" in part:
            if draft.data is not None or draft.url is not None:
                raise bad_request(f"{where}: a second image, expected at most one", where)
            draft = _with_image(draft, part["image_url"], f"{where}.image_url")
        else:
            raise bad_request(
                f'{where}: expected {{"type": "text", "text": ...}} or {{"type": "image_url", "image_url": ...}}',
                where,
            )
    return ItemDraft(param, "\n".join(texts) if texts else None, draft.data, draft.url)


def _with_image(draft: ItemDraft, image: object, param: str) -> ItemDraft:
    if image is None:
        return draft
    if isinstance(image, dict):
        check_fields(image, ("url", "detail"), param)
        image = image.get("url")
    if not isinstance(image, str):
        raise bad_request(f"{param}: expected a data URI or a URL, found {_kind(image)}", param)
    if image[:8].lower().startswith(("http://", "https://")):
        return ItemDraft(draft.param, draft.text, url=image)
    return ItemDraft(draft.param, draft.text, data=_decode(image, param))


def _decode(uri: str, param: str) -> bytes:
    head, comma, content = uri.partition(",")
    kind = head[:100].lower()
    if not comma or not kind.startswith("data:image/") or not kind.endswith(";base64"):
        raise bad_request(f"{param}: expected a data URI that begins with data:image/TYPE;base64,", param)
    try:
        return base64.b64decode(content, validate=True)
    except (ValueError, binascii.Error) as error:
        raise bad_request(f"{param}: the data URI is not valid base64", param) from error


def check_fields(value: Mapping[str, object], known: Sequence[str], param: str = "") -> None:
    """Refuse fields that are not known: one that changes vectors elsewhere must not be ignored silently."""
    for name in value:
        if name not in known:
            field = f"{param}.{name}" if param else name
            message = f"unknown field {field[:100]!r}; known fields are {', '.join(known)}"
            raise bad_request(message, field[:100], "unknown_field")


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", type(None): "null", str: "a text", bool: "a boolean"}
    return names.get(type(value), "a number")


def integer_field(body: Mapping[str, object], name: str, at_most: int | None = None) -> int | None:
    """Field of a request that is a count of at least 1."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (at_most is not None and value > at_most):
        limit = "" if at_most is None else f" and at most {at_most}"
        raise bad_request(f"{name}: expected an integer of at least 1{limit}", name)
    return value


def text_field(body: Mapping[str, object], name: str) -> str | None:
    """Field of a request that is a text."""
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise bad_request(f"{name}: expected a text, found {_kind(value)}", name)
    return None if value is None else _checked_text(value, name)


def _checked_text(value: str, param: str) -> str:
    """A text that is not an item; ApiError if it is too long, or not valid Unicode."""
    if len(value) > _LONGEST_FIELD:
        raise bad_request(f"{param}: {len(value)} characters, expected at most {_LONGEST_FIELD}", param)
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise bad_request(f"{param}: not valid Unicode", param)
    return value


def boolean_field(body: Mapping[str, object], name: str, default: bool) -> bool:
    """Field of a request that is true or false."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad_request(f"{name}: expected true or false, found {_kind(value)}", name)
    return default if value is None else value


def check_model(body: Mapping[str, object], expected: str) -> None:
    """Refuse another model than the one that is served; a request without a model means it."""
    name = text_field(body, "model")
    if name is not None and name != expected:
        raise ApiError(
            404, f"the model {name[:100]!r} is not served here; {expected!r} is", code="model_not_found", param="model"
        )
