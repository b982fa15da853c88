"""Upload of a trained model: what arrives at a hub on this machine, and refusal before training."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from unime_st.data.records import RecordSet
from unime_st.data.scenes import training_records
from unime_st.options import OptionError
from unime_st.stages import InBatchArguments, train_in_batch


class HubServer(ThreadingHTTPServer):
    committed: dict[str, bytes]


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as an upload needs; keeps what is committed."""

    server: HubServer

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = f"http://127.0.0.1:{self.server.server_port}/me/model"
        answer: dict[str, object] = {}
        if self.headers.get("Authorization") != "Bearer hf_good":
            self.send_response(401)
        else:
            self.send_response(200)
        if self.path == "/api/repos/create":
            answer = {"url": url}
        elif "/preupload/" in self.path:
            files = json.loads(content)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif "/commit/" in self.path:
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    self.server.committed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"{url}/commit/abc", "commitOid": "abc"}
        body = json.dumps(answer).encode()
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """What is committed to the hub that the client talks to."""
    server = HubServer(("127.0.0.1", 0), Hub)
    server.committed = {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield server.committed
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_the_finished_folder_is_uploaded_or_the_run_is_refused(hub: dict[str, bytes], tmp_path: Path) -> None:
    records = RecordSet.write(tmp_path / "records", training_records(8), {})
    options = {"data": str(records.folder), "output": str(tmp_path / "out"), "max_steps": 1, "push_to_hub": True}
    options |= {"per_device_train_batch_size": 4, "hub_model_id": "me/model", "save_steps": 1}
    with pytest.raises(OptionError, match=r"push_to_hub: the repository me/model cannot be made .*hf auth login"):
        train_in_batch(InBatchArguments(**options, hub_token="hf_bad"))
    assert not hub and not (tmp_path / "out").exists()
    folder = train_in_batch(InBatchArguments(**options, hub_token="hf_good"))
    expected = {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".npy"
    }
    assert set(hub) == expected and {"model.safetensors", "modules.json", "manifest.json"} <= expected
    assert hub["README.md"] == (folder / "README.md").read_bytes() and b'"stage": "in_batch"' in hub["README.md"]
    assert b"hf_good" not in (folder / "manifest.json").read_bytes() + hub["README.md"]
    hub.clear()
    train_in_batch(InBatchArguments(**options, hub_token="hf_bad"))  # finished before: nothing to upload
    assert not hub
