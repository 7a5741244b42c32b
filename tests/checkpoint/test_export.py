"""An export runs without zconvert, is a plain model without trust, and says where it comes from."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import zconvert
from tests.checkpoint.test_card import RESULTS, front_matter
from tests.commands import run_command
from zconvert.checkpoint import export as exporting
from zconvert.checkpoint import reshard
from zconvert.checkpoint.export import export
from zconvert.checkpoint.folder import BASE_CARD, copy
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.headers import read_headers
from zconvert.checkpoint.provenance import carried_on
from zconvert.checkpoint.source import require_converted, resolve
from zconvert.checkpoint.weights import write_shard
from zconvert.errors import UserError
from zconvert.tidar._requirements import OLDEST

Checkpoint = Callable[..., Path]
CARD = "---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\nlanguage: [en]\ntags: [x]\n---\n\n# Base\n"


@pytest.fixture
def converted(tiny_checkpoint: Checkpoint, tmp_path: Path) -> Callable[..., Path]:
    def make(model_type: str = "mixtral", **options: Any) -> Path:
        source = tiny_checkpoint(model_type, **options)
        (source / "README.md").write_text(CARD)
        (source / "LICENSE").write_text("Take it.")
        convert_init(resolve(source), tmp_path / "converted", block_size=4)
        return tmp_path / "converted"

    return make


def test_the_shipped_code_is_the_packages_own_verbatim(converted: Callable[..., Path], tmp_path: Path) -> None:
    export(resolve(converted()), tmp_path / "out")
    package = Path(zconvert.__file__).parent / "tidar"
    shipped = tmp_path / "out" / "custom_generate"
    assert {p.name for p in shipped.iterdir()} == {p.name for p in package.glob("*.py")} | {"requirements.txt"}
    assert all((shipped / p.name).read_bytes() == p.read_bytes() for p in package.glob("*.py"))
    lines = [line for line in (shipped / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == ["torch", "transformers"], "transformers 4 refuses the folder where a version is missing"


def test_the_shipped_code_asks_for_the_versions_that_the_project_asks_for() -> None:
    project = tomllib.loads((Path(zconvert.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert {f"{name}>={'.'.join(map(str, oldest))}" for name, oldest in OLDEST.items()} <= set(project["dependencies"])


@pytest.mark.parametrize("shards", [1, 3])
def test_weights_arrive_whole_and_belong_to_the_export_alone(
    converted: Callable[..., Path], tmp_path: Path, shards: int
) -> None:
    folder, out = converted(shards=shards), tmp_path / "out"
    seen: list[tuple[str, int, int]] = []
    report = export(resolve(folder), out, on_shard=lambda *shard: seen.append(shard))
    assert read_headers(out).tensors == read_headers(folder).tensors
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["weights"] == report["weights"]
    assert [name for name, _, _ in seen] == sorted(report["weights"])
    for name, weight in report["weights"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == weight["sha256"]
        assert (out / name).stat().st_nlink == 1, "an edit must not reach the checkpoint"
    assert report["files"] == sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    json.dumps(report)


def test_an_export_says_what_it_was_made_of_and_with(converted: Callable[..., Path], tmp_path: Path) -> None:
    export(resolve(converted()), tmp_path / "out", results=RESULTS)
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert provenance["base_model"] == "mixtral"
    assert provenance["tool"] == {"name": "zconvert", "version": zconvert.__version__}
    assert provenance["libraries"]["transformers"]
    assert provenance["results"] == RESULTS
    config = yaml.safe_load((tmp_path / "out" / "zconvert_config.yaml").read_text())
    assert config == {"stages": provenance["history"]}
    (stage,) = config["stages"]
    assert (stage["stage"], stage["recipe"]["base_model"]) == ("convert-init", "mixtral")
    assert stage["recipe"]["diffusion"]["block_size"] == 4


def test_a_stage_that_follows_forgets_what_was_measured_of_the_weights_before(
    converted: Callable[..., Path], tmp_path: Path
) -> None:
    export(resolve(converted()), tmp_path / "out", results=RESULTS)
    settings = require_converted(resolve(tmp_path / "out"))
    text = carried_on(tmp_path / "out", settings, {"stage": "sft", "recipe": {}, "steps": 3, "tokens_seen": 90})
    document = json.loads(str(text))
    assert not {"rows", "weights", "results"} & set(document)
    assert [entry["stage"] for entry in document["history"]] == ["convert-init", "sft"]
    assert document["history"][1]["tool"]["version"] == zconvert.__version__


def test_an_export_of_an_export_is_the_same_folder(converted: Callable[..., Path], tmp_path: Path) -> None:
    folder = in_a_run(converted(), tmp_path)
    export(resolve(folder), tmp_path / "one" / "out", results=RESULTS)
    export(resolve(tmp_path / "one" / "out"), tmp_path / "two" / "out")
    one, two = (
        {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
        for out in (tmp_path / "one" / "out", tmp_path / "two" / "out")
    )
    assert one == two
    assert {"plots/losses.png", "evaluation/results.json"} <= set(one)


def in_a_run(checkpoint: Path, tmp_path: Path) -> Path:
    """A run's folder around a checkpoint, with a report and an evaluation."""
    run = tmp_path / "run"
    (run / "report").mkdir(parents=True)
    (run / "evaluation").mkdir()
    (run / "train_state").mkdir()
    (run / "train_state" / "optimizer.safetensors").write_bytes(b"x")
    (run / "report" / "losses.png").write_bytes(b"png")
    (run / "report" / "report.html").write_bytes(b"page")
    (run / "evaluation" / "results.json").write_text('{"tasks": {"sums": {"columns": {"ar": {"pass@1": 0.5}}}}}')
    checkpoint.rename(run / "checkpoint")
    return run


def test_what_a_run_has_drawn_and_measured_goes_along_and_its_state_does_not(
    converted: Callable[..., Path], tmp_path: Path
) -> None:
    files = export(resolve(in_a_run(converted(), tmp_path)), tmp_path / "out")["files"]
    assert {"plots/losses.png", "evaluation/results.json"} <= set(files)
    assert not [name for name in files if "train" in name or "optimizer" in name or name.endswith(".html")]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "![losses](plots/losses.png)" in card
    assert "| ar | 50.0% |" in card


@pytest.mark.parametrize("shards", [1, 3])
def test_another_type_keeps_names_files_and_values(converted: Callable[..., Path], tmp_path: Path, shards: int) -> None:
    folder, out = converted("qwen3_moe", dtype="float32", shards=shards), tmp_path / "out"
    report = export(resolve(folder), out, dtype="bfloat16")
    assert report["rewritten"] == {"dtype": "bfloat16"}
    before, after = read_headers(folder), read_headers(out)
    assert {n: (t.shape, t.shard) for n, t in after.tensors.items()} == {
        n: (t.shape, t.shard) for n, t in before.tensors.items()
    }
    assert {t.dtype for t in after.tensors.values()} == {"BF16"}
    for name, tensor in tensors_of(folder).items():
        assert torch.equal(tensors_of(out)[name], tensor.bfloat16())
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert "weight files: dtype bfloat16" in (out / "README.md").read_text()
    if shards > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.bytes for t in after.tensors.values())


@pytest.mark.parametrize("shards", [1, 3])
def test_smaller_weight_files_hold_the_same_tensors(
    converted: Callable[..., Path], tmp_path: Path, shards: int
) -> None:
    folder, out = converted(shards=shards), tmp_path / "out"
    most = max(t.bytes for t in read_headers(folder).tensors.values())
    report = export(resolve(folder), out, max_shard_size=most)
    after = read_headers(out)
    assert after.indexed
    assert report["rewritten"] == {"shards": len(after.shards)}
    assert len(after.shards) > shards
    for shard in after.shards:
        assert sum(t.bytes for t in after.tensors.values() if t.shard == shard.name) <= most
        assert shard.metadata == {"format": "pt"}
    assert after.shards[0].name == f"model-00001-of-{len(after.shards):05d}.safetensors"
    assert all(torch.equal(tensors_of(out)[name], tensor) for name, tensor in tensors_of(folder).items())
    assert report["weights"] == json.loads((out / "provenance.json").read_text())["weights"]
    assert set(report["weights"]) == {shard.name for shard in after.shards}

    export(resolve(out), tmp_path / "whole", max_shard_size=10**9)
    assert not read_headers(tmp_path / "whole").indexed
    assert not (tmp_path / "whole" / "model.safetensors.index.json").exists()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_a_size_that_no_file_reaches_leaves_the_files_as_they_are(
    converted: Callable[..., Path], tmp_path: Path
) -> None:
    folder = converted()
    report = export(resolve(folder), tmp_path / "out", max_shard_size=10**9)
    assert report["rewritten"] == {}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("max_shard_size", [None, 20_000], ids=["copied", "rewritten"])
def test_bytes_that_go_wrong_on_the_way_leave_no_export(
    converted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_shard_size: int | None
) -> None:
    def careless_write(path: Path, *arguments: Any) -> None:
        write_shard(path, *arguments)
        flip_last_byte(path)

    def careless_copy(src: Path, dst: Path) -> None:
        copy(src, dst)
        flip_last_byte(dst)

    folder = converted()
    monkeypatch.setattr(reshard, "write_shard", careless_write)
    monkeypatch.setattr(exporting, "copy", careless_copy)
    with pytest.raises(UserError, match="did not arrive whole"):
        export(resolve(folder), tmp_path / "out", max_shard_size=max_shard_size)
    assert not (tmp_path / "out").exists()


def test_weights_of_a_folder_that_is_only_read_are_links(converted: Callable[..., Path], tmp_path: Path) -> None:
    folder = converted()
    report = export(resolve(folder), tmp_path / "out", as_links=True)
    weights = tmp_path / "out" / "model.safetensors"
    assert weights.is_symlink()
    assert weights.resolve() == (folder / "model.safetensors").resolve()
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == report["weights"]["model.safetensors"]["sha256"]
    assert [p.name for p in (tmp_path / "out").rglob("*") if p.is_symlink()] == ["model.safetensors"]


def test_the_licence_and_language_of_the_base_are_inherited(converted: Callable[..., Path], tmp_path: Path) -> None:
    report = export(resolve(converted()), tmp_path / "out")
    metadata = front_matter((tmp_path / "out" / "README.md").read_text())
    assert (metadata["license"], metadata["license_name"], metadata["language"]) == ("other", "tiny", ["en"])
    assert report["license"] == "other"
    assert (tmp_path / "out" / "LICENSE").read_text() == "Take it."
    assert (tmp_path / "out" / BASE_CARD).read_text() == CARD


def test_only_what_belongs_to_a_checkpoint_is_exported(converted: Callable[..., Path], tmp_path: Path) -> None:
    folder = converted()
    (folder / "train_state" / "step-1").mkdir(parents=True)
    (folder / "train_state" / "step-1" / "optimizer.pt").write_bytes(b"x")
    (folder / "training_args.bin").write_bytes(b"x")
    (folder / ".cache").mkdir()
    files = export(resolve(folder), tmp_path / "out")["files"]
    assert not [name for name in files if "train" in name or "optimizer" in name or name.startswith(".")]


def test_edits_that_undid_what_decoding_needs_are_put_right(converted: Callable[..., Path], tmp_path: Path) -> None:
    folder = converted()
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    export(resolve(folder), tmp_path / "out")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 1, "suppress_tokens": [60]}
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["mask_token"] == "<mask>"


def test_another_tokenizer_than_the_converted_one_is_refused(converted: Callable[..., Path], tmp_path: Path) -> None:
    folder = converted()
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"<mask>"', '"<other>"'))
    with pytest.raises(UserError, match="not the one"):
        export(resolve(folder), tmp_path / "out")


def test_what_is_not_converted_cannot_be_exported(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not converted"):
        export(resolve(tiny_checkpoint("mixtral")), tmp_path / "out")


def test_a_damaged_checkpoint_leaves_no_export(converted: Callable[..., Path], tmp_path: Path) -> None:
    folder = converted()
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(UserError, match="truncated"):
        export(resolve(folder), tmp_path / "work" / "out")
    assert not (tmp_path / "work").exists()


def test_an_existing_output_is_refused(converted: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export(resolve(converted()), tmp_path / "out")


run = partial(run_command, "export")


def test_the_command_takes_a_runs_folder_and_prints_one_json_document(
    converted: Callable[..., Path], tmp_path: Path
) -> None:
    folder = in_a_run(converted(), tmp_path)
    (tmp_path / "bench.json").write_text(json.dumps(RESULTS))
    ran = run(folder, "--out", tmp_path / "out", "--json", "--no-verify", "--results", tmp_path / "bench.json")
    assert ran.exit_code == 0, ran.output
    report = json.loads(ran.stdout)
    assert report["recipe"] is True
    assert report["verified"] is None
    assert {"zconvert_config.yaml", "README.md", "custom_generate/requirements.txt"} <= set(report["files"])
    assert "| lossless | 4.07 |" in (tmp_path / "out" / "README.md").read_text()


def test_the_commands_summary_goes_to_stdout(converted: Callable[..., Path], tmp_path: Path) -> None:
    ran = run(converted(), "--out", tmp_path / "out", "--no-verify", "--dtype", "float32", "--max-shard-size", "9KB")
    assert ran.exit_code == 0, ran.output
    assert f"Wrote {tmp_path / 'out'}" in ran.stdout
    assert "not trained yet" in ran.stdout
    assert {t.dtype for t in read_headers(tmp_path / "out").tensors.values()} == {"F32"}
    assert len(read_headers(tmp_path / "out").shards) > 2
    assert run(tmp_path / "converted", "--out", tmp_path / "out").exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one of them"),
        (("--out", "a", "--hub", "org/a"), "--out and --hub were given"),
        (("--out", "a", "--check", "vllm"), "--out and --check were given"),
        (("--hub", "name"), "no repository"),
        (("--hub", "org/a", "--revision", "b", "--create-pr"), "against main"),
        (("--hub", "org/a", "--merge-to-ar"), "say which with --out"),
        (("--out", "a", "--merge-to-ar", "--dtype", "bfloat16"), "nothing is exported with"),
        (("--check", "vllm", "--results", "a"), "nothing is exported with"),
        (("--out", "a", "--private"), "it goes with --hub"),
        (("--out", "a", "--dry-run"), "it goes with --hub"),
        (("--out", "a", "--max-shard-size", "5"), "no size"),
        (("--out", "a", "--max-shard-size", "0GB"), "no size"),
        (("--check", "ollama"), "'transformers', 'vllm', 'sglang', 'llama.cpp'"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_read(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    ran = run(tmp_path / "none", *arguments)
    assert ran.exit_code == 2
    assert message in " ".join(ran.output.replace("│", " ").split())
