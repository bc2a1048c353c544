"""A small Hugging Face Hub on this machine: as much of its protocol as an upload and a download need, and its faults.

What the real `huggingface_hub` asks for was read in its source (2.4.0: `hf_api.py`, `_commit_api.py`, `lfs.py`).
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import huggingface_hub.constants
import pytest
from huggingface_hub.utils import _http as hub_http

WRITE_TOKEN, READ_TOKEN, FINE_TOKEN = "hf_writes", "hf_reads", "hf_fine"
DROP = 0
"""In place of a status: the connection is closed without an answer."""
COMMIT = "c" * 40


@dataclass
class Hub:
    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    """The repositories, and whether each is private."""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """repository -> name -> content, as committed; `repository@revision` for one that is not main."""
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files that were uploaded, by their SHA-256."""
    faults: list[tuple[str, int]] = field(default_factory=list)
    """(regular expression of "METHOD path", status or DROP): the first that fits a request answers it, once."""
    retry_after: str | None = None
    hold: str | None = None
    """Regular expression of "METHOD path": a request that it fits sets `held`, and is answered when `go_on` is set."""
    held: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    requests: list[str] = field(default_factory=list)
    """"METHOD path" of each."""
    fine_scopes: list[dict[str, Any]] = field(default_factory=list)

    def whoami(self, token: str) -> dict[str, Any] | None:
        roles = {WRITE_TOKEN: "write", READ_TOKEN: "read", FINE_TOKEN: "fineGrained"}
        if token not in roles:
            return None
        access = {"role": roles[token], "fineGrained": {"scoped": self.fine_scopes}}
        orgs = [{"name": "club", "roleInOrg": "read"}, {"name": "studio", "roleInOrg": "write"}]
        return {"type": "user", "name": "me", "orgs": orgs, "auth": {"accessToken": access}}


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def asked_by_the_library(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """The library asks it as if HF_ENDPOINT were its address, by the protocol for large files that can be played here.

    Nothing waits: neither our own pauses nor those of the library, whose cache is below `folder`.
    """
    with running() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "cache"))
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hub_http.time, "sleep", lambda seconds: None)
        yield hub


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        asked = f"{self.command} {path}"
        self.hub.requests.append(asked)
        if self.hub.hold and re.search(self.hub.hold, asked):
            self.hub.held.set()
            self.hub.go_on.wait(60)
        for fault in self.hub.faults:
            if re.search(fault[0], asked):
                self.hub.faults.remove(fault)
                self._answer_fault(fault[1])
                return
        self._answer(*self._route(asked, body))

    def _answer_fault(self, status: int) -> None:
        self.close_connection = True
        if status != DROP:
            self._answer(status, {"error": "as the test asked for"})

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status == 429 and self.hub.retry_after:
            self.send_header("Retry-After", self.hub.retry_after)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _route(self, asked: str, body: bytes) -> tuple[Any, ...]:
        hub, token = self.hub, self.headers.get("Authorization", "").removeprefix("Bearer ")
        account = hub.whoami(token)
        if put := re.fullmatch(r"PUT /store/(\w+)", asked):
            assert hashlib.sha256(body).hexdigest() == put[1]
            hub.stored[put[1]] = body
            return 200, {}
        if asked == "GET /api/whoami-v2":
            return (200, account) if account else (401, {"error": "Invalid credentials"})
        if asked == "POST /api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return 200, {"warnings": [], "errors": []}
        if asked == "POST /api/repos/create":
            return self._create(json.loads(body), token)
        if found := re.fullmatch(r"(\w+) (?:/api/models)?/([\w.-]+/[\w.-]+?)(?:\.git)?(?:/(.*))?", asked):
            method, repo, rest = found.groups()
            if repo not in hub.private or (hub.private[repo] and account is None):
                return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
            return self._in_repository(method, repo, rest or "", body, token)
        raise AssertionError(f"the fake Hub does not know {asked}")

    def _create(self, wanted: dict[str, Any], token: str) -> tuple[Any, ...]:
        repo = f"{wanted['organization']}/{wanted['name']}"
        if token == READ_TOKEN:
            return 403, {"error": "no"}
        if repo in self.hub.private:
            return 409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"}
        self.hub.private[repo] = wanted.get("visibility") == "private"
        self.hub.files[repo] = {}
        return 200, {"url": f"{self.hub.url}/{repo}", "name": repo}

    def _in_repository(self, method: str, repo: str, rest: str, body: bytes, token: str) -> tuple[Any, ...]:
        hub, files = self.hub, self.hub.files.setdefault(repo, {})
        writes = token in (WRITE_TOKEN, FINE_TOKEN) and repo.startswith(("me/", "studio/"))
        if rest in ("", "revision/main"):
            return 200, {
                "id": repo,
                "private": hub.private[repo],
                "sha": COMMIT,
                "siblings": [{"rfilename": name} for name in files],
            }
        if rest == "auth-check/write":
            return (200, {}) if writes else (403, {"error": "no write access"})
        if rest == "preupload/main":
            asked = json.loads(body)["files"]
            modes = {f["path"]: "regular" if f["path"].endswith(".md") else "lfs" for f in asked}
            return 200, {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]}
        if rest == "info/lfs/objects/batch":
            return 200, {"transfer": "basic", "objects": [self._place(o) for o in json.loads(body)["objects"]]}
        if rest == "commit/main" and method == "POST":
            if not writes:
                return 403, {"error": "no write access"}
            for line in body.splitlines():
                operation = json.loads(line)
                value = operation["value"]
                if operation["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "lfsFile":
                    files[value["path"]] = hub.stored[value["oid"]]
            return 200, {"commitUrl": f"{hub.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT, "hookOutput": ""}
        if rest.startswith(("tree/", "resolve/")) and (revision := unquote(rest.split("/")[1])) not in ("main", COMMIT):
            files = hub.files.get(f"{repo}@{revision}")
            if files is None:
                return 404, {"error": f"no revision {revision}"}, {"X-Error-Code": "RevisionNotFound"}
        if rest.startswith("tree/"):
            return 200, [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()]
        if rest.startswith("resolve/"):
            data = files.get(unquote(rest.split("/", 2)[2]))
            if data is None:
                return 404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"}
            return 200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        raise AssertionError(f"the fake Hub does not know {method} {repo} {rest}")

    def _place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        place = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in self.hub.stored:
            place["actions"] = {"upload": {"href": f"{self.hub.url}/store/{wanted['oid']}"}}
        return place
