"""Fetching from the hub, over HTTP from a server that answers as the hub's interface says."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import safetensors.torch
import timm

COMMIT = "1" * 40
REPOSITORY = "someone/vit"


class Hub(http.server.BaseHTTPRequestHandler):
    """One repository: the list of its files, and each of them."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        name = path.rpartition("/")[2]
        tree = [{"type": "file", "path": file, "size": len(data), "oid": COMMIT} for file, data in self.files.items()]
        if path == "/":
            self.send(b"", body)
        elif path == f"/api/models/{REPOSITORY}/tree/main":
            self.send(json.dumps(tree).encode(), body)
        elif path.startswith(f"/{REPOSITORY}/resolve/") and name in self.files:
            self.send(self.files[name], body)
        else:
            self.send(b"{}", body, 404, {"X-Error-Code": "RepoNotFound"})

    def send(self, content: bytes, body: bool, status: int = 200, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT, "Content-Type": "application/json",
                   "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}  # fmt: skip
        for key, value in (headers | (more or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    class Own(Hub):
        files: ClassVar[dict[str, bytes]] = {}
        asked: ClassVar[list[str]] = []

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Own)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Own
    server.shutdown()


def read(endpoint: str, name: str, home: Path) -> str:
    """What a new process says of a checkpoint of the hub."""
    program = (
        "import sys; from evit_deploy import EvitDeployError, read_checkpoint\n"
        "try: found = read_checkpoint(sys.argv[1])\n"
        "except EvitDeployError as error: sys.exit(f'{error.exit_code} {error}')\n"
        "print(found.source, found.model, found.labels, found.preprocess.mean)"
    )
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1", "no_proxy": "*", "HF_HUB_OFFLINE": "0"}
    environment = os.environ | quiet | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", program, name], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    return done.stdout.strip() or done.stderr.strip()


def test_what_is_needed_is_fetched_once(hub, tmp_path):
    endpoint, served = hub
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, embed_dim=48, depth=2, num_heads=3, img_size=32)
    config = {
        "architecture": "vit_tiny_patch16_224", "num_classes": 2, "label_names": ["cat", "dog"],
        "model_args": {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 32},
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 32, 32]},
    }  # fmt: skip
    served.files |= {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": safetensors.torch.save(model.state_dict()),
        "pytorch_model.bin": b"must not be fetched",
        "modeling_vit.py": b"raise SystemExit('must not be fetched')",
    }
    wanted = "hf-hub:someone/vit vit_tiny_patch16_224 ['cat', 'dog'] (0.1, 0.2, 0.3)"
    assert read(endpoint, REPOSITORY, tmp_path) == wanted
    assert not [path for path in served.asked if path.endswith((".py", ".bin"))]
    served.asked.clear()
    assert read(endpoint, f"hf-hub:{REPOSITORY}", tmp_path) == wanted
    assert served.asked == []  # the second time it is in the cache


def test_what_the_hub_does_not_have(hub, tmp_path):
    endpoint, served = hub
    answer = read(endpoint, "someone/other", tmp_path)
    assert answer.startswith("2 hf-hub:someone/other: the Hugging Face hub answered: no such model")
    served.files |= {"README.md": b"nothing else"}
    assert read(endpoint, REPOSITORY, tmp_path).startswith(f"2 hf-hub:{REPOSITORY}: a folder without weights")
