"""Checkpoints come from the Hub by its real client; here the Hub is a server on the loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.loopback_hub import COMMIT, LoopbackHub, serve

# In a process of its own: the client reads its environment when it is imported.
SCRIPT = """
import json, sys
from zconvert.checkpoint.describe import describe
from zconvert.checkpoint.source import resolve
from zconvert.errors import UserError
told = []
try:
    source = resolve(*sys.argv[1:2], on_progress=lambda *counts: told.append(counts), **json.loads(sys.argv[2]))
    files = sorted(p.name for p in source.folder.iterdir())
    document = describe(source)
    print(json.dumps({"describe": document, "files": files, "told": told[-1:], "folder": str(source.folder)}))
except UserError as error:
    print(json.dumps({"error": str(error)}))
"""


@pytest.fixture
def hub(tiny_checkpoint: Callable[..., Path]) -> Iterator[LoopbackHub]:
    sharded = tiny_checkpoint("mixtral", shards=3)
    (sharded / "pytorch_model.bin").write_bytes(b"pickle")
    (sharded / "LICENSE").write_text("Apache-2.0")
    (sharded / "modeling.py").write_text("raise SystemExit")
    empty = sharded.parent / "empty"
    empty.mkdir()
    (empty / "README.md").write_text("nothing")
    with serve(LoopbackHub({"org/sharded": sharded, "org/single": tiny_checkpoint("zaya"), "org/empty": empty})) as h:
        yield h


@pytest.fixture
def ask(hub: LoopbackHub, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def run(name: str, *, environment: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, name, json.dumps(options)],
            capture_output=True,
            text=True,
            env={**os.environ, **hub.environment(tmp_path / "home"), **(environment or {})},
        )
        assert done.returncode == 0, done.stderr
        assert "%|" not in done.stderr  # no progress bar: a library does not print
        return json.loads(done.stdout)

    return run


def test_a_hub_id_is_fetched_with_its_weights_and_licence_but_no_pickles_or_code(ask: Callable[..., Any]) -> None:
    answer = ask("org/sharded")
    assert answer["describe"]["name"] == "org/sharded"
    assert answer["describe"]["revision"] == COMMIT
    assert answer["describe"]["next"].startswith(f"zconvert convert-init org/sharded --revision {COMMIT} --out ")
    assert {"config.json", "LICENSE", "tokenizer.json", "model-00001-of-00004.safetensors"} <= set(answer["files"])
    assert not {"pytorch_model.bin", "modeling.py"} & set(answer["files"])
    ((done, total),) = answer["told"]
    assert done == total > 0


@pytest.mark.parametrize("name", ["org/sharded", "org/single"])
def test_describing_by_headers_alone_says_the_same_and_fetches_no_weight_file(
    ask: Callable[..., Any], hub: LoopbackHub, name: str
) -> None:
    by_headers = ask(name, weights=False)
    assert not [file for file in by_headers["files"] if file.endswith(".safetensors")]
    assert by_headers["describe"] == ask(name)["describe"]


def test_a_header_costs_one_small_range_of_a_large_file(ask: Callable[..., Any], hub: LoopbackHub) -> None:
    path = hub.repositories["org/single"] / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["filler"] = {"dtype": "U8", "shape": [10**6], "data_offsets": [len(content) - 8 - length] * 2}
    header["filler"]["data_offsets"][1] += 10**6
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :] + bytes(10**6))
    assert "describe" in ask("org/single", weights=False)
    assert hub.sent["model.safetensors"] < 300_000


def test_what_was_fetched_is_found_without_a_network_and_by_its_cached_folder(ask: Callable[..., Any]) -> None:
    first = ask("org/single")
    offline = {"HF_HUB_OFFLINE": "1"}
    assert ask("org/single", environment=offline, weights=False)["describe"] == first["describe"]
    assert ask(first["folder"], environment=offline)["describe"] == first["describe"]


def test_a_truncated_shard_on_the_hub_is_refused_by_its_header(ask: Callable[..., Any], hub: LoopbackHub) -> None:
    path = hub.repositories["org/single"] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert "truncated" in ask("org/single", weights=False)["error"]


def test_a_repository_that_is_not_there_is_one_clear_error(ask: Callable[..., Any]) -> None:
    assert "neither a folder here nor a repository on the Hub" in ask("org/none")["error"]


def test_a_repository_without_a_model_is_not_a_checkpoint(ask: Callable[..., Any]) -> None:
    assert "is not a checkpoint" in ask("org/empty")["error"]


def test_a_revision_that_is_not_there_is_one_clear_error(ask: Callable[..., Any]) -> None:
    assert "no revision 'v9'" in ask("org/single", revision="v9")["error"]


def test_a_gated_repository_says_how_to_get_access(ask: Callable[..., Any], hub: LoopbackHub) -> None:
    hub.gated.add("org/single")
    assert "ask for access" in ask("org/single")["error"]


def test_without_a_network_a_hub_id_is_one_clear_error(ask: Callable[..., Any]) -> None:
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        error = ask("org/single", environment=environment)["error"]
        assert "could not be fetched from the Hub" in error
        assert "HF_HUB_OFFLINE" in error
