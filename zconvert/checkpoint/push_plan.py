"""What a push would do: an exported folder compared with a repository, file by file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from zconvert.checkpoint.folder import sha256
from zconvert.checkpoint.headers import INDEX_FILE
from zconvert.checkpoint.json_patch import parse_json_object, read_json
from zconvert.checkpoint.provenance import PROVENANCE_FILE, TOOL
from zconvert.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Action = Literal["upload", "copy", "keep", "delete"]
"""what happens to a file of the repository; copy is from the base model's repository, on the server"""

_NOT_OURS = (".gitattributes",)
"""what the Hub puts into a new repository"""
_OUR_FOLDERS = ("custom_generate/", "tidar/", "plots/", "evaluation/")


@dataclass(frozen=True)
class Step:
    """What happens to one file."""

    name: str
    action: Action
    bytes: int


@dataclass(frozen=True)
class Target:
    """Where to push.

    Args:
        repo: Hub id, `org/name`.
        branch: to commit to, made where it is missing; `main` where None.
        private: whether a repository that is made is private.
        pull_request: opens a pull request instead of committing.
        message: of the commit.
        force: overwrites a repository that is not an earlier export of the same base model.
        token: access token; the one that `hf auth login` stored where None.
    """

    repo: str
    branch: str | None = None
    private: bool = False
    pull_request: bool = False
    message: str | None = None
    force: bool = False
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class PushPlan:
    """A push that was compared with what is on the Hub, and not begun."""

    target: Target
    steps: tuple[Step, ...]
    exists: bool
    """whether the repository does"""
    head: str | None
    """the commit that it was compared with"""
    new_branch: bool
    """whether the branch is to be made"""
    base: tuple[str, str] | None
    """Hub id and commit that files are copied from"""

    @property
    def changes(self) -> list[Step]:
        """The steps that change anything."""
        return [step for step in self.steps if step.action != "keep"]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        total = {action: sum(s.bytes for s in self.steps if s.action == action) for action in get_args(Action)}
        return {
            "repo": self.target.repo,
            "branch": self.target.branch or "main",
            "exists": self.exists,
            "bytes": total,
            "steps": [asdict(step) for step in self.steps],
        }


def compare(api: HfApi, folder: Path, target: Target) -> PushPlan:
    """Compares an exported folder with what is on the Hub. Nothing is changed there.

    Args:
        api: the Hub's client.
        folder: that `export` wrote.
        target: where to push.

    Raises:
        UserError: the repository is somebody else's, or public where a private one is meant.
        HTTPError: of the client.
    """
    from huggingface_hub import errors
    from huggingface_hub.hf_api import RepoFile

    remote: dict[str, RepoFile] = {}
    head, exists, new_branch = None, True, False
    try:
        info = api.model_info(target.repo)
        if target.private and info.private is False:
            raise UserError(
                f"{target.repo} is there already, and public",
                found="--private",
                expected="a private repository, or a new one",
                fix="make it private in its settings on the Hub first, or leave --private out",
            )
        try:
            head = api.model_info(target.repo, revision=target.branch).sha if target.branch else info.sha
        except errors.RevisionNotFoundError:
            head, new_branch = info.sha, True  # it is made from main
        found = api.list_repo_tree(target.repo, revision=head, recursive=True) if head else ()
        remote = {entry.path: entry for entry in found if isinstance(entry, RepoFile)}
    except errors.GatedRepoError:
        raise
    except errors.RepositoryNotFoundError:
        exists, new_branch = False, target.branch not in (None, "main")
    document = read_json(folder / PROVENANCE_FILE)
    if remote.keys() - set(_NOT_OURS) and not target.force and not target.pull_request:
        _require_ours(api, target, head, remote.keys(), document)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    hashes = {name: entry["sha256"] for name, entry in document["weights"].items()}
    changed = [name for name in names if not _same(folder / name, remote.get(name), hashes.get(name))]
    base = str(document.get("base_model")), str(document.get("base_revision"))
    copies = _on_base(api, *base, {name: hashes[name] for name in changed if name in hashes})
    steps = [
        Step(
            name,
            "copy" if name in copies else "upload" if name in changed else "keep",
            (folder / name).stat().st_size,
        )
        for name in names
    ]
    gone = sorted(name for name in remote.keys() - set(names) if _left_behind(name))
    steps += [Step(name, "delete", remote[name].size) for name in gone]
    return PushPlan(target, tuple(steps), exists, head, new_branch, base if copies else None)


def _same(path: Path, remote: Any, known_hash: str | None) -> bool:
    """Whether a file is the one on the Hub: large ones by their sha256, others by what git calls them."""
    from huggingface_hub.utils.sha import git_hash

    if remote is None or remote.size != path.stat().st_size:
        return False
    if remote.lfs is not None:
        return bool(remote.lfs.sha256 == (known_hash or sha256(path)))
    return bool(remote.blob_id == git_hash(path.read_bytes()))


def _left_behind(name: str) -> bool:
    """Whether a file that the folder has not is of an earlier export: weights that would be loaded, and our code."""
    return name == INDEX_FILE or name.startswith(_OUR_FOLDERS) or ("/" not in name and name.endswith(".safetensors"))


def _require_ours(
    api: HfApi, target: Target, head: str | None, names: Collection[str], document: Mapping[str, Any]
) -> None:
    theirs: dict[str, Any] = {}
    if PROVENANCE_FILE in names:
        path = Path(api.hf_hub_download(target.repo, PROVENANCE_FILE, revision=head))
        theirs = parse_json_object(path.read_text(encoding="utf-8"), f"{PROVENANCE_FILE} of {target.repo}")
    tool = theirs.get("tool")
    ours = isinstance(tool, dict) and tool.get("name") == TOOL
    if ours and theirs.get("base_model") == document.get("base_model"):
        return
    raise UserError(
        f"{target.repo} holds something else",
        found=f"an export of {theirs.get('base_model')}" if ours else f"{len(names)} files, no export of zconvert",
        expected=f"nothing, or an earlier export of {document.get('base_model')}",
        fix="choose another name; or overwrite it with --force, or propose it with --create-pr",
    )


def _on_base(api: HfApi, base: str, revision: str, hashes: Mapping[str, str]) -> set[str]:
    """The files that the base model's repository has under the same name, byte for byte."""
    from huggingface_hub import errors

    if not hashes or "/" not in base:
        return set()
    try:
        there = api.get_paths_info(base, sorted(hashes), revision=revision)
    except (errors.HTTPError, errors.HFValidationError):  # gone, gated, or no repository's name: all is uploaded
        return set()
    same = (file for file in there if getattr(file, "lfs", None) is not None and getattr(file, "xet_hash", None))
    return {file.path for file in same if file.lfs.sha256 == hashes[file.path]}  # type: ignore[union-attr]
