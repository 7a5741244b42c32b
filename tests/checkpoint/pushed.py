"""What the loopback Hub keeps of pushes: repositories with commits and branches, and large files by their sha256.

The endpoints are those that the real client calls: `repos/create`, `validate-yaml`, `preupload`, the LFS batch with PUT
and verify, `lfs-files/duplicate`, `branch`, and `commit` as NDJSON.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LARGE = ".safetensors"
TOKEN = "hf_known_to_the_loopback"


@dataclass
class Repository:
    """One repository that was pushed to."""

    private: bool
    commits: dict[str, Path] = field(default_factory=dict)
    """commit -> folder with its files"""
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit_of(self, revision: str) -> str:
        """The commit that a branch or a commit means; empty where there is none."""
        return self.branches.get(revision, revision if revision in self.commits else "")


@dataclass
class Pushes:
    """All of it, and how it is to fail."""

    root: Path
    repositories: dict[str, Repository] = field(default_factory=dict)
    read_only: set[str] = field(default_factory=set)
    """Hub ids that the token may not write"""
    room: int | None = None
    """bytes of large files that may be stored; None: any"""
    failures: list[tuple[str, int]] = field(default_factory=list)
    """the next requests whose path has the text are answered by the status, without being done"""
    messages: dict[str, str] = field(default_factory=dict)
    """path -> the words with which it is forbidden"""
    lost_answers: list[str] = field(default_factory=list)
    """the next requests whose path has the text are done, and answered by 504"""
    on_upload: Callable[[int, int], bool] = lambda _number, _received: True
    """asked while an upload goes on, with its number from 0 and the bytes so far; False breaks the connection"""
    received: list[tuple[str, int]] = field(default_factory=list)
    """sha256 and bytes of each upload that began"""
    requests: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    """names of files that were copied here from another repository"""

    def knows(self, headers: Any) -> bool:
        """Whether a request comes with the token."""
        return headers.get("Authorization") == f"Bearer {TOKEN}"

    def object(self, sha: str) -> Path:
        """Where a large file is kept."""
        return self.root / "objects" / sha

    def stored(self) -> int:
        """Bytes of all large files."""
        folder = self.root / "objects"
        return sum(path.stat().st_size for path in folder.iterdir()) if folder.exists() else 0


def write(handler: Any, hub: Pushes, read: dict[str, Path]) -> bool:
    """Answers a request that writes; False where it is none. `read` are the repositories that can only be read."""
    url = urllib.parse.urlsplit(handler.path)
    path = urllib.parse.unquote(url.path)
    hub.requests.append(f"{handler.command} {path}")
    for pattern, answer in _ENDPOINTS:
        match = re.fullmatch(pattern, path)
        if match is None:
            continue
        length = int(handler.headers.get("Content-Length", 0))
        if answer is not _put and not hub.knows(handler.headers):
            handler.rfile.read(length)
            refuse(handler, 401, "Invalid credentials in Authorization header")
        elif path in hub.messages:
            handler.rfile.read(length)
            refuse(handler, 403, hub.messages[path])
        elif (failure := next((f for f in hub.failures if f[0] in path), None)) is not None:
            hub.failures.remove(failure)
            handler.rfile.read(length)
            refuse(handler, failure[1], "it does not work now")
        else:
            body = b"" if answer is _put else handler.rfile.read(length)
            answer(handler, hub, read, body, dict(urllib.parse.parse_qsl(url.query)), *match.groups())
        return True
    return False


def refuse(handler: Any, status: int, message: str) -> None:
    """Answers with an error as the Hub words them."""
    content = json.dumps({"error": message}).encode()
    handler._send(status, content, "application/json", {"X-Error-Message": message})


def _endpoint(handler: Any) -> str:
    return f"http://{handler.headers['Host']}"


def _done(handler: Any, hub: Pushes, document: Any) -> None:
    lost = next((text for text in hub.lost_answers if text in handler.path), None)
    if lost is not None:
        hub.lost_answers.remove(lost)
        return refuse(handler, 504, "it took too long")
    handler._json(document)


def _create(handler: Any, hub: Pushes, read: Any, body: bytes, query: Any) -> None:
    wanted = json.loads(body)
    name = f"{wanted['organization']}/{wanted['name']}"
    if name in hub.read_only:
        return refuse(handler, 403, "You don't have the rights to create a model under this namespace")
    if name in hub.repositories:
        return refuse(handler, 409, "You already created this model repo")
    hub.repositories[name] = repository = Repository(
        wanted.get("visibility") == "private" or bool(wanted.get("private"))
    )
    _commit_files(hub, repository, name, "main", {".gitattributes": b"*.safetensors filter=lfs"}, "initial commit")
    _done(handler, hub, {"url": f"{_endpoint(handler)}/{name}", "name": name})


def _validate(handler: Any, hub: Pushes, read: Any, body: bytes, query: Any) -> None:
    import yaml

    try:
        yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
    except (yaml.YAMLError, IndexError) as error:
        return handler._send(400, json.dumps({"errors": [{"message": str(error)}]}).encode(), "application/json")
    _done(handler, hub, {"errors": [], "warnings": []})


def _preupload(handler: Any, hub: Pushes, read: Any, body: bytes, query: Any, name: str, revision: str) -> None:
    repository = hub.repositories[name]
    folder = repository.commits[repository.commit_of(revision)]
    answers = []
    for file in json.loads(body)["files"]:
        there = folder / file["path"]
        entry = entry_of(file["path"], there) if there.is_file() else {}
        mode = "lfs" if file["path"].endswith(LARGE) else "regular"
        oid = entry.get("lfs", {}).get("oid") or entry.get("oid")
        answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    _done(handler, hub, {"files": answers})


def _batch(handler: Any, hub: Pushes, read: Any, body: bytes, query: Any, name: str) -> None:
    if name in hub.read_only:
        return refuse(handler, 403, "You don't have the rights to write here")
    objects: list[dict[str, Any]] = []
    endpoint = _endpoint(handler)
    for wanted in json.loads(body)["objects"]:
        actions = {"upload": {"href": f"{endpoint}/lfs/{wanted['oid']}"}, "verify": {"href": f"{endpoint}/verify"}}
        objects.append({**wanted, **({} if hub.object(wanted["oid"]).exists() else {"actions": actions})})
    missing = sum(entry["size"] for entry in objects if "actions" in entry)
    if hub.room is not None and hub.stored() + missing > hub.room:
        return refuse(handler, 403, "Private repository storage limit reached, please upgrade your plan")
    _done(handler, hub, {"transfer": "basic", "objects": objects})


def _put(handler: Any, hub: Pushes, read: Any, body: bytes, query: Any, sha: str) -> None:
    number, left = len(hub.received), int(handler.headers["Content-Length"])
    hub.received.append((sha, 0))
    content = bytearray()
    while left and (chunk := handler.rfile.read(min(left, 1 << 12))):
        content += chunk
        left -= len(chunk)
        hub.received[number] = (sha, len(content))
        if not hub.on_upload(number, len(content)):
            handler.close_connection = True
            handler.connection.close()
            return
    if left:  # the client is gone
        return
    assert hashlib.sha256(content).hexdigest() == sha
    hub.object(sha).parent.mkdir(exist_ok=True)
    hub.object(sha).write_bytes(content)
    _done(handler, hub, {})


def _verify(handler: Any, hub: Pushes, read: Any, body: bytes, query: Any) -> None:
    wanted = json.loads(body)
    assert hub.object(wanted["oid"]).stat().st_size == wanted["size"]
    _done(handler, hub, {})


def _duplicate(handler: Any, hub: Pushes, read: dict[str, Path], body: bytes, query: Any, name: str) -> None:
    for file in json.loads(body)["files"]:
        there = read[name] / file["filename"]
        assert entry_of(file["filename"], there)["xetHash"] == file["xetHash"]
        hub.object(file["sha256"]).parent.mkdir(exist_ok=True)
        shutil.copyfile(there, hub.object(file["sha256"]))
        hub.duplicated.append(file["filename"])
    _done(handler, hub, {"success": [], "failed": []})


def _branch(handler: Any, hub: Pushes, read: Any, body: bytes, query: Any, name: str, branch: str) -> None:
    repository = hub.repositories[name]
    if branch in repository.branches:
        return refuse(handler, 409, "Reference already exists")
    repository.branches[branch] = repository.branches["main"]
    _done(handler, hub, {})


def _commit(handler: Any, hub: Pushes, read: Any, body: bytes, query: dict[str, str], name: str, branch: str) -> None:
    repository = hub.repositories[name]
    if name in hub.read_only and "create_pr" not in query:
        return refuse(handler, 403, "You don't have the rights to write here")
    lines = [json.loads(line) for line in body.splitlines()]
    header = lines[0]["value"]
    if header.get("parentCommit") not in (None, repository.commit_of(branch)):
        return refuse(handler, 412, "A commit has happened since")
    files: dict[str, bytes | None] = {}
    for line in lines[1:]:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = hub.object(value["oid"]).read_bytes()
        elif line["key"] == "deletedFile":
            files[value["path"]] = None
    pull = "refs/pr/1" if "create_pr" in query else None
    if pull:
        repository.branches[pull] = repository.branches[branch]
    commit = _commit_files(hub, repository, name, pull or branch, files, header["summary"])
    place = f"{_endpoint(handler)}/{name}"
    answer = {"commitUrl": f"{place}/commit/{commit}", "commitOid": commit}
    _done(handler, hub, {**answer, "pullRequestUrl": f"{place}/discussions/1" if pull else None})


_MODEL = r"/api/models/([^/]+/[^/]+)"
_ENDPOINTS: list[tuple[str, Callable[..., None]]] = [
    (r"/api/repos/create", _create),
    (r"/api/validate-yaml", _validate),
    (_MODEL + r"/preupload/(.+)", _preupload),
    (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", _batch),
    (r"/lfs/([0-9a-f]+)", _put),
    (r"/verify", _verify),
    (_MODEL + r"/lfs-files/duplicate", _duplicate),
    (_MODEL + r"/branch/(.+)", _branch),
    (_MODEL + r"/commit/(.+)", _commit),
]


def _commit_files(
    hub: Pushes, repository: Repository, name: str, branch: str, files: dict[str, bytes | None], message: str
) -> str:
    commit = hashlib.sha1(f"{name} {branch} {len(repository.commits)}".encode()).hexdigest()
    folder = hub.root / "commits" / commit
    before = repository.commit_of(branch)
    shutil.copytree(repository.commits[before], folder) if before else folder.mkdir(parents=True)
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).unlink() if content is None else (folder / path).write_bytes(content)
    repository.commits[commit] = folder
    repository.branches[branch] = commit
    repository.messages.append(message)
    return commit


def entry_of(name: str, path: Path) -> dict[str, Any]:
    """A file as the tree lists it, with what large files are known by."""
    content = path.read_bytes()
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    entry = {"type": "file", "path": name, "size": len(content), "oid": blob}
    if name.endswith(LARGE):
        sha = hashlib.sha256(content).hexdigest()
        entry |= {"lfs": {"oid": sha, "size": len(content), "pointerSize": 134}, "xetHash": sha[::-1]}
    return entry
