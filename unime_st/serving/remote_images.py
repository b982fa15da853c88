"""Images behind URLs in requests: fetched from named public hosts only."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from urllib.parse import urlsplit

from unime_st.data.image_urls import fetch_bytes
from unime_st.data.images import BadImageError
from unime_st.serving.api_errors import bad_request
from unime_st.serving.item_drafts import ItemDraft
from unime_st.serving.settings import ServeSettings


async def fetch_all(drafts: Sequence[ItemDraft], settings: ServeSettings) -> list[bytes | None]:
    """Encoded images of the drafts with a URL, one after the other, together within the size of a request body.

    Raises:
        ApiError: If a host is not allowed, or an image cannot be fetched.
    """
    for draft in drafts:
        _check_host(draft, settings.allow_urls)
    found: list[bytes | None] = []
    left = settings.max_body
    for draft in drafts:
        if draft.url is None:
            found.append(None)
            continue
        try:
            found.append(
                await asyncio.to_thread(fetch_bytes, draft.url, hosts=settings.allow_urls, max_bytes=max(left, 1))
            )
        except BadImageError:  # its message would tell what is behind the address
            raise bad_request(f"{draft.param}: the image could not be fetched", draft.param, "image_fetch") from None
        left -= len(found[-1] or b"")
    return found


def _check_host(draft: ItemDraft, allowed: Sequence[str]) -> None:
    if draft.url is None:
        return
    try:
        host = urlsplit(draft.url).hostname
    except ValueError:
        host = None
    if host not in allowed:
        message = (
            f"{draft.param}: images are not fetched from this host; send a data URI, or start the server with "
            "--allow-urls HOST"
        )
        raise bad_request(message, draft.param, "url_not_allowed")
