"""A Hub on this machine's loopback, for the real client: repositories are folders, or what was pushed (pushed.py)."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import socket
import struct
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.checkpoint.pushed import Pushes, entry_of, refuse, write

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
    ranges: dict[str, list[str | None]] = field(default_factory=dict)
    """file name -> the ranges that were asked for; None for a whole file"""
    breaks: dict[str, list[int]] = field(default_factory=dict)
    """file name -> after how many bytes its next answers break off; the connection is reset where negative"""
    refused_whole: set[str] = field(default_factory=set)
    """names of files of which only ranges are to be had: the whole is answered with an error of the server"""
    pushes: Pushes | None = None
    """what was pushed, where the Hub can be written to"""
    endpoint: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

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
        if self.state.pushes is not None and write(self, self.state.pushes, self.state.repositories):
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind = self.headers.get("Content-Type", "")
        form = urllib.parse.parse_qs(body.decode()) if "form" in kind else json.loads(body or b"{}")
        self._answer(form)

    def do_PUT(self) -> None:
        if self.state.pushes is None or not write(self, self.state.pushes, self.state.repositories):
            self._refuse(404, "EntryNotFound")

    def _answer(self, form: dict[str, Any] | None = None) -> None:
        parts = [urllib.parse.unquote(part) for part in urllib.parse.urlsplit(self.path).path.strip("/").split("/")]
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        name, rest = "/".join(parts[:2]), parts[2:]
        if parts == ["api", "whoami-v2"] and self.state.pushes is not None:
            known = self.state.pushes.knows(self.headers)
            return self._json({"name": "me"}) if known else refuse(self, 401, "Invalid credentials")
        pushes, folder, commit = self.state.pushes, self.state.repositories.get(name), COMMIT
        pushed = None if pushes is None else pushes.repositories.get(name)
        if pushed is not None and pushes is not None and not (pushed.private and not pushes.knows(self.headers)):
            commit = pushed.commit_of(rest[1] if rest[1:2] else "main")
            folder = pushed.commits.get(commit, Path(self.server.server_name, "none"))
        if folder is None:
            return self._refuse(404, "RepoNotFound")
        if (pushed is None and rest[1:2] and rest[1] not in ("main", COMMIT)) or commit == "":
            return self._refuse(404, "RevisionNotFound")
        entry = entry_of if pushes is not None else _entry
        listed = sorted(folder.rglob("*")) if api else []  # not for each of a hundred shards
        files = {p.relative_to(folder).as_posix(): p for p in listed if p.is_file()}
        if api and rest[:1] in ([], ["revision"]):
            private = pushed is not None and pushed.private
            siblings = [{"rfilename": path} for path in files]
            return self._json({"id": name, "sha": commit, "private": private, "siblings": siblings})
        if api and rest[:1] == ["tree"]:
            recursive, parent = "recursive=true" in self.path.lower(), "".join(f"{part}/" for part in rest[2:])
            under = {path: p for path, p in files.items() if path.startswith(parent)}
            return self._json([entry(n, p) for n, p in under.items() if recursive or "/" not in n[len(parent) :]])
        if api and rest[:1] == ["paths-info"]:
            wanted = (form or {}).get("paths", [])
            wanted = [wanted] if isinstance(wanted, str) else wanted
            return self._json([entry(path, p) for path, p in files.items() if path in wanted])
        if rest[:1] == ["resolve"] and len(rest) >= 3:
            if name in self.state.gated:
                return self._refuse(403, "GatedRepo")
            return self._file(folder.joinpath(*rest[2:]), commit)
        return self._refuse(404, "EntryNotFound")

    def _file(self, path: Path, commit: str) -> None:
        if not path.is_file():
            return self._refuse(404, "EntryNotFound")
        if path.name in self.state.refused_whole and self.command == "GET" and self.headers.get("Range") is None:
            return self._refuse(503, "Unavailable")
        size, status, first, end = path.stat().st_size, 200, 0, path.stat().st_size
        extra = {"ETag": f'"{_digest(path)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if (span := self.headers.get("Range")) is not None:
            begin, _, last = span.removeprefix("bytes=").partition("-")
            first, end, status = int(begin), min(size, int(last) + 1 if last else size), 206
            extra["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
        self._head(status, end - first, "application/octet-stream", extra)
        if self.command == "GET":
            self.state.ranges.setdefault(path.name, []).append(span)
            self._stream(path, first, end)

    def _stream(self, path: Path, first: int, end: int) -> None:
        breaks = self.state.breaks.get(path.name)
        most = breaks.pop(0) if breaks else end - first
        left = min(abs(most), end - first)
        with path.open("rb") as file:
            file.seek(first)
            while left and (chunk := file.read(min(left, 1 << 16))):
                self.wfile.write(chunk)
                left -= len(chunk)
                with self.state.lock:
                    self.state.sent[path.name] = self.state.sent.get(path.name, 0) + len(chunk)
        if abs(most) < end - first:
            self.wfile.flush()
            if most < 0:  # closed without a goodbye, as by a router on the way
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR) if most >= 0 else self.connection.close()

    def _json(self, document: Any) -> None:
        self._send(200, json.dumps(document).encode(), "application/json")

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", "application/json", {"X-Error-Code": code, "X-Error-Message": code})

    def _head(self, status: int, length: int, kind: str, extra: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(length), **(extra or {})}.items():
            self.send_header(key, value)
        self.end_headers()

    def _send(self, status: int, content: bytes, kind: str, extra: dict[str, str] | None = None) -> None:
        self._head(status, len(content), kind, extra)
        if self.command != "HEAD":
            self.wfile.write(content)


def _digest(path: Path) -> str:
    """Something that is another for other contents; whole shards of large files are not read for it."""
    stat = path.stat()
    return _digest_of(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _digest_of(path: Path, size: int, _modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.sha1(file.read(1 << 20) + str(size).encode()).hexdigest()


def _entry(name: str, path: Path) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": _digest(path)}
