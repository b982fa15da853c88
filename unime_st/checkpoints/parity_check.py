"""Parity check: the inputs of a parity file through a folder, or a server with the embeddings API of OpenAI."""

from __future__ import annotations

import base64
import io
import json
import os
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image
from sentence_transformers import CrossEncoder, SentenceTransformer

from unime_st.checkpoints.native_folder import quiet_transformers
from unime_st.checkpoints.parity import PARITY, Comparison, Probe, compare, probes_of
from unime_st.files import Json, read_json

KEYS = ("UNIME_API_KEY", "OPENAI_API_KEY")
"""Environment variables with the bearer token, in the order in which they are looked for."""
_SECONDS = 600


class ParityError(ValueError):
    """A parity file or server cannot be used; the message says why."""


def check_parity(
    target: str, file: str | Path | None = None, *, model: str | None = None, device: str | None = None
) -> list[Comparison]:
    """Compare what a folder or server gives with a parity file.

    Texts and images are sent as chats, prompts as system messages. A server that refuses chats gets texts as
    ``input``; images then cannot be compared.

    Args:
        target: Folder that stock Sentence Transformers loads, or URL of a server, up to ``/v1``.
        file: Parity file. Defaults to None, ``parity.json`` in the folder.
        model: Name of the model on the server. Defaults to None, the first that it lists.
        device: Device of the folder's model, e.g. "cpu". Defaults to None, the choice of Sentence Transformers.

    Returns:
        list[Comparison]: Lowest cosine and likely causes for each kind of input.

    Raises:
        ParityError: If there is no parity file, or the server does not answer as expected.

    Example:
        >>> import tempfile
        >>> from unime_st.checkpoints.plain_export import export_plain
        >>> with tempfile.TemporaryDirectory() as root:
        ...     folder = export_plain("unime-tiny", Path(root, "plain"), device="cpu")
        ...     [(found.kind, found.causes) for found in check_parity(str(folder), device="cpu")]
        [('text', []), ('image', []), ('image and text', [])]
    """
    is_url = target.startswith(("http://", "https://"))
    if is_url and file is None:
        raise ParityError(f"a server needs a parity file: --file FOLDER/{PARITY}, written by `unime export`")
    path = Path(target, PARITY) if file is None else Path(file)
    if not path.is_file():
        raise ParityError(f"{path} does not exist; `unime export MODEL --output DIR` writes it")
    content: Json = read_json(path)
    if not {"items", "prepared"} <= content.keys():
        raise ParityError(f"{path} is not a parity file of this version; write it again with `unime export`")
    probes = [probe for probe, _ in probes_of(content)]
    if is_url:
        server = _Server(target, model)
        prompts = [item.get("prompt") for item in content["items"]]
        vectors = [
            server.ask(probe, prompt, content["prepared"]) for probe, prompt in zip(probes, prompts, strict=True)
        ]
    else:
        vectors = _run_folder(Path(target), probes, content["prepared"], device)
    return compare(content, vectors)


def _run_folder(folder: Path, probes: list[Probe], prepared: str, device: str | None) -> list[np.ndarray]:
    image = Image.open(io.BytesIO(base64.b64decode(prepared.partition(",")[2])))
    settings = read_json(folder / "config_sentence_transformers.json")
    kind = CrossEncoder if settings.get("model_type") == "CrossEncoder" else SentenceTransformer
    with quiet_transformers():
        model = kind(str(folder), device=device, local_files_only=True)
        return [probe.run(model, image) for probe in probes]


class _Server:
    """Client of an embeddings server."""

    def __init__(self, url: str, model: str | None) -> None:
        base = url.rstrip("/").removesuffix("/embeddings")
        self.base = base if base.endswith("/v1") else f"{base}/v1"
        self._key = next(filter(None, map(os.environ.get, KEYS)), None)
        self._model, self._chats = model, True

    def ask(self, probe: Probe, prompt: str | None, image: str) -> np.ndarray:
        """Vector of a probe, or score of a pair."""
        parts: list[Json] = [{"type": "image_url", "image_url": {"url": image}}] if probe.image else []
        parts += [{"type": "text", "text": probe.text}] if probe.text else []
        if probe.kind == "pair":
            body = {"text_1": probe.query, "text_2": {"content": parts} if probe.image else probe.text}
            body |= {"model": self._model} if self._model else {}
            return np.array([self._send("/score", body)["data"][0]["score"]])
        if self._chats or probe.image:
            messages: list[Json] = [{"role": "user", "content": parts}]
            messages[:0] = [{"role": "system", "content": prompt}] if prompt else []
            try:
                return self._vector({"messages": messages})
            except ParityError:
                if probe.image:
                    raise
                self._chats = False
        return self._vector({"input": f"{prompt or ''}{probe.text}"})

    def _vector(self, body: Json) -> np.ndarray:
        if self._model is None:
            self._model = str(self._send("/models")["data"][0].get("id"))
        answer = self._send("/embeddings", {**body, "model": self._model, "encoding_format": "float"})
        return np.array(answer["data"][0]["embedding"], dtype=np.float64)

    def _send(self, path: str, body: Json | None = None) -> Json:
        headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {self._key}"} if self._key else {}
        )
        content = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(f"{self.base}{path}", content, headers)
            with urllib.request.urlopen(request, timeout=_SECONDS) as response:
                found = json.load(response)
        except urllib.error.HTTPError as error:
            text = error.read(300).decode(errors="replace")
            raise ParityError(f"{self.base}{path} answers {error.code}: {text}") from error
        except (OSError, ValueError) as error:
            raise ParityError(f"{self.base}{path} cannot be used ({error})") from error
        data = found.get("data") if isinstance(found, dict) else None
        if not isinstance(data, list) or not data or not isinstance(data[0], dict):
            raise ParityError(f"{self.base}{path} answers without data")
        return dict(found)
