"""`zconvert doctor`: what is there, what is broken, and what mends it, whatever state the machine is in."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.loopback_hub import LoopbackHub, serve
from tests.checkpoint.pushed import TOKEN, Pushes
from zconvert import doctor

WRONG = "hf_" + "s" * 34
PROBED = {"broken": {}, "threads": 1, "cuda": None, "hip": None, "devices": []}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": "80", "PYTHONUTF8": "1", **environment}
    return subprocess.run(
        [sys.executable, "-m", "zconvert", "doctor", *arguments], capture_output=True, text=True, env=env
    )


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`examined(**changes of the probe)`: a document, without a process that imports torch."""

    def examine(**changes: Any) -> dict[str, Any]:
        monkeypatch.setattr(doctor, "_probe", lambda: {**PROBED, **changes})
        return doctor.examine()

    return examine


def fixes(document: dict[str, Any], *, required: bool) -> list[str]:
    return [problem["fix"] for problem in document["problems"] if problem["required"] is required]


def test_a_good_machine_is_told_with_versions_devices_hub_and_disk_and_exits_0() -> None:
    done = run("--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["ok"]
    versions = {package["name"]: package["version"] for package in document["packages"]}
    import torch

    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]  # a build may be named in one alone
    assert {"transformers", "safetensors", "datasets"} <= set(versions)
    assert document["machine"]["threads"] == 1  # OMP_NUM_THREADS of the tests
    assert document["hub"]["offline"] is True
    assert {place["role"] for place in document["disk"]} == {"cache", "here", "temporary"}
    assert all(place["bytes_free"] > 0 for place in document["disk"])


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ImportError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
        ("import os; os.abort()", "the process ended with code -6"),
    ],
)
def test_a_broken_torch_is_told_with_its_fix_and_exits_1(code: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(code)
    done = run(PYTHONPATH=os.pathsep.join([str(tmp_path), str(Path(doctor.__file__).parents[1])]))
    assert (done.returncode, done.stderr) == (1, "")
    assert re.findall("^Error: .*", done.stdout, re.MULTILINE) == [
        "Error: torch cannot be imported"
    ]  # not whatever imports it
    assert said in " ".join(done.stdout.split())
    assert "pip install --force-reinstall torch" in done.stdout
    assert "Traceback" not in done.stdout
    assert "Packages" in done.stdout  # the rest is told all the same
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_what_is_missing_or_too_old_is_required_with_the_line_that_installs_it(
    examined: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ["torch>=2.11", "rich>=99", "not-there>=1.5", 'not-there-either>=2; extra == "serve"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: wanted)
    document = examined(broken={"not_there": "ModuleNotFoundError: no"})  # told once
    assert not document["ok"]
    assert fixes(document, required=True) == ["pip install 'rich>=99'", "pip install 'not-there>=1.5'"]
    serving = next(extra for extra in document["extras"] if extra["name"] == "serve")
    assert (serving["complete"], serving["install"]) == (False, "pip install 'zconvert[serve]'")


def test_every_extra_is_told_with_what_it_is_for() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert set(doctor.EXTRAS) == set(project["optional-dependencies"]) - {"test", "dev"}


def hub_of(**environment: str) -> dict[str, Any]:
    """What a process with this environment finds of the Hub; its client reads that when it is imported."""
    code = "import json; from zconvert import doctor; print(json.dumps(doctor.hub_access()))"
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert not any(token in done.stdout + done.stderr for token in (TOKEN, WRONG))
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_the_hub_is_asked_whether_it_takes_the_token_which_is_never_shown(tmp_path: Path) -> None:
    with serve(LoopbackHub({}, pushes=Pushes(tmp_path))) as hub:
        environment = hub.environment(tmp_path / "home")
        none = hub_of(**environment)
        refused = hub_of(**{**environment, "HF_TOKEN": WRONG})
        valid = hub_of(**{**environment, "HF_TOKEN": TOKEN})
    assert (none["reachable"], none["token"]) == (True, "none")
    assert (refused["reachable"], refused["token"]) == (True, "refused")
    assert (valid["reachable"], valid["token"], valid["user"]) == (True, "valid", "me")


def test_no_network_is_a_finding_and_no_failure(examined: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told = hub_of(HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN="")
    assert (told["reachable"], told["token"]) == (False, "none")
    assert "refused" in told["error"]
    monkeypatch.setattr(doctor, "hub_access", lambda: told)
    document = examined()
    assert document["ok"]
    assert any("HF_HUB_OFFLINE" in fix for fix in fixes(document, required=False))


def test_offline_the_hub_is_asked_nothing() -> None:
    told = hub_of(HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1", HF_TOKEN=WRONG)
    assert (told["offline"], told["reachable"], told["error"], told["token"]) == (True, None, None, "unchecked")


def test_a_gpu_that_torch_is_not_built_for_is_told(
    examined: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '580.82, NVIDIA H200'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    document = examined()
    assert document["devices"]["driver"] == {"version": "580.82", "gpus": ["NVIDIA H200"]}
    assert any("pytorch.org" in fix for fix in fixes(document, required=False))
    assert any("update the driver" in fix for fix in fixes(examined(cuda="13.0"), required=False))
    gpu = {
        "name": "NVIDIA H200",
        "capability": "9.0",
        "bytes": 150e9,
        "bytes_free": 140e9,
        "works": True,
        "error": None,
    }
    assert fixes(examined(cuda="13.0", devices=[gpu]), required=False) == []
    lame = {**gpu, "works": False, "error": "no kernel image is available"}
    assert any("free it" in fix for fix in fixes(examined(cuda="13.0", devices=[lame]), required=False))


def test_more_threads_than_cores_little_space_and_a_file_for_a_folder_are_told(
    examined: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "export OMP_NUM_THREADS=" in fixes(examined(threads=4096), required=False)[0]
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    assert "set HF_HOME to another folder" in fixes(examined(), required=False)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    assert any("free some space" in fix for fix in fixes(examined(), required=False))
