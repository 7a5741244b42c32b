"""An exported folder -> the Hub, in one commit: what is there does not travel again, nothing is seen half.

Large files are uploaded first and belong to nothing yet; the commit that names them all comes last. So a push that
breaks off leaves the repository as it was, and the next one finds what had arrived. Weight files that the base model's
repository has byte for byte are copied on the server.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zconvert.checkpoint.hub import TRANSIENT
from zconvert.checkpoint.provenance import TOOL
from zconvert.checkpoint.push_plan import Action, PushPlan, Step, Target, compare
from zconvert.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

OnFile = Callable[[Step, int, int], None]

_WAITS = (1.0, 4.0, 16.0)
"""seconds before the Hub is asked again, beside what its client does by itself"""
_LOG_IN = "log in with `hf auth login`, or pass --token"
_QUOTA = (402, 413, 507)


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
        return compare(_api(target), folder, target)


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
            plan = compare(api, folder, target)
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
    return response is None or response.status_code in TRANSIENT


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
    if status is None or status in TRANSIENT:
        return f"the Hub could not be reached for {target.repo}", again
    return f"the Hub refuses the push to {target.repo}", "see what it says, then run the same command again"


def _message(error: Exception, target: Target) -> str:
    text = getattr(error, "server_message", None) or str(error.__cause__ or error)
    text = " ".join(str(text).split())[:300]
    return text.replace(target.token, "…") if target.token else text
