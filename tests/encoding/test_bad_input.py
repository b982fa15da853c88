"""Invalid inputs, unresponsive servers and out-of-memory errors in the encoding engine."""

from __future__ import annotations

import base64
import http.server
import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_embedder import tiny_embedder

from unime_st import Item, UniME
from unime_st.data import BadImageError
from unime_st.data.image_urls import fetch_image
from unime_st.encoding import encode_items
from unime_st.encoding.content_keys import content_key
from unime_st.encoding.model_inputs import load_input


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 90, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def bomb() -> bytes:
    """A small PNG file with 400 million pixels."""
    return encoded(Image.new("1", (20_000, 20_000)))


def test_valid_and_corrupt_images_together():
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = [noise(), noise().rotate(90)]
    good = {
        "cmyk": encoded(noise().convert("CMYK"), "JPEG"),
        "palette": encoded(noise().convert("P")),
        "16 bit": encoded(Image.fromarray(np.arange(6000, dtype=np.uint16).reshape(60, 100))),
        "animated": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "1x1": encoded(Image.new("RGB", (1, 1))),
        "20,000x10": encoded(Image.new("RGB", (20_000, 10), "red")),
        "exif": encoded(noise(), "JPEG", exif=turned),
    }
    bad = {
        "truncated": encoded(noise(600, 400), "JPEG")[:9000],
        "bomb": bomb(),
        "text": b"no image",
        "empty": b"",
    }
    items = [Item(image=data) for data in (*good.values(), *bad.values())] + [Item("a text")]
    reasons: dict[int, str] = {}
    vectors, mask = encode_items(tiny_embedder(), items, on_error="skip", reasons=reasons, workers=3)
    assert mask.tolist() == [True] * len(good) + [False] * len(bad) + [True]
    assert np.isfinite(vectors[mask]).all() and np.isnan(vectors[~mask]).all()
    assert sorted(reasons) == [row for row in range(len(items)) if not mask[row]]
    alone = np.stack([tiny_embedder().encode([item.to_input()])[0] for item, fine in zip(items, mask) if fine])
    np.testing.assert_allclose(vectors[mask], alone, atol=2e-5)
    with pytest.raises(BadImageError, match=rf"item {len(good)}: "):
        encode_items(tiny_embedder(), items[: len(good) + 1])


def test_invalid_input_is_located_in_its_batch():
    rows = ["fine", {"image": noise(), "text": "<|image_pad|> one too many"}, {"image": noise(), "text": "fine"}]
    vectors, mask = encode_items(tiny_embedder(), rows, on_error="skip")
    assert mask.tolist() == [True, False, True] and np.isfinite(vectors[mask]).all()
    with pytest.raises(ValueError, match="item 1: "):
        encode_items(tiny_embedder(), rows)
    with pytest.raises(ValueError, match="all are missing or empty"):
        Item("")
    assert np.isfinite(encode_items(tiny_embedder(), ["", "a"])).all()


@pytest.mark.slow
def test_corrupt_images_by_path(tmp_path: Path):
    """Images given by path or as Pillow images, which the decoder of the processor opens."""
    (tmp_path / "truncated.jpg").write_bytes(encoded(noise(600, 400), "JPEG")[:9000])
    (tmp_path / "bomb.png").write_bytes(bomb())
    uri = "data:image/png;base64," + base64.b64encode(encoded(Image.new("1", (12_000, 8_000)))).decode()
    names = [str(tmp_path / name) for name in ("truncated.jpg", "bomb.png")]
    bad = [{"image": names[0]}, names[1], {"image": uri, "text": "x"}, Image.new("RGB", (0, 0))]
    rows = [noise(), *bad, "fine", bad[0], Image.open(names[0])]
    reasons: dict[int, str] = {}
    vectors, mask = encode_items(tiny_embedder(), rows, on_error="skip", reasons=reasons)
    assert mask.tolist() == [True, False, False, False, False, True, False, False]
    assert np.isfinite(vectors[mask]).all() and sorted(reasons) == [1, 2, 3, 4, 6, 7]
    assert "bomb.png" in reasons[2] and "12000 x 8000 is more than" in reasons[3]
    for row in bad:
        with pytest.raises(ValueError, match="item 1: "):
            encode_items(tiny_embedder(), ["fine", row, "too"])


def test_invalid_unicode():
    rows = ["fine", "half \ud800", {"text": "\udfff"}, {"image": noise(), "text": "half \ud800"}, "half \ud800", "too"]
    vectors, mask = encode_items(tiny_embedder(), rows * 30, on_error="skip")
    assert mask.tolist() == [True, False, False, False, False, True] * 30 and np.isfinite(vectors[mask]).all()
    with pytest.raises(ValueError, match="item 1: "):
        encode_items(tiny_embedder(), rows)


def test_one_image_in_every_form(tmp_path: Path):
    noise().save(tmp_path / "a.png")
    path, array = str(tmp_path / "a.png"), np.asarray(noise())
    forms = [noise(), path, {"image": path}, Item(image=path), Item(image=noise()), array, np.moveaxis(array, -1, 0)]
    forms += [{"image": torch.tensor(array)}, {"image": [noise()]}, Item(image=encoded(noise()))]
    vectors = encode_items(tiny_embedder(), iter(forms))
    np.testing.assert_allclose(vectors, np.tile(vectors[:1], (len(forms), 1)), atol=1e-5)


def test_single_inputs_and_invalid_options():
    for single in ("a text", {"text": "a text"}, Item("a text"), noise(), b"a text"):
        with pytest.raises(TypeError, match="a list or an iterator of inputs, got a single"):
            encode_items(tiny_embedder(), single)
    options: list[dict[str, Any]] = [{"batch_size": 0}, {"token_budget": 0}, {"workers": -1}, {"device": []}]
    for option in options:
        with pytest.raises(ValueError, match=next(iter(option))):
            encode_items(tiny_embedder(), ["a"], **option)

    def broken() -> Iterator[Item]:
        yield Item("a")
        raise OSError("the source broke")

    with pytest.raises(OSError, match="the source broke"):
        encode_items(tiny_embedder(), broken(), on_error="skip")


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/absent.png":
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        content = encoded(noise())
        if self.path == "/drip.png":
            for byte in content[:60]:
                try:
                    self.wfile.write(bytes([byte]))
                except OSError:  # the reader gave up, as it should
                    return
                time.sleep(0.05)
        elif self.path == "/silent.png":
            self.connection.recv(1)  # returns when the reader gives up
        else:
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_url_time_limit(site: str):
    assert fetch_image(f"{site}/good.png").size == (90, 60)
    for name in ("silent", "drip"):
        started = time.monotonic()
        with pytest.raises(BadImageError, match=f"{name}.png"):
            fetch_image(f"{site}/{name}.png", seconds=0.3)
        assert time.monotonic() - started < 30
    with pytest.raises(BadImageError, match=r"absent.png: cannot be fetched .*404"):
        fetch_image(f"{site}/absent.png")
    rows = [f"{site}/good.png", {"text": f"{site}/good.png"}, {"image": f"{site}/absent.png", "text": "x"}, noise()]
    assert isinstance(load_input(rows[0]), Image.Image) and load_input(rows[1]) == rows[1]
    vectors, mask = encode_items(tiny_embedder(), rows, on_error="skip")
    assert mask.tolist() == [True, True, False, True]
    np.testing.assert_allclose(vectors[0], vectors[3], atol=1e-5)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


def test_same_content_same_key(tmp_path: Path):
    noise().save(tmp_path / "a.png")
    assert content_key(Image.open(tmp_path / "a.png")) == content_key(Image.open(tmp_path / "a.png"))
    assert content_key(noise()) == content_key(noise()) != content_key(noise(60, 90))
    array = np.asarray(noise())
    assert content_key(array) == content_key(array.copy()) != content_key(array[::-1])
    assert content_key(torch.ones(2)) == content_key(torch.ones(2)) != content_key(torch.ones(2, dtype=torch.bfloat16))
    assert content_key("a") != content_key({"text": "a"}) != content_key(Item("a"))
    chat = [{"role": "user", "content": [{"type": "image", "image": noise()}]}]
    assert content_key(chat) == content_key([dict(chat[0])])
    assert content_key({"a": object()}) != content_key({"a": object()})


@pytest.mark.slow
def test_out_of_memory_halves_the_budget(caplog: pytest.LogCaptureFixture):
    """A hook raises the out-of-memory error, since no device here runs out reliably."""
    model = UniME(modules=list(tiny_embedder().children()), device="cpu")
    rows = [{"image": noise(30 * (1 + number % 4), 60), "text": str(number)} for number in range(12)]
    expected, sizes = model.encode(rows), []

    def small_device(module: torch.nn.Module, given: tuple[dict[str, torch.Tensor]]) -> None:
        sizes.append(given[0]["input_ids"].numel())
        if sizes[-1] > 40:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    hook = model[0].register_forward_pre_hook(small_device)
    try:
        np.testing.assert_allclose(model.encode(rows), expected, atol=1e-5)
        refused = sum(size > 40 for size in sizes)
        assert 1 <= refused < 10 and "continuing with" in caplog.text
        with pytest.raises(torch.OutOfMemoryError):
            model.encode(["word " * 50])
    finally:
        hook.remove()
