"""Models on the hub: what is downloaded, when, and what is said where it cannot be. The hub is a server of our own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import one

from jaxserve import LLM
from jaxserve.build import ModelFiles
from jaxserve.engine_args import EngineArgs

NAME, COMMIT = "someone/tiny", "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = {"one.safetensors": "model.layers.0.", "two.safetensors": ""}
PROMPT = "abc"
LIMITS = ["--max-model-len", "32", "--max-num-seqs", "1", "--max-num-batched-tokens", "8"]


class Hub(ThreadingHTTPServer):
    """One repository of the hub, some that are not there for everybody, and what was asked for.

    The API: https://huggingface.co/docs/hub/api
    """

    daemon_threads = True

    def __init__(self, files: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = files
        self.sent: list[str] = []
        self.breaks = Counter[str]()
        """How often the transfer of a file breaks off in the middle."""

    @property
    def weights(self) -> list[str]:
        """Of what was sent."""
        return [name for name in self.sent if name.endswith(".safetensors")]

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def run(self, cache: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A Python process whose hub this is."""
        where = {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "HF_HOME": str(cache)}
        env = os.environ | where | {"HF_HUB_DISABLE_XET": "1", "JAX_PLATFORMS": "cpu"} | environment
        command = (sys.executable, "-W", "error", *command)
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)


class Answer(BaseHTTPRequestHandler):
    """To one connection."""

    protocol_version = "HTTP/1.1"
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        kind, _, rest = path.removeprefix(f"/api/models/{NAME}/").partition("/")
        if kind == "revision" and rest in ("main", COMMIT):
            self.json({"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in self.repository]})
        elif kind == "revision":
            self.refuse(404, "RevisionNotFound")
        elif kind == "tree" and rest == COMMIT:
            self.json([self.entry(file) for file in self.repository])
        elif path.startswith("/api/models/someone/gated/"):
            self.refuse(403, "GatedRepo")
        elif path.startswith(f"/{NAME}/resolve/{COMMIT}/"):
            self.file(self.server.files / path.rpartition("/")[2])
        else:
            self.refuse(404, "RepoNotFound")

    @property
    def repository(self) -> list[Path]:
        return sorted(self.server.files.iterdir())

    def entry(self, file: Path) -> dict[str, object]:
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _digest(file)[:40]}

    def json(self, content: object) -> None:
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def refuse(self, code: int, reason: str) -> None:
        self.answer(code, b"{}", {"X-Error-Code": reason})

    def file(self, file: Path) -> None:
        headers = {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": COMMIT}
        breaks = False
        if self.command == "GET":
            self.server.sent.append(file.name)
            breaks = self.server.breaks[file.name] > 0
            self.server.breaks[file.name] -= breaks
        self.answer(200, file.read_bytes(), headers, breaks)

    def answer(self, code: int, content: bytes, headers: dict[str, str], breaks: bool = False) -> None:
        self.send_response(code)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if breaks else content)
        self.close_connection = breaks


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def files(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in two files, and beside it one that only another program reads."""
    directory = shutil.copytree(tiny_model, tmp_path_factory.mktemp("hub") / "files")
    tensors, index = load_file(directory / "model.safetensors"), {}
    for file, prefix in WEIGHTS.items():
        mine = {name: tensors.pop(name) for name in [n for n in tensors if n.startswith(prefix)]}
        save_file(mine, directory / file)
        index |= dict.fromkeys(mine, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (directory / "model.safetensors").rename(directory / "consolidated.safetensors")
    return directory


@pytest.fixture
def hub(files: Path) -> Iterator[Hub]:
    hub = Hub(files)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    yield hub
    hub.close()


def test_weights_are_downloaded_when_they_are_loaded(hub: Hub, tiny_llm: LLM, tmp_path: Path) -> None:
    """And no file of theirs twice, though a connection breaks; later the hub need not be there."""
    shown = hub.run(tmp_path, "-m", "jaxserve", "info", "--model", NAME, "--json")
    assert (shown.returncode, json.loads(shown.stdout)["model"]["num_layers"]) == (0, 2), shown.stderr
    assert "config.json" in hub.sent and hub.weights == []

    hub.breaks["two.safetensors"] = 1
    command = ["-m", "jaxserve", "generate", *LIMITS, "--temperature", "0", "--max-tokens", "4", "--json", PROMPT]
    first = hub.run(tmp_path, *command, "--model", NAME)
    assert sorted(hub.weights) == ["one.safetensors", "two.safetensors", "two.safetensors"], first.stderr
    hub.close()
    again = hub.run(tmp_path, *command, "--model", NAME)
    expected = one(tiny_llm, PROMPT, temperature=0, max_tokens=4).token_ids
    assert [json.loads(run.stdout)[0]["outputs"][0]["token_ids"] for run in (first, again)] == [expected] * 2


REFUSED = {
    "someone/nothing": "the hub has none of this name, or it is private and you are not logged in",
    "someone/gated": "its owner must grant access",
    "some one/tiny": "alphanumeric",
    f"{NAME}@nowhere": "it has no revision 'nowhere'",
}
ASK = """
import sys, time
time.sleep = lambda seconds: None  # before a download is tried again
from jaxserve.hub import description
for asked in sys.argv[1:]:
    name, _, revision = asked.partition("@")
    try:
        description(name, revision or None)
    except FileNotFoundError as error:
        print(error)
"""


def test_what_cannot_be_downloaded(hub: Hub, tmp_path: Path) -> None:
    lines = hub.run(tmp_path, "-c", ASK, *REFUSED).stdout.splitlines()
    assert len(lines) == len(REFUSED)
    for line, (asked, reason) in zip(lines, REFUSED.items(), strict=True):
        name = asked.partition("@")[0]
        assert line.startswith(f"model '{name}': no such directory, nor could it be downloaded: ") and reason in line
    hub.breaks["tokenizer.json"] = 100
    (line,) = hub.run(tmp_path, "-c", ASK, NAME).stdout.splitlines()
    assert "downloaded: peer closed connection" in line
    hub.close()
    (line,) = hub.run(tmp_path / "empty", "-c", ASK, NAME).stdout.splitlines()
    assert "the hub cannot be reached, and it is not in the cache" in line


def test_a_local_model_has_no_revision() -> None:
    with pytest.raises(ValueError, match="revision='v1': model 'demo' is not on the hub but in "):
        ModelFiles.find(EngineArgs(model="demo", revision="v1"))
