"""What this machine has of what zconvert needs: versions, devices, the Hub, the disk. Loads no torch itself."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zconvert import __version__

EXTRAS = {
    "quantization": "the frozen source of gated training in 4 or 8 bits",
    "8bit": "optimizer: adamw_8bit",
    "serve": "zconvert serve",
    "report": "figures: zconvert report, bench --plot, the report of evaluate",
    "math": "evaluate: symbolic maths, as in MATH-500",
    "lm-eval": "zconvert lm-eval",
    "tensorboard": "trackers: [tensorboard]",
    "wandb": "trackers: [wandb]",
    "trackio": "trackers: [trackio]",
}
"""extras of pyproject.toml that users may want → what for"""

IMPORTED = ("torch", "accelerate", "safetensors.torch", "tokenizers", "huggingface_hub", "transformers", "datasets")
"""what is imported, to see whether it works; a package that is there need not"""

LITTLE_SPACE = 5_000_000_000
"""bytes; a checkpoint that is worth converting is larger"""
HUB_SECONDS = 5.0
PROBE_SECONDS = 180.0

Document = dict[str, Any]


def examine() -> Document:
    """Looks at everything; asks the Hub one question, unless HF_HUB_OFFLINE is set, and changes nothing.

    Returns:
        what is there, as JSON takes it: `versions`, `packages`, `extras`, `machine`, `devices`, `hub`, `disk`;
        `problems` with `what`, `found`, `fix` and whether it is `required`; `ok`: no required one.
    """
    packages, extras = _packages()
    probed = _probe()
    document = {
        "versions": {
            "zconvert": __version__,
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
        },
        "packages": packages,
        "extras": extras,
        "machine": _machine(probed),
        "devices": _devices(probed),
        "hub": hub_access(),
        "disk": _disk(),
    }
    problems = list(_problems(document, probed))
    return {**document, "problems": problems, "ok": not any(problem["required"] for problem in problems)}


def _packages() -> tuple[list[Document], list[Document]]:
    """What pyproject.toml asks for, what is installed of it, and the same of each extra."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in importlib.metadata.requires("zconvert") or ()]
    except importlib.metadata.PackageNotFoundError:
        wanted = []

    def told(requirement: Requirement) -> Document:
        version = _version(requirement.name)
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        return {
            "name": requirement.name,
            "version": version,
            "needed": str(requirement.specifier),
            "fits": fits,
        }

    packages = [told(each) for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    extras = []
    for name, purpose in EXTRAS.items():
        members = [
            told(each)
            for each in wanted
            if each.marker is not None
            and each.marker.evaluate({"extra": name})
            and not each.marker.evaluate({"extra": ""})
        ]
        complete = bool(members) and all(member["fits"] for member in members)
        install = f"pip install 'zconvert[{name}]'"
        extras.append({"name": name, "for": purpose, "packages": members, "complete": complete, "install": install})
    return packages, extras


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _probe() -> Document:
    """What a process of its own says of the packages and of torch; see doctor_probe.py."""
    script = Path(__file__).with_name("doctor_probe.py")
    found: Document = {"broken": {}}
    try:
        # -P: a folder called `torch` where the user stands is not torch
        done = subprocess.run(
            [sys.executable, "-P", str(script), *IMPORTED],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            timeout=PROBE_SECONDS,
        )
        output, ended = done.stdout, f"the process ended with code {done.returncode}"
    except subprocess.TimeoutExpired as late:
        output, ended = late.stdout or b"", f"no end within {PROBE_SECONDS:.0f} seconds"
    last: str | None = None
    for line in output.decode(errors="replace").split("\n"):  # not splitlines, to which the mark ends a line
        if not line.startswith("\x1e"):
            continue
        told = json.loads(line[1:])
        if "broken" in told:
            found["broken"][told["broken"]] = told["error"]
        else:
            last = told.pop("importing", last)
            found |= told
    if last is not None:
        found["broken"][last] = ended
    elif "threads" in found and "devices" not in found:
        found["devices_error"] = ended
    return found


def _machine(probed: Document) -> Document:
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        cores = os.cpu_count() or 1
    from zconvert.checkpoint.parity import free_memory

    return {
        "cores": cores,
        "threads": probed.get("threads"),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "bytes_free": free_memory(),
    }


def _devices(probed: Document) -> Document:
    """The GPUs that torch can use, and those that the driver tells of."""
    return {
        "cuda": probed.get("cuda"),
        "hip": probed.get("hip"),
        "gpus": probed.get("devices", []),
        "error": probed.get("devices_error"),
        "driver": _driver(),
    }


def _driver() -> Document | None:
    """NVIDIA's driver and its GPUs; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    rows = [line.split(", ", 1) for line in done.stdout.splitlines() if ", " in line]
    return {"version": rows[0][0], "gpus": [row[1] for row in rows]} if done.returncode == 0 and rows else None


def hub_access() -> Document:
    """Whether the Hub answers, and takes the token. The token itself is told nowhere."""
    told: Document = {"endpoint": None, "offline": None, "reachable": None, "token": None, "user": None, "error": None}
    try:
        from huggingface_hub import constants, get_token
        from huggingface_hub.utils import build_hf_headers, get_session

        token = get_token()
        told |= {"endpoint": constants.ENDPOINT, "offline": bool(constants.HF_HUB_OFFLINE)}
        told["token"] = "none" if token is None else "unchecked"
        if told["offline"]:
            return told
        headers = build_hf_headers(token=token if token is not None else False)
        answer = get_session().get(f"{constants.ENDPOINT}/api/whoami-v2", headers=headers, timeout=HUB_SECONDS)
        told["reachable"] = answer.status_code < 500
        if token is not None and answer.status_code in (200, 401, 403):
            told["token"] = "valid" if answer.status_code == 200 else "refused"
            told["user"] = answer.json().get("name") if answer.status_code == 200 else None
    except Exception as error:
        told["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        told["reachable"] = False
    return told


def _disk() -> list[Document]:
    """The folders that zconvert writes to: may it, and how much room there is."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE as cache
    except Exception:
        cache = str(Path.home() / ".cache" / "huggingface" / "hub")
    places = {"cache": Path(cache), "here": Path.cwd(), "temporary": Path(tempfile.gettempdir())}
    return [_place(role, path.expanduser().absolute()) for role, path in places.items()]


def _place(role: str, path: Path) -> Document:
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return {
        "role": role,
        "path": str(path),
        "writable": writable,
        "bytes_free": shutil.disk_usage(existing).free,
    }


def _problems(document: Document, probed: Document) -> Iterator[Document]:
    """What is wrong, each with what mends it."""

    def problem(what: str, found: object, fix: str, *, required: bool) -> Document:
        return {"what": what, "found": str(found), "fix": fix, "required": required}

    if not document["packages"]:
        what = "zconvert is not installed: what it needs cannot be told"
        yield problem(what, "no metadata of the package", "pip install zconvert", required=False)
    for package in document["packages"]:
        if not package["fits"]:
            what = f"{package['name']} {'is missing' if package['version'] is None else 'is of another version'}"
            needed = f"{package['name']}{package['needed']}"
            yield problem(what, package["version"] or "not installed", f"pip install '{needed}'", required=True)
    missing = {package["name"].lower() for package in document["packages"] if package["version"] is None}
    broken = probed["broken"]
    for name, error in broken.items():
        package = name.partition(".")[0].replace("_", "-")
        if package not in missing and (name == "torch" or error != broken.get("torch")):  # most of them import torch
            fix = f"pip install --force-reinstall {package}\npython -c 'import {name}' tells more"
            yield problem(f"{package} cannot be imported", error, fix, required=True)
    for extra in document["extras"]:
        for package in extra["packages"]:
            if package["version"] is not None and not package["fits"]:
                what = f"{package['name']} is of another version, for {extra['for']}"
                yield problem(what, package["version"], extra["install"], required=False)
    yield from _device_problems(document["devices"], document["machine"], problem)
    yield from _place_problems(document["hub"], document["disk"], problem)


def _device_problems(devices: Document, machine: Document, problem: Any) -> Iterator[Document]:
    driver, build = devices["driver"], devices["cuda"] or devices["hip"]
    if devices["error"] is not None:
        yield problem(
            "torch cannot list the GPUs", devices["error"], "--device cpu, or mend the driver", required=False
        )
    elif driver is not None and build is None and machine["threads"] is not None:
        what = "this machine has a GPU, and torch is built without CUDA"
        fix = "pip install --force-reinstall torch, from https://pytorch.org/get-started"
        yield problem(what, ", ".join(driver["gpus"]), fix, required=False)
    elif driver is not None and build is not None and not devices["gpus"]:
        what = f"torch, built for CUDA {build}, sees none of this machine's GPUs"
        fix = "update the driver, or install a torch for an older CUDA; check CUDA_VISIBLE_DEVICES"
        yield problem(what, f"driver {driver['version']}, {', '.join(driver['gpus'])}", fix, required=False)
    for number, gpu in enumerate(devices["gpus"]):
        if not gpu["works"]:
            what = f"GPU {number}, {gpu['name']}, cannot be used"
            fix = "free it if another program has all of its memory; else install a torch that is built for it"
            yield problem(what, gpu["error"], fix, required=False)
    threads, cores = machine["threads"], machine["cores"]
    if threads is not None and threads > cores:
        what = "torch takes more threads than this process may use cores, which makes it many times slower"
        yield problem(what, f"{threads} threads, {cores} cores", f"export OMP_NUM_THREADS={cores}", required=False)


def _place_problems(hub: Document, disk: list[Document], problem: Any) -> Iterator[Document]:
    if hub["error"] is not None:
        what = f"the Hub cannot be reached{'' if hub['endpoint'] is None else ' at ' + hub['endpoint']}"
        fix = "check network and proxy; HF_HUB_OFFLINE=1 works with what was fetched before, local folders always work"
        yield problem(what, hub["error"], fix, required=False)
    if hub["token"] == "refused":
        fix = "hf auth login, or take HF_TOKEN out: even public checkpoints are refused with it"
        yield problem("the Hub refuses the token", "a token that is wrong or was withdrawn", fix, required=False)
    for place in disk:
        cache = "set HF_HOME to another folder" if place["role"] == "cache" else None
        if not place["writable"]:
            fix = cache or ("work in another folder" if place["role"] == "here" else "set TMPDIR to another folder")
            yield problem(f"{place['path']} cannot be written to", place["role"], fix, required=False)
        elif place["bytes_free"] < LITTLE_SPACE and place["role"] != "temporary":
            fix = f"free some space{', or ' + cache if cache else ''}"
            yield problem(
                f"little space in {place['path']}", f"{place['bytes_free'] / 1e9:.1f} GB", fix, required=False
            )
