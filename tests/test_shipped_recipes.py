"""The recipes that are shipped: each is valid, goes through on a tiny model of its family, and can be copied."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.checkpoint.tiny import make_checkpoint
from tests.planning.models import GPT_OSS_20B, MIXTRAL, QWEN3_30B, ZAYA_8B, facts
from tests.small_recipes import made_small
from zconvert.cli.main import app
from zconvert.cli.recipes import folders
from zconvert.planning.machines import MACHINES
from zconvert.planning.plan import plan_stage
from zconvert.planning.workload import workload_of
from zconvert.recipe import BY_STAGE, ConvertInitRecipe, TrainingRecipe, load_pipeline, load_recipe
from zconvert.recipe.pipeline import STAGES
from zconvert.tidar.settings import GatedParts

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
FAMILY = {
    **{"quickstart": "zaya", "quickstart-gated": "zaya", "zaya1-8b": "zaya"},
    **{"qwen3-30b-a3b": "qwen3_moe", "mixtral-8x7b": "mixtral", "gpt-oss-20b": "gpt_oss"},
}
FILES = sorted(RECIPES.glob("*/*.yaml"))
PIPELINES = [path for path in FILES if path.stem.startswith("pipeline")]
AT_SIZE = {
    **{"zaya1-8b": ZAYA_8B, "qwen3-30b-a3b": QWEN3_30B, "mixtral-8x7b": MIXTRAL},
    "gpt-oss-20b": GPT_OSS_20B | {"sliding_window": 128},
}
PLANNED = [path for path in FILES if path.parent.name in AT_SIZE and "tokens/s" in path.read_text()]
PLANNED_GATED = [RECIPES / name / "midtrain-gated.yaml" for name in AT_SIZE if name != "mixtral-8x7b"]


def stage_of(path: Path) -> str:
    return path.stem.removesuffix("-gated")


def named(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_every_folder_of_recipes_has_a_pipeline_and_a_family_here() -> None:
    assert {folder.name for folder in folders()} == {path.parent.name for path in FILES} == set(FAMILY)


@pytest.mark.parametrize("path", FILES, ids=named)
def test_a_shipped_recipe_is_valid(path: Path) -> None:
    if stage_of(path) == "pipeline":
        load_pipeline(path)
    else:
        load_recipe(path, BY_STAGE[stage_of(path)])


@pytest.mark.parametrize("path", FILES, ids=named)
def test_a_shipped_recipe_names_its_own_command_and_folder(path: Path) -> None:
    command = "run" if stage_of(path) == "pipeline" else stage_of(path)
    assert f"#   zconvert {command} recipes/{path.parent.name}/{path.name}" in path.read_text()
    assert all(len(line) <= 120 for line in path.read_text().splitlines())


@pytest.mark.parametrize("path", [*PLANNED, *PLANNED_GATED], ids=named)
def test_a_shipped_recipe_says_of_memory_and_time_what_the_planner_says(path: Path) -> None:
    said = " ".join(line[2:] for line in path.read_text().splitlines() if line.startswith("# "))
    model = facts(FAMILY[path.parent.name], AT_SIZE[path.parent.name])
    recipe = load_recipe(path, BY_STAGE[stage_of(path)])
    assert isinstance(recipe, TrainingRecipe)
    gated, gpus = None, 1
    if path in PLANNED_GATED:
        first = load_recipe(path.with_name("convert-init-gated.yaml"), ConvertInitRecipe)
        gated = GatedParts(**first.diffusion.gated.model_dump())
    else:
        gpus = int(re.findall(r"(\d+) GPUs of 80 GB", said)[0])
    stage = plan_stage(model, workload_of(recipe, 16, gated), MACHINES["h100-80gb"], gpus, None)
    assert stage.cost is not None
    if gated is None:
        assert f"Together {stage.memory.total / 1e9:.0f} of the 74 GB" in said
        assert f"{round(stage.time.tokens_per_second, -3):,.0f} tokens/s" in said
    else:
        assert f"says {stage.memory.total / 1e9:.1f} GB" in said
        assert f" {model.gated_parameters(gated) / 1e6:.0f} M gated weights" in said
        assert f"Time by the same plan: {24 * stage.cost.days:.1f} hours for the 98 M tokens" in said


@pytest.mark.parametrize("path", PIPELINES, ids=named)
def test_a_shipped_pipeline_goes_through_on_a_tiny_model_of_its_family(path: Path, tmp_path: Path) -> None:
    family = FAMILY[path.parent.name]
    base = str(make_checkpoint(tmp_path / "source", family, mask_token="<mask>" in recipe_text(path)))
    text = "the cat sat on the mat and seven men sing to the old stone. "
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text * n}) + "\n" for n in (1, 2, 4, 6)))
    names: dict[str, Any] = yaml.safe_load(path.read_text())
    recipes = dict(load_pipeline(path))
    said = [{"role": "user", "content": "the old cat"}, {"role": "assistant", "content": "sat on the mat"}]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": said}) + "\n") * 3)
    for stage in ("extend-context", "sft"):  # with these, named in there or not
        more = path.parent / f"{stage}.yaml"
        if more.exists() and "gated" not in path.stem:
            recipes[more] = load_recipe(more, BY_STAGE[stage])
            names[stage] = more.name
    for file, recipe in sorted(recipes.items(), key=lambda item: STAGES.index(item[1].stage)):
        settings = recipe.model_dump(mode="json") | {"base_model": base, "output_dir": str(tmp_path / recipe.stage)}
        settings = made_small(settings, text=tmp_path / "data.jsonl", chat=tmp_path / "chat.jsonl")
        (tmp_path / file.name).write_text(json.dumps(settings))
        base = settings["output_dir"]
    names["export"]["output_dir"] = str(tmp_path / "exported")
    (tmp_path / path.name).write_text(json.dumps(names))
    result = CliRunner().invoke(app, ["run", str(tmp_path / path.name)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "exported" / "custom_generate" / "generate.py").exists()
    assert (tmp_path / "midtrain" / "metrics.jsonl").read_text().count("\n") == 2


def recipe_text(pipeline: Path) -> str:
    return "".join(path.read_text() for path in pipeline.parent.glob("convert-init*.yaml"))


def test_recipes_are_listed_with_what_they_are_for() -> None:
    result = CliRunner().invoke(app, ["recipes", "list"])
    assert result.exit_code == 0
    for name in FAMILY:
        assert name in result.output
    assert "30.5 B parameters" in result.output


def test_copied_recipes_are_a_pipeline_of_their_own(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    result = CliRunner().invoke(app, ["recipes", "copy", "zaya1-8b", str(mine)])
    assert result.exit_code == 0
    assert {path.name for path in mine.iterdir()} == {path.name for path in (RECIPES / "zaya1-8b").iterdir()}
    assert len(load_pipeline(mine / "pipeline.yaml")) == 3
    assert CliRunner().invoke(app, ["recipes", "copy", "zaya1-8b", str(mine)]).exit_code == 1


def test_copied_recipes_name_what_was_copied_along_with_them(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    assert CliRunner().invoke(app, ["recipes", "copy", "mixtral-8x7b", str(mine)]).exit_code == 0
    recipe = load_recipe(mine / "sft.yaml", BY_STAGE["sft"])
    assert recipe.chat_template == str(mine / "chat.jinja")
    assert (mine / "chat.jinja").read_bytes() == (RECIPES / "mixtral-8x7b" / "chat.jinja").read_bytes()
    assert not [path.name for path in mine.iterdir() if "recipes/" in path.read_text()]


@pytest.mark.parametrize("name", FAMILY)
def test_a_copy_says_what_its_pipelines_read_that_is_not_there_yet(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # as who has only the wheel
    said = CliRunner().invoke(app, ["recipes", "copy", name, "mine"]).stderr
    for pipeline in Path("mine").glob("pipeline*.yaml"):
        (_, first), *others = load_pipeline(pipeline)
        needed = [dataset.path for _, recipe in others for dataset in recipe.datasets]  # type: ignore[attr-defined]
        needed += [first.base_model] * first.base_model.startswith("examples/")
        for path in needed:
            assert f"Not there yet: {path} (" in said
            Path(path).mkdir(parents=True, exist_ok=True)
    said = CliRunner().invoke(app, ["recipes", "copy", name, "again"]).stderr
    assert "zconvert run again/pipeline.yaml" in said
    assert "Not there yet" not in said


def test_what_is_said_to_be_next_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(app, ["recipes", "copy", "qwen3-30b-a3b", "my recipes"]).stderr
    commands = [shlex.split(line) for line in said.splitlines() if line.startswith("  ")]
    named = ["my recipes/pipeline.yaml", "my recipes/pipeline-gated.yaml"]
    assert commands == [["zconvert", "run", name] for name in named]
    assert all(load_pipeline(Path(name)) for name in named)


def test_a_name_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["recipes", "copy", "zaya", str(tmp_path / "x")])
    assert result.exit_code == 1
    assert "zaya1-8b" in result.output
