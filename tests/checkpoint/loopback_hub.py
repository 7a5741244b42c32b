"""A Hub on this machine's loopback, for the real client to read from: one commit per repository, files of a folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c0ffee" + "0" * 34


@dataclass
class LoopbackHub:
    """What the server serves and what it was asked for."""

    repositories: dict[str, Path]
    """Hub id -> folder"""
    gated: set[str] = field(default_factory=set)
    """Hub ids whose files are refused"""
    sent: dict[str, int] = field(default_factory=dict)
    """file name -> bytes sent of it"""
    endpoint: str = ""

    def environment(self, home: Path) -> dict[str, str]:
        """Environment of a process that takes this for the Hub."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "",
            "NO_PROXY": "*",
        }


@contextlib.contextmanager
def serve(hub: LoopbackHub) -> Iterator[LoopbackHub]:
    """Serves until the block ends."""

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: LoopbackHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(dict(urllib.parse.parse_qsl(body.decode())) if b"=" in body else json.loads(body or b"{}"))

    def _answer(self, form: dict[str, Any] | None = None) -> None:
        parts = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        name, rest = "/".join(parts[:2]), parts[2:]
        folder = self.state.repositories.get(name)
        if folder is None:
            return self._refuse(404, "RepoNotFound")
        if rest[1:2] and rest[1] not in ("main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        files = sorted(p for p in folder.iterdir() if p.is_file())
        if api and rest[:1] in ([], ["revision"]):
            return self._json({"id": name, "sha": COMMIT, "siblings": [{"rfilename": p.name} for p in files]})
        if api and rest[:1] == ["tree"]:
            return self._json([_entry(p) for p in files] if len(rest) == 2 else [])
        if api and rest[:1] == ["paths-info"]:
            wanted = (form or {}).get("paths", [])
            return self._json([_entry(p) for p in files if p.name in ([wanted] if isinstance(wanted, str) else wanted)])
        if rest[:1] == ["resolve"] and len(rest) == 3:
            if name in self.state.gated:
                return self._refuse(403, "GatedRepo")
            return self._file(folder / rest[2])
        return self._refuse(404, "EntryNotFound")

    def _file(self, path: Path) -> None:
        if not path.is_file():
            return self._refuse(404, "EntryNotFound")
        content, size, status = path.read_bytes(), path.stat().st_size, 200
        extra = {"ETag": f'"{_digest(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if (span := self.headers.get("Range")) is not None:
            first, _, last = span.removeprefix("bytes=").partition("-")
            end = min(size, int(last) + 1 if last else size)
            content, status = content[int(first) : end], 206
            extra["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
        if self.command == "GET":
            self.state.sent[path.name] = self.state.sent.get(path.name, 0) + len(content)
        self._send(status, content, "application/octet-stream", extra)

    def _json(self, document: Any) -> None:
        self._send(200, json.dumps(document).encode(), "application/json")

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", "application/json", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, content: bytes, kind: str, extra: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(extra or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def _entry(path: Path) -> dict[str, Any]:
    return {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": _digest(path)}
