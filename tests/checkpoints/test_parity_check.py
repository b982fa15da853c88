"""`unime parity`: an exported folder passes, and each of the usual mistakes is named."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer

from unime_st.checkpoints.parity_check import ParityError, check_parity
from unime_st.checkpoints.plain_export import export_plain
from unime_st.cli import main
from unime_st.files import read_json, write_json

pytestmark = pytest.mark.slow

Get = Callable[[str], Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_plain("unime-tiny", tmp_path_factory.mktemp("parity") / "plain", device="cpu")


def change(folder: Path, name: str, **fields: Any) -> None:
    write_json(folder / name, {**read_json(folder / name), **fields})


def with_template(ending: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "chat_template.jinja"
        text = path.read_text().rstrip("\n")
        assert text.endswith("<|im_end|><|im_start|>")
        path.write_text(text.removesuffix("<|im_end|><|im_start|>") + ending)

    return edit


def with_prompt(folder: Path) -> None:
    prompts = {"own": "Represent the user's input."}
    change(folder, "config_sentence_transformers.json", prompts=prompts, default_prompt_name="own")


MISTAKES: dict[str, Callable[[Path], None]] = {
    "pooling": lambda folder: change(folder, "1_Pooling/config.json", pooling_mode="mean"),
    "chat template": with_template(""),
    "special tokens": with_template("<|im_end|><|im_start|><|im_end|>"),
    "chat template or other special tokens": with_template("<|im_end|><|im_start|><|endoftext|>"),
    "prompt": with_prompt,
    "data type": lambda folder: change(folder, "config.json", dtype="bfloat16"),
}


def test_an_exported_folder_passes(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", str(exported), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=2)[2] for line in lines] == ["text", "image", "image and text"]
    assert all(line.startswith("cosine 1.000000") for line in lines)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(exported: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(exported, tmp_path / "wrong")
    MISTAKES[name](tmp_path / "wrong")
    assert main(["parity", str(tmp_path / "wrong"), "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert f"text  likely cause: {name}\n" in out, out


def test_unprepared_images_are_named(converted: Get, tmp_path: Path) -> None:
    folder = export_plain(converted("unime-v2"), tmp_path / "plain", device="cpu")
    assert all(not found.causes for found in check_parity(str(folder), device="cpu"))
    content = read_json(folder / "parity.json")
    write_json(tmp_path / "unprepared.json", {**content, "prepared": content["image"]})
    found = {
        entry.kind: entry.causes for entry in check_parity(str(folder), tmp_path / "unprepared.json", device="cpu")
    }
    assert found == {"text": [], "image": ["image size"], "image and text": ["image size"]}


def test_a_reranker_is_compared_by_its_scores(converted: Get, tmp_path: Path) -> None:
    folder = export_plain(converted("unime-v2-reranker"), tmp_path / "plain", device="cpu")
    (found,) = check_parity(str(folder), device="cpu")
    assert found.kind == "pair" and found.closeness > 0.99999


@pytest.fixture(scope="module")
def text_server(exported: Path) -> Iterator[str]:
    """A server that takes no chats, and cuts vectors if its model is called short."""
    model = SentenceTransformer(str(exported), device="cpu")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, {"data": [{"id": "plain"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if "messages" in body:
                self.answer(422, {"error": {"message": "unknown field messages"}})
                return
            vector = model.encode(body["input"])[: 64 if body["model"] == "short" else None]
            self.answer(200, {"data": [{"embedding": vector.tolist()}]})

        def answer(self, status: int, content: Any) -> None:
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_server_of_texts(
    exported: Path, text_server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ParityError, match=r"answers 422: .*unknown field messages"):
        check_parity(text_server, exported / "parity.json")
    content = read_json(exported / "parity.json")
    texts = [item for item in content["items"] if item["kind"] == "text"]
    write_json(tmp_path / "texts.json", {**content, "items": texts})
    words = ["parity", f"{text_server}/v1/embeddings", "--file", str(tmp_path / "texts.json")]
    assert main(words) == 0
    assert capsys.readouterr().out == "cosine 1.000000  text\n"
    assert main([*words, "--model", "short"]) == 1
    assert "likely cause: dimension: 64, expected 128" in capsys.readouterr().out


def test_wrong_calls(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "http://127.0.0.1:1"]) == 1
    assert "a server needs a parity file" in capsys.readouterr().err
    assert main(["parity", "http://127.0.0.1:1", "--file", str(exported / "parity.json")]) == 1
    assert "cannot be used" in capsys.readouterr().err
    assert main(["parity", str(tmp_path)]) == 1
    assert "does not exist; `unime export" in capsys.readouterr().err
    assert main(["parity", str(exported), "--least", "99.9"]) == 2
    assert "--least must be between -1 and 1, got 99.9" in capsys.readouterr().err
    write_json(tmp_path / "parity.json", {"items": []})
    assert main(["parity", str(tmp_path)]) == 1
    assert "is not a parity file of this version" in capsys.readouterr().err
