"""Sharing over the wire: a real S3-compatible server on this machine, and a stand-in of the Hub's endpoints."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from rollout_data import dataset

from pipeline.errors import OaplError, RequestError, WorkError
from pipeline.rollouts.store import read_manifest
from pipeline.rollouts.validate import validate
from pipeline.sharing.bring import bring
from pipeline.sharing.package import export_dataset, import_dataset, push_dataset


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export_dataset(dataset(folder / "source", count=12), folder / "out")
    return folder / "out"


@pytest.mark.usefixtures("credentials")
def test_push_to_s3_and_import_from_it(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert push_dataset(exported, "s3://bucket/sets/one") == sum(map(len, tree(exported).values()))
    assert import_dataset("s3://bucket/sets/one", tmp_path / "back") == 48
    assert tree(tmp_path / "back") == tree(exported)
    monkeypatch.setenv("OAPL_CACHE", str(tmp_path / "cache"))
    assert list(validate(bring("s3://bucket/sets/one"))) == []


@pytest.mark.usefixtures("credentials")
def test_what_is_damaged_on_s3_is_not_imported(exported: Path, tmp_path: Path) -> None:
    import s3fs

    push_dataset(exported, "s3://bucket/sets/two")
    filesystem = s3fs.S3FileSystem()
    data = bytearray(filesystem.cat("bucket/sets/two/rollouts/part-00001.parquet"))
    data[len(data) // 2] ^= 8
    filesystem.pipe("bucket/sets/two/rollouts/part-00001.parquet", bytes(data))
    with pytest.raises(WorkError, match=r"part-00001\.parquet: its checksum is not the one in SHA256SUMS"):
        import_dataset("s3://bucket/sets/two", tmp_path / "back")
    filesystem.rm("bucket/sets/two/SHA256SUMS")
    filesystem.invalidate_cache()
    with pytest.raises(RequestError, match="SHA256SUMS: not found; give an exported dataset"):
        import_dataset("s3://bucket/sets/two", tmp_path / "back")
    with pytest.raises(OaplError, match="s3://nobody") as caught:
        push_dataset(exported, "s3://nobody/sets")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "back").exists()


class Hub:
    """The Hub's endpoints that a push and an import use, over a dictionary: repositories, LFS, commits, files."""

    def __init__(self) -> None:
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.blobs: dict[str, bytes] = {}
        self.private: dict[str, Any] = {}
        handler = type("Handler", (_HubHandler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def files(self, repo: str, revision: str) -> dict[str, bytes]:
        commits = self.repos[repo]
        return commits[-1] if revision == "main" else commits[int(revision, 16)]

    def sha(self, repo: str) -> str:
        return f"{len(self.repos[repo]) - 1:040x}"

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        files = dict(self.repos[repo][-1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.repos[repo].append(files)


class _HubHandler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _reply(self, status: int, body: bytes | dict[str, Any] | list[Any] = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _missing(self, what: str, code: str) -> None:
        self._reply(404, {"error": what}, X_Error_Code=code, X_Error_Message=what)

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        if path == "/api/repos/create":
            given = json.loads(body)
            repo = f"{given['organization']}/{given['name']}" if given.get("organization") else given["name"]
            if repo in self.hub.repos:
                return self._reply(409, {"error": "exists", "url": f"{self.hub.url}/datasets/{repo}"})
            self.hub.repos[repo], self.hub.private[repo] = [{}], given.get("visibility", given.get("private"))
            return self._reply(200, {"url": f"{self.hub.url}/datasets/{repo}", "name": repo})
        if path == "/api/validate-yaml":
            return self._reply(200, {"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/datasets/(.+?)/preupload/main", path):
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".parquet") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return self._reply(200, {"files": files})
        if re.fullmatch(r"/datasets/(.+?)\.git/info/lfs/objects/batch", path):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.url}/upload/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self._reply(200, {"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/datasets/(.+?)/commit/main", path):
            self.hub.commit(match[1], [json.loads(line) for line in body.splitlines() if line])
            sha = self.hub.sha(match[1])
            url = f"{self.hub.url}/datasets/{match[1]}/commit/{sha}"
            return self._reply(200, {"success": True, "commitOid": sha, "commitUrl": url})
        return self._missing(f"no endpoint POST {path}", "NoEndpoint")

    def do_PUT(self) -> None:
        data = self._body()
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.blobs[oid] = data
        self._reply(200)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/(\w+)(?:/.*)?", path):
            files = self.hub.files(match[1], match[2])
            return self._reply(
                200,
                [
                    {"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for p, d in files.items()
                ],
            )
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/(\w+))?", path):
            if match[1] not in self.hub.repos:
                return self._missing("Repository not found", "RepoNotFound")
            files = self.hub.files(match[1], match[2] or "main")
            siblings = [{"rfilename": name} for name in files]
            sha = self.hub.sha(match[1]) if match[2] in (None, "main") else match[2]
            return self._reply(200, {"id": match[1], "sha": sha, "siblings": siblings})
        if match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
            data = self.hub.files(match[1], match[2]).get(match[3])
            if data is None:
                return self._missing("Entry not found", "EntryNotFound")
            sha = self.hub.sha(match[1]) if match[2] == "main" else match[2]
            return self._reply(200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=sha)
        return self._missing(f"no endpoint GET {path}", "NoEndpoint")


HUB_SCRIPT = """
import sys
from pathlib import Path
from pipeline.errors import OaplError
from pipeline.sharing.package import import_dataset, push_dataset
verb, one, other = sys.argv[1:]
try:
    print(push_dataset(Path(one), other) if verb == "push" else import_dataset(one, Path(other)))
except OaplError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    stand_in = Hub()
    yield stand_in
    stand_in.server.shutdown()
    stand_in.server.server_close()


def against(hub: Hub, tmp_path: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs in a process of its own: huggingface_hub reads its endpoint once, when it is imported."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": "hf_stand_in",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", HUB_SCRIPT, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_push_to_the_hub_and_import_from_it(hub: Hub, exported: Path, tmp_path: Path) -> None:
    address = "hf://datasets/somebody/rollouts"
    pushed = against(hub, tmp_path, "push", exported, address)
    assert pushed.returncode == 0, pushed.stdout + pushed.stderr
    assert hub.private["somebody/rollouts"] in ("private", True)
    # One commit with everything: nobody sees half of a dataset.
    assert len(hub.repos["somebody/rollouts"]) == 2
    assert hub.files("somebody/rollouts", "main") == tree(exported)
    back = against(hub, tmp_path, "import", address, tmp_path / "back")
    assert (back.returncode, back.stdout) == (0, "48\n"), back.stdout + back.stderr
    assert tree(tmp_path / "back") == tree(exported)


def test_a_second_push_replaces_the_first_and_a_bad_file_is_refused(hub: Hub, exported: Path, tmp_path: Path) -> None:
    address = "hf://datasets/somebody/rollouts"
    export_dataset(dataset(tmp_path / "source", count=3), tmp_path / "small")
    assert against(hub, tmp_path, "push", exported, address).returncode == 0
    assert against(hub, tmp_path, "push", tmp_path / "small", address).returncode == 0
    assert hub.files("somebody/rollouts", "main") == tree(tmp_path / "small")
    assert against(hub, tmp_path, "import", f"{address}@{1:040x}", tmp_path / "older").returncode == 0
    assert read_manifest(tmp_path / "older" / "rollouts") == read_manifest(exported / "rollouts")
    files = hub.repos["somebody/rollouts"][-1]
    files["prompts/prompts.parquet"] = files["prompts/prompts.parquet"][:-1] + b"!"
    refused = against(hub, tmp_path, "import", address, tmp_path / "back")
    assert refused.returncode == 1
    assert "prompts/prompts.parquet: its checksum is not the one in SHA256SUMS" in refused.stdout
    assert not (tmp_path / "back").exists()


def test_addresses_that_lead_nowhere(hub: Hub, tmp_path: Path) -> None:
    for address, message in (
        ("hf://datasets/somebody/nothing", "no such repository, or no right to see it; run `hf auth login`"),
        ("hf://models/somebody/thing", "it reads hf://datasets/OWNER/NAME[@REVISION]"),
    ):
        result = against(hub, tmp_path, "import", address, tmp_path / "back")
        assert result.returncode == 2, result.stdout + result.stderr
        (line,) = result.stdout.splitlines()
        assert message in line
