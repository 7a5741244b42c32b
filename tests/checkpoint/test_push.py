"""Exports are pushed to the Hub by its real client; here the Hub is a server on the loopback."""

from __future__ import annotations

import json
import shutil
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from tests.checkpoint.loopback_hub import LoopbackHub, serve
from tests.checkpoint.pushed import TOKEN, Pushes, Repository
from tests.commands import run_command
from zconvert.checkpoint import push as pushing
from zconvert.checkpoint.export import export
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.push import Pushed, plan_push
from zconvert.checkpoint.push_plan import Target
from zconvert.checkpoint.source import resolve
from zconvert.cli import export as cli
from zconvert.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # the client's own

Checkpoint = Callable[..., Path]
REPO = "org/name"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    (tmp_path / "hub").mkdir()
    with serve(LoopbackHub({}, pushes=Pushes(tmp_path / "hub"))) as hub:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(_http, "time", types.SimpleNamespace(sleep=lambda _: None, time=_http.time.time))
        monkeypatch.setattr(pushing, "_WAITS", (0.0, 0.0))
        yield hub


@pytest.fixture
def exported(tiny_checkpoint: Checkpoint, tmp_path: Path) -> Path:
    source = tiny_checkpoint("mixtral", shards=3)
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    convert_init(resolve(source), tmp_path / "converted", block_size=4)
    export(resolve(tmp_path / "converted"), tmp_path / "name")
    return tmp_path / "name"


def push(folder: Path, **options: Any) -> Pushed:
    return pushing.push(folder, Target(REPO, **{"token": TOKEN, **options}))


def repository(hub: LoopbackHub) -> Repository:
    assert hub.pushes is not None
    return hub.pushes.repositories[REPO]


def pushes(hub: LoopbackHub) -> Pushes:
    assert hub.pushes is not None
    return hub.pushes


def files_of(hub: LoopbackHub, branch: str = "main") -> dict[str, bytes]:
    folder = repository(hub).commits[repository(hub).branches[branch]]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def local(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_push_makes_the_repository_the_folder_in_one_commit(hub: LoopbackHub, exported: Path) -> None:
    told: list[str] = []
    target = Target(REPO, message="first", token=TOKEN)
    pushed = pushing.push(exported, target, on_file=lambda step, n, count: told.append(f"{step.name} {n}/{count}"))
    assert files_of(hub) == {**local(exported), ".gitattributes": b"*.safetensors filter=lfs"}
    assert repository(hub).messages == ["initial commit", "first"]
    assert pushed.commit == repository(hub).branches["main"]
    assert pushed.url == f"{hub.endpoint}/{REPO}"
    assert not repository(hub).private
    shards = sorted(p.name for p in exported.glob("*.safetensors"))
    assert told == [f"{name} {n}/{len(shards)}" for n, name in enumerate(shards, 1)]


def test_a_second_push_sends_only_what_changed_and_an_unchanged_folder_nothing(
    hub: LoopbackHub, exported: Path
) -> None:
    push(exported)
    before = len(pushes(hub).received)
    assert push(exported).commit is None
    (exported / "README.md").write_text((exported / "README.md").read_text() + "More.\n")
    pushed = push(exported)
    assert [step.name for step in pushed.plan.changes] == ["README.md"]
    assert len(pushes(hub).received) == before
    assert files_of(hub)["README.md"].endswith(b"More.\n")
    assert len(repository(hub).messages) == 3


def test_weights_that_an_earlier_push_left_are_taken_away_and_other_files_stay(
    hub: LoopbackHub, exported: Path, tmp_path: Path
) -> None:
    push(exported)
    api = huggingface_hub.HfApi(token=TOKEN)
    api.upload_file(path_or_fileobj=b"image", path_in_repo="picture.png", repo_id=REPO)
    export(resolve(exported), tmp_path / "whole" / "name", max_shard_size=10**9)
    push(tmp_path / "whole" / "name")
    assert files_of(hub).keys() == {*local(tmp_path / "whole" / "name"), ".gitattributes", "picture.png"}


def test_a_private_repository_stays_unseen_without_the_token(hub: LoopbackHub, exported: Path) -> None:
    push(exported, private=True)
    assert repository(hub).private
    assert plan_push(exported, Target(REPO, token=TOKEN)).changes == []
    assert not plan_push(exported, Target(REPO)).exists


def test_a_public_repository_is_not_taken_for_a_private_one(hub: LoopbackHub, exported: Path) -> None:
    push(exported)
    with pytest.raises(UserError, match="there already, and public"):
        push(exported, private=True)


def test_a_branch_is_made_where_it_is_missing_and_main_stays(hub: LoopbackHub, exported: Path) -> None:
    push(exported)
    assert push(exported, branch="v1").commit is None
    assert files_of(hub, "v1") == files_of(hub)
    (exported / "LICENSE").write_text("new")
    for _ in range(2):
        push(exported, branch="v2/x")
    assert files_of(hub, "v2/x")["LICENSE"] == b"new"
    assert "LICENSE" not in files_of(hub)
    assert len(repository(hub).messages) == 3


def test_a_pull_request_proposes_and_main_stays(hub: LoopbackHub, exported: Path) -> None:
    push(exported)
    pushes(hub).read_only.add(REPO)
    (exported / "LICENSE").write_text("new")
    pushed = push(exported, pull_request=True)
    assert pushed.pull_request == f"{hub.endpoint}/{REPO}/discussions/1"
    assert files_of(hub, "refs/pr/1")["LICENSE"] == b"new"
    assert "LICENSE" not in files_of(hub)


def test_a_push_that_broke_off_leaves_the_repository_and_the_next_one_goes_on(hub: LoopbackHub, exported: Path) -> None:
    push(exported)
    seen = files_of(hub)
    pushes(hub).received.clear()
    for path in exported.glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    refresh(exported)
    pushes(hub).on_upload = lambda number, received: number == 0 or received < 5000
    with pytest.raises(UserError, match="could not be reached") as error:
        push(exported)
    assert "not sent again" in str(error.value)
    assert files_of(hub) == seen
    first = pushes(hub).received[0][0]

    pushes(hub).received.clear()
    pushes(hub).on_upload = lambda number, received: True
    push(exported)
    assert first not in [sha for sha, _ in pushes(hub).received]
    assert files_of(hub) == {**local(exported), ".gitattributes": seen[".gitattributes"]}


def refresh(folder: Path) -> None:
    """Has provenance.json tell the weights as they are now."""
    import hashlib

    path = folder / "provenance.json"
    document = json.loads(path.read_text())
    for name, entry in document["weights"].items():
        entry["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    path.write_text(json.dumps(document))


def test_a_connection_that_breaks_once_is_taken_up_by_the_same_push(hub: LoopbackHub, exported: Path) -> None:
    pushes(hub).on_upload = lambda number, received: number != 1 or received < 5000
    push(exported)
    assert len(pushes(hub).received) == len(list(exported.glob("*.safetensors"))) + 1
    assert files_of(hub).keys() > local(exported).keys()


@pytest.mark.parametrize(
    ("place", "status"),
    [("repos/create", 503), ("preupload", 500), ("objects/batch", 502), ("/lfs/", 503), ("/commit/", 429)],
)
def test_errors_of_the_server_are_tried_again(hub: LoopbackHub, exported: Path, place: str, status: int) -> None:
    pushes(hub).failures += [(place, status)] * 2
    push(exported)
    assert files_of(hub).keys() > local(exported).keys()
    assert pushes(hub).failures == []


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub: LoopbackHub, exported: Path) -> None:
    pushes(hub).lost_answers.append("/commit/")
    assert push(exported).commit is None
    assert len(repository(hub).messages) == 2


def test_a_pull_request_whose_answer_was_lost_is_not_opened_twice(hub: LoopbackHub, exported: Path) -> None:
    push(exported)
    (exported / "LICENSE").write_text("new")
    pushes(hub).lost_answers.append("/commit/")
    with pytest.raises(UserError, match="could not be reached"):
        push(exported, pull_request=True)
    assert len(repository(hub).messages) == 3


def test_errors_that_stay_end_with_what_to_do(hub: LoopbackHub, exported: Path) -> None:
    pushes(hub).failures += [("/commit/", 503)] * 9
    with pytest.raises(UserError, match="could not be reached for org/name") as error:
        push(exported)
    assert "run the same command again" in str(error.value)


def test_a_wrong_token_is_told_and_never_shown(hub: LoopbackHub, exported: Path) -> None:
    for token in ("hf_wrong", None):
        with pytest.raises(UserError, match="does not know this token") as error:
            push(exported, token=token)
        assert "hf auth login" in str(error.value)
        assert "hf_wrong" not in str(error.value)
    assert "hf_wrong" not in repr(Target(REPO, token="hf_wrong"))
    pushes(hub).messages["/api/repos/create"] = f"{TOKEN} may only read"
    with pytest.raises(UserError, match="may not be written") as error:
        push(exported)
    assert "found: … may only read" in str(error.value)


def test_a_full_account_is_told_in_the_hubs_words(hub: LoopbackHub, exported: Path) -> None:
    pushes(hub).room = 100
    with pytest.raises(UserError, match="no room for org/name") as error:
        push(exported)
    assert "storage limit reached" in str(error.value)
    pushes(hub).room, pushes(hub).failures = None, [("objects/batch", 413)]
    with pytest.raises(UserError, match="no room"):
        push(exported)


def test_a_namespace_that_may_not_be_written_is_told(hub: LoopbackHub, exported: Path) -> None:
    pushes(hub).read_only.add(REPO)
    with pytest.raises(UserError, match="may not be written with this token"):
        push(exported)


def test_a_repository_of_something_else_is_left_alone_without_force(hub: LoopbackHub, exported: Path) -> None:
    api = huggingface_hub.HfApi(token=TOKEN)
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b"theirs", path_in_repo="pytorch_model.bin", repo_id=REPO)
    for options in ({}, {"branch": "main"}):
        with pytest.raises(UserError, match="holds something else"):
            push(exported, **options)
    assert len(repository(hub).messages) == 2
    assert push(exported, pull_request=True).pull_request
    assert push(exported, force=True).commit
    assert files_of(hub)["pytorch_model.bin"] == b"theirs"
    assert files_of(hub).keys() > local(exported).keys()


def test_an_export_of_another_base_is_something_else_too(hub: LoopbackHub, exported: Path) -> None:
    push(exported)
    path = exported / "provenance.json"
    path.write_text(path.read_text().replace('"base_model": "mixtral"', '"base_model": "other"', 1))
    with pytest.raises(UserError, match="an export of mixtral"):
        push(exported)


def test_weights_that_the_base_has_are_copied_on_the_server(
    hub: LoopbackHub, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    exported = from_the_hub(hub, tiny_checkpoint, tmp_path)
    shards = sorted(p.name for p in exported.glob("*.safetensors"))
    pushed = push(exported)
    same = [step.name for step in pushed.plan.steps if step.action == "copy"]
    assert same == pushes(hub).duplicated
    assert 0 < len(same) < len(shards)  # the one with the mask token's row is another
    assert len(pushes(hub).received) == len(shards) - len(same)
    assert files_of(hub).items() >= local(exported).items()


def from_the_hub(hub: LoopbackHub, tiny_checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """An export of a conversion of `base/model`, which the Hub has."""
    hub.repositories["base/model"] = tiny_checkpoint("mixtral", shards=3)
    source = resolve("base/model")
    convert_init(source, tmp_path / "of-hub", block_size=4)
    export(resolve(tmp_path / "of-hub"), tmp_path / "exported" / "name")
    return tmp_path / "exported" / "name"


@pytest.mark.parametrize("failure", [("lfs-files/duplicate", 400), ("lfs-files/duplicate", 404)])
def test_what_the_server_will_not_copy_is_uploaded(
    hub: LoopbackHub, tiny_checkpoint: Checkpoint, tmp_path: Path, failure: tuple[str, int]
) -> None:
    exported = from_the_hub(hub, tiny_checkpoint, tmp_path)
    pushes(hub).failures.append(failure)
    push(exported)
    assert pushes(hub).duplicated == []
    assert len(pushes(hub).received) == len(list(exported.glob("*.safetensors")))
    assert files_of(hub).items() >= local(exported).items()


def test_a_base_that_is_gone_costs_only_the_copies(
    hub: LoopbackHub, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    exported = from_the_hub(hub, tiny_checkpoint, tmp_path)
    del hub.repositories["base/model"]
    assert not [step for step in push(exported).plan.steps if step.action == "copy"]


def test_a_dry_run_tells_files_actions_and_bytes_and_changes_nothing(hub: LoopbackHub, exported: Path) -> None:
    plan = plan_push(exported, Target(REPO, token=TOKEN))
    assert not plan.exists
    assert {step.name: (step.action, step.bytes) for step in plan.steps} == {
        name: ("upload", len(content)) for name, content in local(exported).items()
    }
    assert plan.to_dict()["bytes"] == {
        "upload": sum(map(len, local(exported).values())),
        "copy": 0,
        "keep": 0,
        "delete": 0,
    }
    assert pushes(hub).repositories == {}
    assert not [line for line in pushes(hub).requests if "paths-info" not in line]


def test_no_file_of_an_export_and_no_plan_has_the_token(hub: LoopbackHub, exported: Path) -> None:
    pushed = push(exported)
    assert TOKEN not in json.dumps(pushed.to_dict()) + repr(pushed)
    assert not [name for name, content in files_of(hub).items() if TOKEN.encode() in content]


def test_what_changed_meanwhile_is_looked_at_again(
    hub: LoopbackHub, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(exported)
    (exported / "LICENSE").write_text("new")
    plan = pushing.compare
    api = huggingface_hub.HfApi(token=TOKEN)

    def overtaken(*arguments: Any) -> Any:
        found = plan(*arguments)
        api.upload_file(path_or_fileobj=b"x", path_in_repo="picture.png", repo_id=REPO)
        return found

    monkeypatch.setattr(pushing, "compare", overtaken)
    with pytest.raises(UserError, match="was changed meanwhile"):
        push(exported)
    assert "LICENSE" not in files_of(hub)


def test_bars_of_the_client_are_as_they_were_afterwards(hub: LoopbackHub, exported: Path) -> None:
    before = huggingface_hub.utils.are_progress_bars_disabled()
    push(exported)
    assert huggingface_hub.utils.are_progress_bars_disabled() == before
    shutil.rmtree(exported / "custom_generate")
    pushing.push(exported, Target(REPO, token=TOKEN), bars=True)
    assert not [name for name in files_of(hub) if name.startswith("custom_generate/")]


run = partial(run_command, "export")


def test_the_command_exports_and_pushes_in_one(hub: LoopbackHub, exported: Path, tmp_path: Path) -> None:
    command = [tmp_path / "converted", "--hub", REPO, "--no-verify", "--token", TOKEN]
    dry = run(*command, "--dry-run", "--json")
    assert dry.exit_code == 0, dry.output
    plan = json.loads(dry.stdout)
    assert (plan["dry_run"], plan["exists"]) == (True, False)
    assert pushes(hub).repositories == {}
    assert f"{plan['bytes']['upload'] / 1000:.1f} kB to upload" in run(*command, "--dry-run").stdout

    done = run(*command, "--private", "--commit-message", "first")
    assert done.exit_code == 0, done.output
    assert f"Pushed to {hub.endpoint}/{REPO}" in done.stdout
    assert "Uploading model-00001-of-" in done.stderr
    assert repository(hub).private
    assert repository(hub).messages[-1] == "first"
    assert files_of(hub).items() >= local(exported).items()  # the folder that --out writes, its card's title too
    assert json.loads(run(*command, "--json").stdout)["commit"] is None
    assert "is up to date" in run(*command).stdout
    assert TOKEN not in done.output + dry.output


def test_the_command_asks_for_a_token_before_it_exports(
    hub: LoopbackHub, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "export_shown", lambda *_, **__: pytest.fail("it was exported"))
    for token in (["--token", "hf_wrong"], []):
        ran = run(tmp_path / "converted", "--hub", REPO, *token)
        assert ran.exit_code == 1
        assert "hf auth login" in " ".join(ran.output.split())
        assert "hf_wrong" not in ran.output
