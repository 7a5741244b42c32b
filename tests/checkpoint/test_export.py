"""An export runs without zconvert, is a plain model without trust, and says where it comes from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

import zconvert
from tests.checkpoint.tiny import MODEL_TYPES
from zconvert.checkpoint.card import inherited_metadata, model_card
from zconvert.checkpoint.export import REQUIREMENTS, export
from zconvert.checkpoint.folder import BASE_CARD
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.headers import read_headers
from zconvert.checkpoint.source import resolve
from zconvert.cli import export as cli
from zconvert.cli.ui import handled
from zconvert.errors import UserError
from zconvert.tidar.settings import GatedParts, TidarSettings

Checkpoint = Callable[..., Path]
CARD = "---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\nlanguage: [en]\ntags: [x]\n---\n\n# Base\n"
RESULTS = {
    "device": "cpu",
    "results": {
        "ar": {"tokens_per_second": 100.0},
        "lossless": {"tokens_per_forward": 4.07, "tokens_per_second": 220.0, "speedup": 2.2},
    },
}
# Decodes greedily with and without the shipped code where zconvert cannot be imported, and prints what it saw.
OUTSIDE = """
import json, sys

class NoZconvert:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "zconvert":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoZconvert())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = sys.argv[1]
inputs = AutoTokenizer.from_pretrained(folder)("ten tall trees", return_tensors="pt")
ids = {}
for trust in (False, True):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust, dtype=torch.float32).eval()
    text = model.generate(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=20,
                          do_sample=False)
    ids[trust] = text[0].tolist()
shipped = getattr(model.generate, "func", None)
print(json.dumps({"plain": ids[False], "tidar": ids[True], "module": getattr(shipped, "__module__", None),
                  "zconvert": [m for m in sys.modules if m.split(".")[0] == "zconvert"]}))
"""


@pytest.fixture
def converted(tiny_checkpoint: Checkpoint, tmp_path: Path) -> Callable[..., Path]:
    def make(model_type: str = "mixtral", **options: Any) -> Path:
        source = tiny_checkpoint(model_type, **options)
        (source / "README.md").write_text(CARD)
        (source / "LICENSE").write_text("Take it.")
        convert_init(resolve(source), tmp_path / "converted", block_size=4)
        return tmp_path / "converted"

    return make


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_export_decodes_by_tidar_where_zconvert_is_not_installed(
    converted: Callable[..., Path], tmp_path: Path, model_type: str
) -> None:
    export(resolve(converted(model_type, dtype="float32")), tmp_path / "out")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", OUTSIDE, str(tmp_path / "out")]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert ran.returncode == 0, ran.stderr
    seen = json.loads(ran.stdout.splitlines()[-1])
    assert seen["zconvert"] == []
    assert str(seen["module"]).startswith("transformers_modules.")
    assert seen["tidar"] == seen["plain"]


def test_the_shipped_code_is_the_packages_own_verbatim(converted: Callable[..., Path], tmp_path: Path) -> None:
    export(resolve(converted()), tmp_path / "out")
    package = Path(zconvert.__file__).parent / "tidar"
    shipped = tmp_path / "out" / "custom_generate"
    assert {p.name for p in shipped.iterdir()} == {p.name for p in package.glob("*.py")} | {"requirements.txt"}
    assert all((shipped / p.name).read_bytes() == p.read_bytes() for p in package.glob("*.py"))
    assert (shipped / "requirements.txt").read_text().split() == list(REQUIREMENTS)


def test_the_shipped_requirements_are_the_projects_own() -> None:
    project = tomllib.loads((Path(zconvert.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert set(REQUIREMENTS) <= set(project["dependencies"])


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
    export(resolve(converted()), tmp_path / "out", recipe_text="max_steps: 5\n", results=RESULTS)
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert provenance["base_model"] == "mixtral"
    assert provenance["tool"] == {"name": "zconvert", "version": zconvert.__version__}
    assert provenance["libraries"]["transformers"]
    assert provenance["results"] == RESULTS
    assert (tmp_path / "out" / "zconvert_config.yaml").read_text() == "max_steps: 5\n"


def test_the_licence_and_language_of_the_base_are_inherited(converted: Callable[..., Path], tmp_path: Path) -> None:
    report = export(resolve(converted()), tmp_path / "out")
    metadata = front_matter((tmp_path / "out" / "README.md").read_text())
    assert (metadata["license"], metadata["license_name"], metadata["language"]) == ("other", "tiny", ["en"])
    assert report["license"] == "other"
    assert (tmp_path / "out" / "LICENSE").read_text() == "Take it."
    assert (tmp_path / "out" / BASE_CARD).read_text() == CARD


def test_a_licence_is_recognised_by_its_text_where_no_card_names_it(tmp_path: Path) -> None:
    assert inherited_metadata(tmp_path) == {}
    (tmp_path / "LICENSE").write_text("MIT License\n\nPermission is granted, without restriction")
    assert inherited_metadata(tmp_path) == {"license": "mit"}
    (tmp_path / "LICENSE").write_text("   Apache License\n   Version 2.0, January 2004\n")
    assert inherited_metadata(tmp_path) == {"license": "apache-2.0"}
    (tmp_path / BASE_CARD).write_text("---\nlicense: cc-by-4.0\n---\n")
    assert inherited_metadata(tmp_path) == {"license": "cc-by-4.0"}
    (tmp_path / BASE_CARD).write_text("---\n: {[\n---\n")
    assert inherited_metadata(tmp_path) == {"license": "apache-2.0"}


def card(settings: TidarSettings, **options: Any) -> str:
    defaults: dict[str, Any] = {"inherited": {}, "has_recipe": False, "config": {"model_type": "mixtral"}}
    return model_card(name="tiny", settings=settings, **{**defaults, **options})


def test_the_card_links_a_base_of_the_hub_and_only_names_a_local_one() -> None:
    settings = TidarSettings(4, 60, base_model="org/name", base_revision="abc")
    metadata = front_matter(card(settings))
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("org/name", "finetune")
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("transformers", "text-generation")
    assert "https://huggingface.co/org/name) at commit `abc`" in card(settings)
    assert "base_model" not in front_matter(card(dataclasses.replace(settings, base_model="name")))


def test_the_card_never_claims_what_was_not_measured() -> None:
    settings = TidarSettings(4, 60, base_model="org/name")
    bare = card(settings)
    assert "Nothing was measured" in bare
    assert "Not trained yet" in bare
    assert "It is not known from its files" in bare
    measured = card(dataclasses.replace(settings, stages=("midtrain",)), results=RESULTS)
    assert "| lossless | 4.07 | 220.0 | 2.20× |" in measured
    assert "| ar | not measured | 100.0 | not measured |" in measured
    assert "Not trained yet" not in measured
    assert "midtrain" in measured


def test_the_card_of_a_gated_checkpoint_promises_the_base_models_own_text_and_no_other_does() -> None:
    settings = TidarSettings(4, 60, base_model="org/name", stages=("midtrain",))
    gated = dataclasses.replace(settings, mask_token="", mask_token_source="virtual", mode="gated", gated=GatedParts())
    for text in ("byte for byte", "bit for bit", "whose weights nothing has moved", "none in the vocabulary"):
        assert text in card(gated)
        assert text not in card(settings)
    assert "not\nlossless with respect to the base model" in card(settings)
    assert "lossless with respect" not in card(gated)
    assert "suppresses it" not in card(gated)
    named = dataclasses.replace(gated, mask_token="<gap>", mask_token_source="spare_row")
    assert "Never let it emit the mask token `<gap>` (id 60)" in card(named)


@pytest.mark.parametrize("results", [{}, {"results": {}}, {"results": {"ar": 3}}, {"results": 3}])
def test_results_that_are_none_of_bench_are_a_users_error(results: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="not those of a bench run"):
        card(TidarSettings(4, 60), results=results)


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


@pytest.fixture
def run() -> Callable[..., Any]:
    """Runs `export` with these arguments."""
    app = typer.Typer()
    app.command()(handled(cli.command))
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_command_takes_a_runs_folder_and_its_recipe_and_prints_one_json_document(
    converted: Callable[..., Path], tmp_path: Path, run: Callable[..., Any]
) -> None:
    (tmp_path / "run").mkdir()
    converted().rename(tmp_path / "run" / "checkpoint")
    (tmp_path / "run" / "recipe.yaml").write_text("max_steps: 5\n")
    (tmp_path / "bench.json").write_text(json.dumps(RESULTS))
    ran = run(tmp_path / "run", "--out", tmp_path / "out", "--json", "--results", tmp_path / "bench.json")
    assert ran.exit_code == 0, ran.output
    report = json.loads(ran.stdout)
    assert report["recipe"] is True
    assert {"zconvert_config.yaml", "README.md", "custom_generate/requirements.txt"} <= set(report["files"])
    assert "| lossless | 4.07 |" in (tmp_path / "out" / "README.md").read_text()


def test_the_commands_summary_goes_to_stdout(
    converted: Callable[..., Path], tmp_path: Path, run: Callable[..., Any]
) -> None:
    ran = run(converted(), "--out", tmp_path / "out")
    assert ran.exit_code == 0, ran.output
    assert f"Wrote {tmp_path / 'out'}" in ran.stdout
    assert "not trained yet" in ran.stdout
    assert run(tmp_path / "converted", "--out", tmp_path / "out").exit_code == 1
