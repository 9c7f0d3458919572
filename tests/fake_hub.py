"""A hub on this machine: as much of the protocol of huggingface.co as a push and a download need, over real HTTP."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

TOKEN = "hf_aTokenThatIsNeverShown"
LARGE = ".safetensors"
"""Files with this suffix are uploaded and named as large ones."""


@dataclass
class FakeRepository:
    """A repository: its commits, and the branches that name them."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add files on top of a branch, and return the commit."""
        whole = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        name = hashlib.sha1(repr(sorted(whole.items())).encode() + str(len(self.commits)).encode()).hexdigest()
        self.commits[name], self.branches[branch] = whole, name
        return name

    def find(self, revision: str) -> str | None:
        """The commit that a branch or a commit names."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass
class FakeHub:
    """The repositories of the server, and what it does wrong."""

    url: str = ""
    repositories: dict[str, FakeRepository] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    listed: list[str] = field(default_factory=list)
    """Paths that listings hold besides the files."""
    damage: Callable[[str, bytes], bytes] = lambda path, content: content
    """What is sent instead of the content of a file; the headers are those of the content."""

    def repository(self, name: str, private: bool = False) -> FakeRepository:
        """The repository of that name, made with a first commit if it is new."""
        if name not in self.repositories:
            self.repositories[name] = FakeRepository(private)
            self.repositories[name].commit({".gitattributes": b""})
        return self.repositories[name]


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serve a hub while the block runs."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_HubHandler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client use `hub` with its token and an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits before it tries again
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the other way to upload large files, which Git LFS has too
    monkeypatch.setenv("HF_TOKEN", TOKEN)


class _HubHandler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def _handle(self) -> None:
        path, length = unquote(self.path.partition("?")[0]), int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self._chunks()
        self.hub.requests.append(f"{self.command} {path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.command == "PUT":
            self.hub.uploads[path.rpartition("/")[2]] = body
            return self._send(200)
        if token not in ("", TOKEN):
            return self._send(401, {"error": "Invalid username or password."})
        if self.command == "POST" and not token and path != "/api/validate-yaml":
            return self._send(401, {"error": "Invalid username or password."})
        for pattern, answer in ROUTES:
            if match := re.fullmatch(pattern, path):
                name = match.groupdict().get("name")
                repository = self.hub.repositories.get(name or "")
                if name is not None and (repository is None or (repository.private and not token)):
                    code = 404 if token else 401
                    return self._send(code, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
                return answer(self, repository, match, body)
        self._send(404, {"error": f"no such address: {path}"})

    def _chunks(self) -> bytes:
        """The body of a request that is sent in chunks."""
        body = b""
        while "chunked" in (self.headers.get("Transfer-Encoding") or "") and (size := int(self.rfile.readline(), 16)) >= 0:
            body += self.rfile.read(size)
            self.rfile.readline()
            if not size:
                break
        return body

    def _send(self, code: int, content: object = None, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _create(self, repository: FakeRepository | None, match: re.Match[str], body: bytes) -> None:
        request = json.loads(body)
        name = f"{request['organization']}/{request['name']}"
        if name in self.hub.repositories:
            return self._send(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        self.hub.repository(name, private=request.get("visibility") == "private" or bool(request.get("private")))
        self._send(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def _branch(self, repository: FakeRepository | None, match: re.Match[str], body: bytes) -> None:
        assert repository is not None
        if match["revision"] in repository.branches:
            return self._send(409, {"error": "Reference already exists"})
        repository.branches[match["revision"]] = repository.branches["main"]
        self._send(200)

    def _info(self, repository: FakeRepository | None, match: re.Match[str], body: bytes) -> None:
        if (commit := self._commit(repository, match.groupdict().get("revision") or "main")) is not None:
            self._send(200, {"id": match["name"], "sha": commit, "siblings": [], "private": False, "tags": []})

    def _tree(self, repository: FakeRepository | None, match: re.Match[str], body: bytes) -> None:
        if repository is None or (commit := self._commit(repository, match["revision"])) is None:
            return
        entries = [self._entry(path, content) for path, content in repository.commits[commit].items()]
        self._send(200, [*entries, *(self._entry(path, b"x") for path in self.hub.listed)])

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def _preupload(self, repository: FakeRepository | None, match: re.Match[str], body: bytes) -> None:
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = [{"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular"} for path in paths]
        self._send(200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]})

    def _batch(self, repository: FakeRepository | None, match: re.Match[str], body: bytes) -> None:
        objects = json.loads(body)["objects"]
        action = {
            each["oid"]: {"upload": {"href": f"{self.hub.url}/upload/{each['oid']}", "header": {}}}
            for each in objects
            if each["oid"] not in self.hub.uploads
        }
        answers = [{**each, **({"actions": action[each["oid"]]} if each["oid"] in action else {})} for each in objects]
        self._send(200, {"transfer": "basic", "objects": answers}, {"Content-Type": "application/vnd.git-lfs+json"})

    def _add_commit(self, repository: FakeRepository | None, match: re.Match[str], body: bytes) -> None:
        assert repository is not None
        lines = [json.loads(line) for line in body.splitlines()]
        parent = lines[0]["value"].get("parentCommit")
        if parent not in (None, repository.branches[match["revision"]]):
            return self._send(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            if line["key"] == "file"
            else self.hub.uploads[line["value"]["oid"]]
            for line in lines[1:]
        }
        commit = repository.commit(files, match["revision"])
        self._send(200, {"commitUrl": f"{self.hub.url}/{match['name']}/commit/{commit}", "commitOid": commit})

    def _resolve(self, repository: FakeRepository | None, match: re.Match[str], body: bytes) -> None:
        if repository is None or (commit := self._commit(repository, match["revision"])) is None:
            return
        content = repository.commits[commit].get(match["path"])
        if content is None:
            return self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        large = match["path"].endswith(LARGE)
        etag = hashlib.sha256(content).hexdigest() if large else git_sha1(content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(content))} if large else {}
        sent = self.hub.damage(match["path"], content)
        if len(sent) < len(content):  # the connection is cut off
            self.close_connection = True
        self._send(200, sent, {**headers, "Content-Length": str(len(content))})

    def _commit(self, repository: FakeRepository | None, revision: str) -> str | None:
        """The commit of a revision; answers the request if there is none."""
        commit = repository and repository.find(revision)
        if commit is None:
            self._send(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
        return commit

    def _accept(self, repository: FakeRepository | None, match: re.Match[str], body: bytes) -> None:
        self._send(200, {"errors": [], "warnings": []})


def git_sha1(content: bytes) -> str:
    """The checksum by which git names a small file."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


REPOSITORY, REVISION = r"(?P<name>[\w.-]+/[\w.-]+)", r"(?P<revision>[\w.-]+)"
KIND = "(?:models|datasets)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"/api/validate-yaml", _HubHandler._accept),
    (r"/api/repos/create", _HubHandler._create),
    (rf"/api/models/{REPOSITORY}/branch/{REVISION}", _HubHandler._branch),
    (rf"/api/{KIND}/{REPOSITORY}(?:/revision/{REVISION})?", _HubHandler._info),
    (rf"/api/{KIND}/{REPOSITORY}/tree/{REVISION}/?", _HubHandler._tree),
    (rf"/api/models/{REPOSITORY}/preupload/{REVISION}", _HubHandler._preupload),
    (rf"/{REPOSITORY}\.git/info/lfs/objects/batch", _HubHandler._batch),
    (rf"/api/models/{REPOSITORY}/commit/{REVISION}", _HubHandler._add_commit),
    (rf"/(?:datasets/)?{REPOSITORY}/resolve/{REVISION}/(?P<path>.+)", _HubHandler._resolve),
]
