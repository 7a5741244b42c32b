"""Exports do what they promise where only torch and transformers are: from a folder, the Hub, and in older versions."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.checkpoint.loopback_hub import LoopbackHub, serve
from tests.checkpoint.pushed import TOKEN, Pushes
from tests.checkpoint.test_old_transformers import CONFIGS
from tests.checkpoint.test_verify_export import trained_gated
from tests.environments import HERE, make_environment, run_in
from zconvert.checkpoint.export import export
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.source import resolve
from zconvert.tidar.settings import GATED_FILE

QUICKSTART = Path(__file__).parents[2] / "examples" / "tiny-zaya" / "checkpoint"

# Greedy texts of a checkpoint with its code and without, where it says how it is run.
GENERATE = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM

name, prompts, options = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
answer = {"version": transformers.__version__, "zconvert": "yes"}
try:
    import zconvert
except ImportError:
    answer["zconvert"] = "no"
for trust in options.pop("trust", [False, True]):
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=trust, dtype=torch.float32, **options).eval()
    answer["tidar" if trust else "plain"] = [
        model.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p), dtype=torch.long), max_new_tokens=24,
                       do_sample=False)[0].tolist()
        for p in prompts
    ]
layout = model.__dict__.get("_tidar_layout_model")
if layout is not None and layout.gated is not None:
    answer["gated"] = sum(float(p.abs().sum()) for p in layout.gated.parameters())
answer["module"] = getattr(getattr(model.generate, "func", None), "__module__", None)
print(json.dumps(answer))
"""
PUSH = """
import json, sys
from pathlib import Path
from zconvert.checkpoint.push import push
from zconvert.checkpoint.push_plan import Target
print(json.dumps(push(Path(sys.argv[1]), Target(sys.argv[2], private=True)).to_dict()))
"""
PROMPTS = [[2, 7, 11, 30, 9], [2, 20]]


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with torch and transformers as they are here, and nothing else."""
    return make_environment(tmp_path_factory.mktemp("bare") / "venv")


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the quickstart's model, converted and not trained further: its text is real, its drafts are not."""
    folder = tmp_path_factory.mktemp("quickstart")
    convert_init(resolve(QUICKSTART), folder / "init", block_size=8)
    export(resolve(folder / "init"), folder / "name")
    return folder / "name"


def test_the_quickstarts_model_runs_where_zconvert_is_not_installed(
    bare_python: Path, quickstart: Path, tmp_path: Path
) -> None:
    answer = run_in(bare_python, GENERATE, quickstart, json.dumps(PROMPTS), "{}", home=tmp_path)
    assert answer["zconvert"] == "no"
    assert answer["version"] == importlib.metadata.version("transformers")
    assert answer["module"].startswith("transformers_modules.")
    assert answer["tidar"] == answer["plain"]
    assert all(len(text) > len(prompt) for text, prompt in zip(answer["plain"], PROMPTS, strict=True))


@pytest.mark.parametrize("mode", ["full", "gated"])
def test_an_export_is_pushed_and_runs_from_the_hub_where_zconvert_is_not_installed(
    bare_python: Path, quickstart: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path, mode: str
) -> None:
    exports = [quickstart]
    if mode == "gated":
        exports = [tmp_path / "0" / "name", tmp_path / "1" / "name"]
        for seed, out in enumerate(exports):
            export(trained_gated(tiny_checkpoint("mixtral"), out.parent, seed), out)
    (tmp_path / "hub").mkdir()
    with serve(LoopbackHub({}, pushes=Pushes(tmp_path / "hub"))) as hub:
        environment = {**hub.environment(tmp_path), "HF_TOKEN": TOKEN}
        environment.pop("HF_HOME")
        environment["PYTHONPATH"] = package_path()
        first, *_ = [run_in(HERE, PUSH, made, "org/name", home=tmp_path, **environment) for made in exports]
        assert hub.pushes is not None
        assert hub.pushes.repositories["org/name"].private
        del environment["PYTHONPATH"]
        options = json.dumps({"revision": first["commit"]})
        (tmp_path / "elsewhere").mkdir()
        answer = run_in(
            bare_python, GENERATE, "org/name", json.dumps(PROMPTS), options, home=tmp_path / "elsewhere", **environment
        )
    assert answer["zconvert"] == "no"
    assert answer["tidar"] == answer["plain"]
    assert answer["module"].startswith("transformers_modules.")
    if mode == "gated":  # of the commit that was asked for
        pushed = sum(float(tensor.abs().sum()) for tensor in load_file(exports[0] / GATED_FILE).values())
        assert answer["gated"] == pytest.approx(pushed, rel=1e-4)


def package_path() -> str:
    import zconvert

    return str(Path(zconvert.__file__).parents[1])


@pytest.mark.slow
def test_the_oldest_transformers_that_is_asked_for_runs_it_too(quickstart: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "venv", "5.17.*")
    answer = run_in(python, GENERATE, quickstart, json.dumps(PROMPTS), "{}", home=tmp_path)
    assert answer["version"].startswith("5.17.")
    assert answer["zconvert"] == "no"
    assert answer["tidar"] == answer["plain"]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", CONFIGS)
def test_transformers_4_57_runs_an_export_as_the_plain_model_that_it_also_is(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, python_of_4_57: Path, model_type: str
) -> None:
    source = tiny_checkpoint(model_type, dtype="float32")
    (source / "config.json").write_text(json.dumps(CONFIGS[model_type], indent=2) + "\n")
    convert_init(resolve(source), tmp_path / "converted", block_size=4)
    export(resolve(tmp_path / "converted"), tmp_path / "name")

    def texts(python: Path | str, *trust: bool) -> Any:
        options = json.dumps({"trust": trust})
        return run_in(python, GENERATE, tmp_path / "name", json.dumps(PROMPTS), options, home=tmp_path)

    old, new = texts(python_of_4_57, False, True), texts(HERE, False)
    assert old["version"].startswith("4.57.")
    assert old["module"] is None  # its own generate, with trust too
    assert old["plain"] == old["tidar"] == new["plain"]
