"""A Hugging Face hub on the loopback interface: the few endpoints that downloads use.

Repositories are folders in memory; a test may gate one, hide one, or cut connections.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

_LARGE = (".safetensors", ".bin", ".gguf")


@dataclass
class Repo:
    """One model.

    Attributes:
      revisions: name of a branch or tag -> files by path.
      gated: only `token` may download; anyone may look.
      private: only `token` may look.
      token: what opens it.
      cut_after: bytes after which a download of a large file breaks off, once per entry.
      broken: every download of a large file breaks off.
      down: everything is answered with status 503.
    """

    revisions: dict[str, dict[str, bytes]]
    gated: bool = False
    private: bool = False
    token: str = "right"
    cut_after: list[int] = field(default_factory=list)
    broken: bool = False
    down: bool = False

    def commit(self, revision: str) -> str | None:
        """The commit of a branch, tag or commit."""
        for name, files in self.revisions.items():
            digest = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
            if revision in (name, digest):
                return digest
        return None

    def files(self, commit: str) -> dict[str, bytes]:
        return next(f for name, f in self.revisions.items() if self.commit(name) == commit)


class FakeHub:
    """Serves `repos`; `requests` holds (method, path, Range header) of all it was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        hub = self

        class Handler(_Handler):
            fake = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def downloaded(self) -> list[str]:
        """Names of the files whose content was asked for, in order."""
        return [
            path.split("/resolve/")[1].split("/", 1)[1]
            for method, path, _ in self.requests
            if method == "GET" and "/resolve/" in path
        ]

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as listings show it."""
    oid = hashlib.sha1(content).hexdigest()
    entry: dict[str, Any] = {"size": len(content), "oid": oid, "blobId": oid}
    if path.endswith(_LARGE):
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"sha256": sha256, "oid": sha256, "size": len(content), "pointerSize": 134}
    return entry


class _Handler(BaseHTTPRequestHandler):
    fake: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.fake.requests.append((self.command, path, self.headers.get("Range")))
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        repo = self.fake.repos.get(match[1]) if match else None
        authorized = repo and self.headers.get("Authorization") == f"Bearer {repo.token}"
        if match is None or repo is None or (repo.private and not authorized):
            return self._error(401, "RepoNotFound")
        if repo.down:
            return self._error(503, "")
        revision = (match[3] if api else match[2]) or "main"
        commit = repo.commit(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound")
        files = repo.files(commit)
        if api:
            listing = [{"path": p, "rfilename": p, **_entry(p, c)} for p, c in files.items()]
            if api[2] == "tree":
                return self._json([{"type": "file", **entry} for entry in listing])
            return self._json({"id": api[1], "sha": commit, "siblings": listing})
        if repo.gated and not authorized:
            return self._error(403, "GatedRepo")
        if match[3] not in files:
            return self._error(404, "EntryNotFound", commit)
        self._file(repo, commit, match[3], files[match[3]], with_body)

    def _file(self, repo: Repo, commit: str, name: str, content: bytes, with_body: bool) -> None:
        entry = _entry(name, content)
        start = 0
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(asked[1])
        self.send_response(206 if asked else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{entry["lfs"]["sha256"] if "lfs" in entry else entry["oid"]}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not with_body:
            return
        body = content[start:]
        if "lfs" in entry and (repo.broken or repo.cut_after):
            body = body[: repo.cut_after.pop(0) if repo.cut_after else 0]
            self.close_connection = True
        self.wfile.write(body)
        self.wfile.flush()

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _error(self, status: int, code: str, commit: str | None = None) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()
