"""An exported folder -> the Hub, in one commit: what is there does not travel again, nothing is seen half.

Large files are uploaded first and belong to nothing yet; the commit that names them all comes last. So a push that
breaks off leaves the repository as it was, and the next one finds what had arrived. Weight files that the base model's
repository has byte for byte are copied on the server.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from zconvert.checkpoint.folder import sha256
from zconvert.checkpoint.headers import INDEX_FILE
from zconvert.checkpoint.json_patch import parse_json_object, read_json
from zconvert.checkpoint.provenance import PROVENANCE_FILE, TOOL
from zconvert.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

Action = Literal["upload", "copy", "keep", "delete"]
"""what happens to a file of the repository; copy is from the base model's repository, on the server"""

_WAITS = (1.0, 4.0, 16.0)
"""seconds before the Hub is asked again, beside what its client does by itself"""
_NOT_OURS = (".gitattributes",)
"""what the Hub puts into a new repository"""
_OUR_FOLDERS = ("custom_generate/", "tidar/", "plots/", "evaluation/")
_LOG_IN = "log in with `hf auth login`, or pass --token"
_QUOTA = (402, 413, 507)
_TRANSIENT = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Step:
    """What happens to one file."""

    name: str
    action: Action
    bytes: int


OnFile = Callable[[Step, int, int], None]


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


@dataclass(frozen=True)
class Pushed:
    """A push that was done."""

    plan: PushPlan
    url: str
    commit: str | None
    """None where nothing had changed"""
    pull_request: str | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        done = {"url": self.url, "commit": self.commit, "pull_request": self.pull_request}
        return {**self.plan.to_dict(), **done}


def check_login(target: Target) -> None:
    """Sees that the Hub knows the token, which is better told before an export than after.

    Raises:
        UserError: there is none, the Hub does not know it, or cannot be reached.
    """
    with _push_errors(target):
        _api(target).whoami()


def plan_push(folder: Path, target: Target) -> PushPlan:
    """Compares an exported folder with what is on the Hub. Nothing is changed there.

    Args:
        folder: that `export` wrote.
        target: where to push.

    Raises:
        UserError: access is refused, the Hub cannot be reached, or the repository is somebody else's.
    """
    with _push_errors(target):
        return _plan(_api(target), folder, target)


def push(
    folder: Path,
    target: Target,
    *,
    on_file: OnFile = lambda *_: None,
    bars: bool = False,
) -> Pushed:
    """Makes the repository what an exported folder is.

    Args:
        folder: that `export` wrote.
        target: where to push.
        on_file: told of each file before it travels: the step, its number from 1, and how many there are.
        bars: has the Hub's client draw its progress bars on stderr, where that is a terminal.

    Raises:
        UserError: access is refused, there is no room, the Hub cannot be reached, or the repository is somebody else's.
    """
    from huggingface_hub import errors

    api = _api(target)
    with _push_errors(target), _bars(bars):
        for wait in (*_WAITS, None):
            plan = _plan(api, folder, target)
            try:
                return _carry_out(api, folder, plan, on_file)
            except errors.HTTPError as error:
                # Compared anew each time: a commit whose answer was lost is found done. A pull request is not.
                if wait is None or target.pull_request or not _transient(error):
                    raise
                time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _api(target: Target) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=target.token)


def _plan(api: HfApi, folder: Path, target: Target) -> PushPlan:
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


def _require_ours(api: HfApi, target: Target, head: str | None, names: Any, document: Mapping[str, Any]) -> None:
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


def _carry_out(api: HfApi, folder: Path, plan: PushPlan, on_file: OnFile) -> Pushed:
    from huggingface_hub import CommitOperationCopy, CommitOperationDelete, constants, errors

    target, head = plan.target, plan.head
    url = f"{constants.ENDPOINT}/{target.repo}"
    if not plan.exists:
        api.create_repo(target.repo, private=target.private or None, exist_ok=True)
        head = api.model_info(target.repo).sha
    if plan.new_branch and target.branch is not None:
        api.create_branch(target.repo, branch=target.branch, exist_ok=True)
    if not plan.changes:
        return Pushed(plan, url, None, None)

    def names(action: Action) -> list[str]:
        return [step.name for step in plan.steps if step.action == action]

    def copied(name: str) -> CommitOperationCopy:
        base, commit = plan.base or ("", "")
        return CommitOperationCopy(name, name, src_revision=commit, src_repo_id=base, src_repo_type="model")

    def commit(uploads: list[str], copies: list[str]) -> Any:
        operations: list[Any] = [
            *_upload(api, folder, plan, uploads, on_file),
            *map(copied, copies),
            *map(CommitOperationDelete, names("delete")),
        ]
        message = target.message or f"Export by {TOOL}"
        where: dict[str, Any] = {"revision": target.branch, "create_pr": target.pull_request}
        return api.create_commit(target.repo, operations, commit_message=message, parent_commit=head, **where)

    try:
        info = commit(names("upload"), names("copy"))
    except (errors.FileDuplicationError, errors.HTTPError) as error:
        if not names("copy") or not _of_a_copy(error):
            raise
        info = commit(names("upload") + names("copy"), [])  # in another region, say
    return Pushed(plan, url, info.oid, info.pr_url)


def _upload(api: HfApi, folder: Path, plan: PushPlan, names: list[str], on_file: OnFile) -> list[CommitOperationAdd]:
    """Uploads the contents of files, weights one file after another; they belong to no commit yet."""
    from huggingface_hub import CommitOperationAdd, errors

    steps = {step.name: step for step in plan.steps}
    operations = {name: CommitOperationAdd(name, folder / name) for name in names}
    weights = [name for name in names if name.endswith(".safetensors")]
    where: dict[str, Any] = {"revision": plan.target.branch, "create_pr": plan.target.pull_request}
    try:
        for number, name in enumerate(weights, 1):
            on_file(steps[name], number, len(weights))
            api.preupload_lfs_files(plan.target.repo, [operations[name]], free_memory=False, **where)
        rest = [operation for name, operation in operations.items() if name not in weights]
        api.preupload_lfs_files(plan.target.repo, rest, free_memory=False, **where)
    except RuntimeError as error:  # the client's, around what went wrong with one file
        if isinstance(error.__cause__, errors.HTTPError):
            raise error.__cause__ from error
        raise
    return list(operations.values())


def _of_a_copy(error: Exception) -> bool:
    """Whether copying on the server is what failed."""
    response = getattr(error, "response", None)
    return type(error).__name__ == "FileDuplicationError" or "lfs-files/duplicate" in str(getattr(response, "url", ""))


def _transient(error: Exception) -> bool:
    response = getattr(error, "response", None)
    return response is None or response.status_code in _TRANSIENT


@contextmanager
def _bars(wanted: bool) -> Iterator[None]:
    """Lets the Hub's client draw its progress bars, or not."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    (enable_progress_bars if wanted else disable_progress_bars)()
    try:
        yield
    finally:
        (disable_progress_bars if before else enable_progress_bars)()


@contextmanager
def _push_errors(target: Target) -> Iterator[None]:
    """Turns what the Hub's client raises into a `UserError` that says what to do, and never names the token."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.HTTPError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        what, fix = _told(error, target)
        raise UserError(what, found=_message(error, target), fix=fix) from error
    except errors.LocalTokenNotFoundError as error:
        raise UserError(f"pushing to {target.repo} needs a token", found="none", fix=_LOG_IN) from error
    except ValueError as error:  # a bad name, metadata, errors within an answer
        raise UserError(
            f"{target.repo} cannot be pushed to",
            found=_message(error, target),
            fix="see what it says, then run the same command again",
        ) from error


def _told(error: Exception, target: Target) -> tuple[str, str]:
    """What an error of the Hub is about, and what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    again = "run the same command again: what has arrived is not sent again"
    full = any(word in _message(error, target).lower() for word in ("quota", "storage limit", "payment"))
    if status == 401:
        return "the Hub does not know this token", _LOG_IN
    if status in _QUOTA or (status == 403 and full):
        return (
            f"the Hub has no room for {target.repo}",
            f"free some space there, or take another account; then {again}",
        )
    if status == 403:
        fix = "take a token with write access, choose another name, or propose it with --create-pr"
        return f"{target.repo} may not be written with this token", fix
    if status == 412:
        return f"{target.repo} was changed meanwhile", f"look at what came; then {again}"
    if status is None or status in _TRANSIENT:
        return f"the Hub could not be reached for {target.repo}", again
    return f"the Hub refuses the push to {target.repo}", "see what it says, then run the same command again"


def _message(error: Exception, target: Target) -> str:
    text = getattr(error, "server_message", None) or str(error.__cause__ or error)
    text = " ".join(str(text).split())[:300]
    return text.replace(target.token, "…") if target.token else text
