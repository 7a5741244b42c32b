"""`zconvert plan`: sentences first, tables at 80 columns, one JSON document, and clear refusals."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.loopback_hub import LoopbackHub, serve
from tests.checkpoint.sparse import meta_shapes, one_by_one, write_sparse
from tests.checkpoint.tiny import make_checkpoint
from tests.commands import run_command
from tests.planning.models import QWEN3_30B, ZAYA_8B
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.source import resolve
from zconvert.cli import plan
from zconvert.planning.calibrate import Calibrated
from zconvert.planning.decoding import Calibration
from zconvert.planning.from_config import shapes_from_config
from zconvert.planning.heatmap import colour_of
from zconvert.planning.machines import MACHINES
from zconvert.planning.plan import CONTEXTS, count_of
from zconvert.planning.step_time import row_flops
from zconvert.planning.target import find_target
from zconvert.tidar.settings import GatedParts

ZAYA = {"model_type": "zaya", **ZAYA_8B}
QWEN = {"model_type": "qwen3_moe", **QWEN3_30B}
RECIPE = """\
base_model: {base}
output_dir: out
datasets: [{{path: data.jsonl}}]
sequence_len: 256
micro_batch_size: 3
max_steps: 1000
dtype: bfloat16
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "zaya-8b" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(ZAYA))
    return path


run = partial(run_command, "plan")


def document(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_plain_words_stand_on_top_and_all_fits_80_columns(config: Path) -> None:
    result = run(
        config, "--gpus", 64, "--tokens", "600B", "--sequence-len", 32_768, "--explain", "batch=8,context=4096"
    )
    assert result.exit_code == 0
    first, second, third, *_ = result.stdout.split("\n")
    assert first.startswith("Fits on 64 × h100-80gb with FSDP 64")
    assert second.startswith("600 B tokens take about ")
    assert third.startswith("Decoding pays ")
    assert max(map(len, result.stdout.split("\n"))) <= 80
    assert "8.84 B parameters, 1.29 B active, 1 of 16 experts (from config.json)" in result.stdout
    assert "experts of a layer are read instead of" in " ".join(result.stdout.split())


def test_json_has_memory_time_and_the_map(config: Path) -> None:
    told = document(config, "--gpus", 8, "--tokens", "1B", "--batch", "8,1", "--context", "1024")
    memory = told["memory"]
    parts = {"parameters", "gradients", "optimizer", "activations", "packed_sequence", "loss_chunk", "communication"}
    assert {f"{part}_gb" for part in parts} | {"total_gb_per_gpu", "usable_gb_per_gpu"} == {*memory}
    assert memory["total_gb_per_gpu"] == pytest.approx(sum(memory[f"{part}_gb"] for part in parts))
    assert told["time"]["days"] == pytest.approx(told["time"]["gpu_hours"] / 8 / 24)
    assert [(c["batch_size"], c["context"], c["mode"]) for c in told["speedup"]] == [
        (1, 1024, "single"),
        (1, 1024, "two"),
        (8, 1024, "single"),
        (8, 1024, "two"),
    ]
    assert all(c["speedup"] > 0 and c["break_even_accepted"] > 0 for c in told["speedup"])
    assert told["model"]["parameters"] == 8_840_489_464
    assert told["stages"][0]["rejected"]


def test_a_checkpoint_and_its_config_alone_tell_the_same(tmp_path: Path) -> None:
    folder = write_sparse(tmp_path / "zaya", shapes_from_config(ZAYA), ZAYA, shards=3)
    by_headers, by_config = document(folder), document(folder / "config.json")
    assert (by_headers["model"].pop("source"), by_config["model"].pop("source")) == ("headers", "config.json")
    assert by_headers == by_config
    assert document(config_alone(tmp_path, ZAYA))["memory"] == by_headers["memory"]


def config_alone(tmp_path: Path, config: dict[str, Any]) -> Path:
    folder = tmp_path / "alone"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_small_model_has_figures_above_nought_and_time_in_seconds(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "qwen3_moe")
    convert_init(resolve(source), tmp_path / "init", block_size=8, gated=GatedParts(rank=4))
    (tmp_path / "midtrain.yaml").write_text(RECIPE.format(base=tmp_path / "init"))
    shown = run(tmp_path / "midtrain.yaml", "--gpu", "cpu", "--efficiency", 0.3).stdout
    assert not re.search(r"total +│ +0\.0+ of|: 0(\.0+)? of", shown)
    assert re.search(r"time +│ +\d+ seconds", shown)


def test_how_long_a_cpu_trains_is_unknown_until_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert_init(resolve(make_checkpoint(tmp_path / "source", "qwen3_moe")), tmp_path / "init", block_size=8)
    (tmp_path / "midtrain.yaml").write_text(RECIPE.format(base=tmp_path / "init").replace("bfloat16", "float32"))
    arguments = (tmp_path / "midtrain.yaml", "--gpu", "cpu")
    told = document(*arguments)
    time = told["stages"][0]["time"]
    assert told["gpus"] == 1
    assert [time[key] for key in ("step_seconds", "tokens_per_second", "parts_seconds")] == [None] * 3
    assert told["time"] == {"days": None, "gpu_hours": None, "dollars": None}
    assert "How long training takes is unknown: --calibrate measures it" in run(*arguments).stdout

    here = MACHINES["cpu"].model_copy(update={"fp32_tflops": 0.1, "training_efficiency": 0.5, "name": "this CPU"})
    asked: list[Any] = []

    def measured(*_: Any, work: Any, **__: Any) -> Calibrated:
        asked.append(work)
        return Calibrated(here, Calibration(0.0, 1e-3, 0.0, 0.0, 0.0), (), ())

    monkeypatch.setattr("zconvert.planning.calibrate.calibrate", measured)
    told = document(*arguments, "--calibrate")
    assert (asked[0].micro_batch_size, asked[0].sequence_len) == (3, 256)
    facts = find_target(str(tmp_path / "init")).facts
    flops = 3 * row_flops(facts, asked[0])
    assert told["stages"][0]["time"]["parts_seconds"]["compute"] == pytest.approx(flops / 0.05e12)
    assert told["time"]["days"] == pytest.approx(1000 * told["stages"][0]["time"]["step_seconds"] / 86400)


def test_a_recipe_names_the_stage_and_may_name_the_checkpoint(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "qwen3_moe")
    convert_init(resolve(source), tmp_path / "init", block_size=8, gated=GatedParts(rank=4))
    recipe = tmp_path / "midtrain.yaml"
    recipe.write_text(RECIPE.format(base=tmp_path / "init"))
    told = document(recipe, "--gpus", 1)
    assert told == document(tmp_path / "init", recipe, "--gpus", 1)
    stage = told["stages"][0]
    assert (stage["stage"], stage["mode"], stage["sequence_len"], stage["micro_batch_size"]) == (
        "midtrain",
        "gated",
        256,
        3,
    )
    assert (stage["time"]["steps"], stage["time"]["tokens"]) == (1000, 1000 * 3 * 256)
    assert stage["gated"]["rank"] == 4, "its own parts, not the default ones"
    trained = count_of(stage["trained_parameters"])
    shown = " ".join(run(recipe, "--gpus", 1).stdout.split())
    assert f"Beside the frozen source {trained} weights are trained: low rank 4, diffusion expert of 384" in shown
    assert told["acceptance"]["block_size"] == 8
    assert len(document(tmp_path / "init", recipe, recipe)["stages"]) == 2
    full = document(recipe, "--mode", "full")
    assert (full["stages"][0]["mode"], full["stages"][0]["gated"]) == ("full", None)
    assert full["stages"][0]["trained_parameters"] == full["model"]["parameters"]


def test_a_pipeline_is_planned_as_its_recipes_convert_and_train(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "qwen3_moe")
    gated = {"mode": "gated", "block_size": 8, "gated": {"rank": 4}}
    init = {"base_model": str(source), "output_dir": str(tmp_path / "init"), "diffusion": gated}
    (tmp_path / "convert-init.yaml").write_text(json.dumps(init))
    (tmp_path / "midtrain.yaml").write_text(RECIPE.format(base=tmp_path / "init"))
    names = {"convert-init": "convert-init.yaml", "midtrain": "midtrain.yaml"}
    (tmp_path / "pipeline.yaml").write_text(json.dumps(names))
    told = document(tmp_path / "pipeline.yaml", "--gpus", 1)
    assert told == document(tmp_path / "convert-init.yaml", tmp_path / "midtrain.yaml", "--gpus", 1)
    convert_init(resolve(source), tmp_path / "init", block_size=8, gated=GatedParts(rank=4))
    made = document(tmp_path / "init", tmp_path / "midtrain.yaml", "--gpus", 1)
    assert told["stages"] == made["stages"]
    assert told["acceptance"] == made["acceptance"]


def test_a_plan_says_where_it_assumes_that_every_weight_is_trained(tmp_path: Path) -> None:
    source, recipe = make_checkpoint(tmp_path / "source", "qwen3_moe"), tmp_path / "midtrain.yaml"
    recipe.write_text(RECIPE.format(base=tmp_path / "init"))
    assert "all, it is assumed" in document(source, recipe)["summary"][-1]
    (tmp_path / "convert-init.yaml").write_text(f"base_model: {source}\noutput_dir: {tmp_path / 'init'}\n")
    for known in ([source, recipe, "--mode", "full"], [tmp_path / "convert-init.yaml", recipe], [source]):
        assert "assumed" not in str(document(*known)["summary"])


def test_a_recipe_whose_base_is_not_made_yet_says_what_makes_it(tmp_path: Path) -> None:
    (tmp_path / "midtrain.yaml").write_text(RECIPE.format(base=tmp_path / "init"))
    said = " ".join(run(tmp_path / "midtrain.yaml").stderr.split())
    assert f"base_model of the recipe: {tmp_path / 'init'}: no such folder" in said
    assert "run the stage first that makes it" in said


def test_the_map_ends_where_the_models_context_does(tmp_path: Path) -> None:
    def contexts(positions: int, *options: object) -> set[int]:
        told = document(
            config_alone(tmp_path / str(positions), {**ZAYA, "max_position_embeddings": positions}), *options
        )
        return {cell["context"] for cell in told["speedup"]}

    assert contexts(131_072) == set(CONTEXTS)
    assert contexts(20_000) == {1024, 4096, 16_384}
    assert contexts(512) == {512}
    assert contexts(511, "--context", "4096") == {4096}


def test_the_heat_map_is_one_html_file_that_needs_nothing_else(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "map.html"
    told = json.loads(run(config, "--json", "--heatmap", path, "--batch", "1,8", "--context", "1024,4096").stdout)
    page = path.read_text()
    for cell in told["speedup"]:
        assert f">{cell['speedup']:.2f}×</td>" in page
    assert page.count("<td") == 8
    # Green where it pays, red where it loses.
    assert colour_of(1.0) == "#ffffff"
    for speedup, (most, least) in ((3.0, (1, 0)), (0.3, (0, 1))):
        channels = [int(colour_of(speedup)[place : place + 2], 16) for place in (1, 3, 5)]
        assert channels[most] > channels[least]
    assert told["summary"][0] in page
    assert "http" not in page
    assert "<script" not in page


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--gpu", "h1000"], 1, "no machine is called h1000"),
        (["--gpus", "0"], 2, "--gpus"),
        (["--gpus", "-4"], 2, "--gpus"),
        (["--tokens", "0"], 2, "no number of tokens"),
        (["--tokens", "many"], 2, "no number of tokens"),
        (["--sequence-len", "0"], 2, "--sequence-len"),
        (["--batch", "0,4"], 2, "no list of whole numbers"),
        (["--explain", "batch=8"], 2, "batch=8,context=32768"),
        (["--accepted", "20"], 1, "cannot be"),
        (["--source-bits", "4"], 2, "--mode gated"),
        (["--price", "-1"], 2, "--price"),
        (["--heatmap", "map.png"], 2, "does not end in .html"),
        (["--proposals", "40", "--block-size", "16"], 2, "no list of accepted counts"),
    ],
)
def test_wrong_values_are_refused_in_words(config: Path, arguments: list[str], code: int, told: str) -> None:
    result = run(config, *arguments)
    assert result.exit_code == code
    assert told in " ".join(result.stderr.split()).replace(" │ │ ", " ")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "jamba"}, "Mamba layers"),
        ({"model_type": "unheard_of"}, "not in the family table"),
        ({"hidden_size": 0}, "config.json does not say hidden_size"),
    ],
)
def test_models_that_cannot_be_converted_or_counted_are_refused(
    config: Path, changes: dict[str, Any], told: str
) -> None:
    config.write_text(json.dumps(ZAYA | changes))
    result = run(config)
    assert result.exit_code == 1
    assert told in " ".join(result.stderr.split())


def planned(*arguments: object, environment: dict[str, str]) -> tuple[dict[str, Any], set[str]]:
    """Runs the command in a fresh interpreter; its document, and what it imported."""
    code = (
        "import sys\nfrom zconvert.cli.main import app\n"
        f"try: app({['plan', *map(str, arguments), '--json']!r})\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout), {*done.stderr.split()}


def test_a_hundred_shards_over_http_or_on_disk_load_no_torch_and_no_weights(tmp_path: Path) -> None:
    shapes = dict(one_by_one(shapes_from_config(QWEN)))
    folder = write_sparse(tmp_path / "qwen", shapes, QWEN, shards=110)
    with serve(LoopbackHub({"org/qwen": folder})) as hub:
        for target, source in ((folder, "headers"), ("org/qwen", "config.json")):
            told, loaded = planned(target, environment=hub.environment(tmp_path / "home"))
            assert (told["model"]["parameters"], told["model"]["source"]) == (30_532_122_624, source)
            assert not {"torch", "transformers", "accelerate", "numpy"} & loaded
        assert not any(name.endswith(".safetensors") for name in hub.sent)


def test_families_whose_config_does_not_say_it_all_are_read_by_headers_over_http(tmp_path: Path) -> None:
    shapes, config = meta_shapes("lfm2_moe", num_hidden_layers=2, layer_types=["conv", "full_attention"])
    folder = write_sparse(tmp_path / "lfm", shapes, config, shards=3)
    with serve(LoopbackHub({"org/lfm": folder})) as hub:
        told, _ = planned("org/lfm", environment=hub.environment(tmp_path / "home"))
    assert told["model"] == planned(folder, environment={})[0]["model"] | {"name": "org/lfm"}
    assert told["model"]["source"] == "headers"


def test_a_frozen_source_is_counted_as_training_holds_it_and_can_be_packed(config: Path) -> None:
    """As it is stored, where the forward pass is in bfloat16, unless packed."""
    sizes = [
        document(config, "--mode", "gated", "--gpus", 1, *more)["memory"]["parameters_gb"]
        for more in ((), ("--source-bits", 32), ("--source-bits", 16), ("--source-bits", 4))
    ]
    assert sizes[0] == pytest.approx(sizes[2], rel=0.01)
    assert sizes[1] - sizes[2] == pytest.approx(2 * 8.84, rel=0.01)
    assert sizes[3] < 0.4 * sizes[2]


def test_help_names_every_machine() -> None:
    assert tuple(MACHINES) == plan.GPUS
