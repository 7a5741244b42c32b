"""Checkpoints come from the Hub by its real client; here the Hub is a server on the loopback."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.loopback_hub import COMMIT, LoopbackHub, serve
from tests.checkpoint.sparse import meta_shapes, one_by_one, write_sparse
from zconvert.tidar.settings import GatedParts, TidarSettings

MB = 1 << 20

# In a process of its own: the client reads its environment when it is imported.
SCRIPT = """
import json, sys
from zconvert.checkpoint.describe import describe
from zconvert.checkpoint.source import resolve
from zconvert.checkpoint.verdict import require_convertible
from zconvert.errors import UserError
told = []
try:
    name, options = sys.argv[1], json.loads(sys.argv[2])
    if options.pop("convertible", False):
        options["accept"] = lambda config, headers: require_convertible(name, config, headers)
    source = resolve(name, on_progress=lambda *counts: told.append(counts), **options)
    files = sorted(p.name for p in source.folder.iterdir())
    document = describe(source)
    print(json.dumps({"describe": document, "files": files, "told": told, "folder": str(source.folder)}))
except UserError as error:
    print(json.dumps({"error": str(error)}))
"""


@pytest.fixture
def hub(tiny_checkpoint: Callable[..., Path]) -> Iterator[LoopbackHub]:
    sharded = tiny_checkpoint("mixtral", shards=3)
    (sharded / "pytorch_model.bin").write_bytes(b"pickle")
    (sharded / "LICENSE").write_text("Apache-2.0")
    (sharded / "modeling.py").write_text("raise SystemExit")
    for inner in ("tidar/gated.safetensors", "original/model.safetensors"):
        (sharded / inner).parent.mkdir()
        (sharded / inner).write_bytes(b"weights")
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
    assert not {"pytorch_model.bin", "modeling.py", "original"} & set(answer["files"])
    assert (Path(answer["folder"]) / "tidar" / "gated.safetensors").read_bytes() == b"weights"
    weights = sum(shard["bytes"] for shard in answer["describe"]["shards"]) + len(b"weights")
    assert answer["told"][-1] == [weights, weights]
    assert sorted(answer["told"]) == answer["told"]


@pytest.mark.parametrize("name", ["org/sharded", "org/single"])
def test_describing_by_headers_alone_says_the_same_and_fetches_no_weight_file(
    ask: Callable[..., Any], hub: LoopbackHub, name: str
) -> None:
    by_headers = ask(name, weights=False)
    assert not [file for file in by_headers["files"] if file.endswith(".safetensors")]
    assert by_headers["describe"] == ask(name)["describe"]


@pytest.mark.parametrize(("shards", "most"), [(1, 300_000), (4, 300_000), (64, 830_000)])
def test_headers_are_read_by_small_ranges_of_large_files(
    ask: Callable[..., Any], hub: LoopbackHub, tmp_path: Path, shards: int, most: int
) -> None:
    sizes = {"vocab_size": 64, "num_hidden_layers": 2 * shards, "num_experts": 4, "bos_token_id": 2}
    shapes, config = meta_shapes("zaya", **sizes)
    folder = write_sparse(tmp_path / "large", dict(one_by_one(shapes)), config, shards=shards)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size > shards * 50 * 10**6
    hub.repositories["org/large"] = folder
    answer = ask("org/large", weights=False)
    assert len(answer["describe"]["shards"]) == shards
    assert answer["describe"]["parameters"]["total"] == sum(math.prod(shape) for shape in shapes.values())
    weights = {name: sent for name, sent in hub.sent.items() if name.endswith(".safetensors")}
    assert len(weights) == shards
    assert 0 < sum(weights.values()) < most
    assert all(None not in hub.ranges[name] for name in weights)
    assert shards == 1 or all(len(hub.ranges[name]) == 1 for name in weights), "the index tells how long headers are"
    assert sum(hub.sent.values()) < most + 10**6  # with the index


def test_one_request_has_the_header_of_a_shard_of_many_gigabytes(
    ask: Callable[..., Any], hub: LoopbackHub, tmp_path: Path
) -> None:
    _, config = meta_shapes("zaya", vocab_size=64, num_hidden_layers=2, num_experts=4, bos_token_id=2)
    shapes = {f"model.layers.0.mlp.experts.{expert}.down_proj.weight": (128, 1024, 128) for expert in range(1200)}
    hub.repositories["org/vast"] = write_sparse(tmp_path / "vast", shapes, config, shards=2, dtype="F8_E4M3")
    assert min(path.stat().st_size for path in (tmp_path / "vast").glob("*.safetensors")) > 10**10
    ask("org/vast", weights=False)
    asked = {name: ranges for name, ranges in hub.ranges.items() if name.endswith(".safetensors")}
    assert [len(ranges) for ranges in asked.values()] == [1, 1]


def test_what_cannot_be_converted_is_refused_before_weights_are_fetched(
    ask: Callable[..., Any], hub: LoopbackHub
) -> None:
    source = hub.repositories["org/sharded"]
    plain = json.loads((source / "config.json").read_text())
    for changes, reason in (
        ({"model_type": "jamba"}, "Mamba"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ"),
        ({"model_type": "x", "auto_map": {"AutoConfig": "configuration_x.X"}}, "never run"),
    ):
        folder = Path(shutil.copytree(source, source.parent / reason))
        hub.repositories[f"org/{folder.name}".replace(" ", "-")] = folder
        (folder / "config.json").write_text(json.dumps({**plain, **changes}))
        assert reason in ask(f"org/{folder.name}".replace(" ", "-"), convertible=True)["error"]
        assert all(None not in spans for name, spans in hub.ranges.items() if name.endswith(".safetensors"))
    assert "describe" in ask("org/sharded", convertible=True)
    assert None in hub.ranges["model-00001-of-00004.safetensors"]


def test_only_the_files_that_are_needed_are_fetched(ask: Callable[..., Any], hub: LoopbackHub) -> None:
    folder = hub.repositories["org/sharded"]
    wanted = {path.name for path in folder.iterdir()} - {"pytorch_model.bin", "modeling.py", "original"}
    others = ("model.pth", "x.gguf", "consolidated.safetensors", "adapter_model.safetensors", "tf_model.h5", "run.pt")
    copies = ("original/params.json", "tidy/x.json", "tidar-2/x.json", "tests/tidar/x.json")
    for name in (*others, *copies, "onnx/model.onnx", "original/model.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"of no use here")
    answer = ask("org/sharded")
    assert set(answer["files"]) == wanted
    assert not {name.split("/")[0] for name in hub.sent} - wanted - {"gated.safetensors"}


def test_what_a_gated_checkpoint_keeps_of_its_source_is_fetched(ask: Callable[..., Any], hub: LoopbackHub) -> None:
    originals = hub.repositories["org/sharded"] / "tidar" / "source"
    originals.mkdir()
    (originals / "config.json").write_text("{}")
    assert (Path(ask("org/sharded")["folder"]) / "tidar" / "source" / "config.json").read_text() == "{}"


def test_the_size_of_gated_weights_is_known_without_fetching_them(ask: Callable[..., Any], hub: LoopbackHub) -> None:
    config = hub.repositories["org/sharded"] / "config.json"
    gated = TidarSettings(block_size=4, mask_token_id=60, mode="gated", gated=GatedParts()).to_dict()
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tidar": gated}))
    assert ask("org/sharded", weights=False)["describe"]["gated_bytes"] == len(b"weights")
    assert "gated.safetensors" not in hub.sent
    (hub.repositories["org/single"] / "config.json").write_text(config.read_text())
    assert ask("org/single", weights=False)["describe"]["gated_bytes"] is None


def test_pickled_weights_alone_are_refused_with_how_to_convert_them(ask: Callable[..., Any], hub: LoopbackHub) -> None:
    folder = hub.repositories["org/single"]
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "save_pretrained" in ask("org/single")["error"]
    document = ask("org/single", weights=False)["describe"]
    assert document["verdict"] == "refused"
    assert "pickled weights" in document["reason"]
    assert "pytorch_model.bin" not in hub.sent


@pytest.mark.parametrize("reset", [False, True])
def test_a_transfer_that_breaks_off_is_taken_up_again(
    ask: Callable[..., Any], hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, reset: bool
) -> None:
    folder = hub.repositories["org/single"]
    size = write_filler(folder / "model.safetensors", 30 * MB)
    ask("org/single", weights=False)
    hub.sent.clear()
    # The first answer is the header's range; then it breaks off after the client has stored one piece of 10 MB.
    hub.breaks["model.safetensors"] = [10**9, *([-12 * MB] if reset else [12 * MB, 12 * MB])]
    answer = ask("org/single")
    assert not hub.breaks["model.safetensors"]
    assert (Path(answer["folder"]) / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert answer["told"][-1][0] == answer["told"][-1][1] == size
    asked = hub.ranges["model.safetensors"][2:]
    if reset:  # the client begins such a file anew
        assert asked == [None, None]
    else:
        assert asked == [None, f"bytes={10 * MB}-", f"bytes={20 * MB}-"]
        assert hub.sent["model.safetensors"] < size + 5 * MB


def test_a_later_call_fetches_only_the_files_that_are_not_whole_yet(ask: Callable[..., Any], hub: LoopbackHub) -> None:
    folder = hub.repositories["org/sharded"]
    first, *_, last = sorted(path.name for path in folder.glob("*.safetensors"))
    ask("org/sharded", weights=False)
    ranged = {name: hub.sent[name] for name in (first, last)}
    hub.refused_whole.add(last)
    assert "try again" in ask("org/sharded")["error"]
    hub.refused_whole.clear()
    before = hub.sent[first]
    answer = ask("org/sharded")
    assert answer["describe"]["verdict"] == "supported"
    assert hub.sent[first] - before <= ranged[first]  # its header at most
    assert (Path(answer["folder"]) / last).stat().st_size == (folder / last).stat().st_size


def test_headers_without_a_network_are_one_clear_error(ask: Callable[..., Any]) -> None:
    assert "describe" in ask("org/single", weights=False)
    for weights in (False, True):
        assert "HF_HUB_OFFLINE" in ask("org/single", environment={"HF_HUB_OFFLINE": "1"}, weights=weights)["error"]


def write_filler(path: Path, size: int) -> int:
    """Adds a tensor of random bytes to a safetensors file; returns the file's new size."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    header["filler"] = {"dtype": "U8", "shape": [size], "data_offsets": [len(data), len(data) + size]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data + random.Random(0).randbytes(size))
    return path.stat().st_size


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
