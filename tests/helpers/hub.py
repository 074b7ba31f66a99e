"""A stand-in for the Hugging Face Hub on localhost: what creating, uploading and downloading a model needs of it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """repositories: name -> file -> content. large: files that came as LFS objects. calls: method and path of each."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.large: set[str] = set()
        self.calls: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    """A hub that answers while the block runs."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def _answer(self, code: int, value: Any = None, content: bytes | None = None, **headers: str) -> None:
        body = content if content is not None else json.dumps(value).encode() if value is not None else b""
        self.send_response(code)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _anything(self) -> None:
        path, body = self.path.partition("?")[0], self._body()
        self.server.calls.append((self.command, path))
        for method, pattern, function in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                function(self, body, *match.groups())
                return
        self._answer(404, {"error": "Not found"}, X_Error_Code="RepoNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _anything

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        known = name in self.server.repositories
        self.server.repositories.setdefault(name, {})
        self._answer(409 if known else 200, {"url": f"{self.server.url}/{name}", "name": name})

    def _valid(self, body: bytes) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def _preupload(self, body: bytes, name: str) -> None:
        def mode(file: dict[str, Any]) -> str:  # as on the hub: text is kept in git, binary files go to LFS
            return "lfs" if b"\0" in base64.b64decode(file["sample"]) else "regular"

        files = [{"path": f["path"], "uploadMode": mode(f), "shouldIgnore": False} for f in json.loads(body)["files"]]
        self._answer(200, {"files": files})

    def _batch(self, body: bytes, name: str) -> None:
        def instruction(item: dict[str, Any]) -> dict[str, Any]:
            return {**item, "actions": {"upload": {"href": f"{self.server.url}/objects/{item['oid']}", "header": {}}}}

        self._answer(200, {"transfer": "basic", "objects": [instruction(o) for o in json.loads(body)["objects"]]})

    def _object(self, body: bytes, oid: str) -> None:
        self.server.objects[oid] = body
        self._answer(200 if hashlib.sha256(body).hexdigest() == oid else 400)

    def _commit(self, body: bytes, name: str, revision: str) -> None:
        files = self.server.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
                self.server.large.add(value["path"])
        self._answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def _info(self, body: bytes, name: str, *_: str) -> None:
        if name not in self.server.repositories:
            self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return
        siblings = [{"rfilename": file} for file in sorted(self.server.repositories[name])]
        self._answer(200, {"id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})

    def _resolve(self, body: bytes, name: str, revision: str, file: str) -> None:
        content = self.server.repositories.get(name, {}).get(file)
        if content is None:
            kind = "EntryNotFound" if name in self.server.repositories else "RepoNotFound"
            self._answer(404, {"error": "Not found"}, X_Error_Code=kind)
            return
        self._answer(200, content=content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=COMMIT)


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/api/repos/create", _Handler._create),
    ("POST", "/api/validate-yaml", _Handler._valid),
    ("POST", f"/api/models/{_NAME}/preupload/main", _Handler._preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler._batch),
    ("PUT", "/objects/([0-9a-f]{64})", _Handler._object),
    ("POST", f"/api/models/{_NAME}/commit/(main)", _Handler._commit),
    ("GET", f"/api/models/{_NAME}(?:/revision/main)?", _Handler._info),
    ("GET HEAD", f"/{_NAME}/resolve/([^/]+)/(.+)", _Handler._resolve),
]
