"""`zconvert doctor`: is what zconvert needs on this machine, and does it work."""

from __future__ import annotations

from typing import Any

import typer
from rich.text import Text

from zconvert.cli import options
from zconvert.cli.ui import EXIT_ERROR, err, out, print_json, show_facts, size

_TOKENS = {
    "none": "no token: public checkpoints alone",
    "unchecked": "a token, which was not checked",
    "valid": "a valid token",
    "refused": "a token that is refused",
    None: "unknown",
}
_ROLES = {"cache": "Hub's cache", "here": "this folder", "temporary": "temporary"}


def command(as_json: options.Json = False) -> None:
    """Check this machine: versions, devices, Hub access, disk space, and what is missing.

    Nothing is changed. The Hub is asked one question, unless HF_HUB_OFFLINE is set; a token is never shown. The exit
    status is 1 where something that every command needs is missing or broken.
    """
    from zconvert.doctor import examine

    with err.status("Looking at this machine …"):
        document = examine()
    if as_json:
        print_json(document)
    else:
        show(document)
    if not document["ok"]:
        raise typer.Exit(EXIT_ERROR)


def show(document: dict[str, Any]) -> None:
    """Prints what `examine` found, for people."""
    versions = document["versions"]
    headline = f"zconvert {versions['zconvert']}, Python {versions['python']}, {versions['platform']}"
    out.print(Text(headline, style="bold"))
    parts = {
        "Packages": [(each["name"], _package(each)) for each in document["packages"]],
        "Extras": [(each["name"], _extra(each)) for each in document["extras"]],
        "Machine": _machine(document["machine"], document["devices"]),
        "Hub": _hub(document["hub"]),
        "Disk": [(_ROLES[each["role"]], _place(each)) for each in document["disk"]],
    }
    for title, rows in parts.items():
        out.print()
        out.print(Text(title, style="bold"))
        show_facts(rows)
    out.print()
    for problem in document["problems"]:
        kind, style = ("Error", "bold red") if problem["required"] else ("Note", "bold yellow")
        out.print(Text.assemble((f"{kind}: ", style), problem["what"]), soft_wrap=True)
        show_facts([("found", problem["found"]), ("fix", problem["fix"])])
    if document["ok"]:
        out.print(Text("All that is needed is here.", style="bold green"))


def _package(package: dict[str, Any]) -> str:
    version = package["version"] or "missing"
    return version if package["fits"] else f"{version}; needed: {package['needed']}"


def _extra(extra: dict[str, Any]) -> str:
    if extra["complete"]:
        return ", ".join(f"{each['name']} {each['version']}" for each in extra["packages"])
    return f"missing, for {extra['for']}\n{extra['install']}"


def _machine(machine: dict[str, Any], devices: dict[str, Any]) -> list[tuple[str, str]]:
    setting = machine["omp_num_threads"]
    threads = "unknown" if machine["threads"] is None else f"{machine['threads']} for torch"
    rows = [
        ("cores", str(machine["cores"])),
        ("threads", f"{threads}; OMP_NUM_THREADS {'is not set' if setting is None else '= ' + setting}"),
        ("free memory", "unknown" if machine["bytes_free"] is None else size(machine["bytes_free"])),
    ]
    for number, gpu in enumerate(devices["gpus"]):
        free = "" if gpu["bytes_free"] is None else f", {size(gpu['bytes_free'])} free"
        rows.append((f"GPU {number}", f"{gpu['name']} (capability {gpu['capability']}), {size(gpu['bytes'])}{free}"))
    if not devices["gpus"]:
        rows.append(("GPU", "none that torch can use"))
    build = f"CUDA {devices['cuda']}" if devices["cuda"] else f"ROCm {devices['hip']}" if devices["hip"] else "the CPU"
    driver = "no NVIDIA driver" if devices["driver"] is None else f"NVIDIA driver {devices['driver']['version']}"
    return [*rows, ("torch is for", f"{build}; {driver}")]


def _hub(hub: dict[str, Any]) -> list[tuple[str, str]]:
    reached = "reached" if hub["reachable"] else "not asked: HF_HUB_OFFLINE is set" if hub["offline"] else "not reached"
    token = _TOKENS[hub["token"]] + (f", of {hub['user']}" if hub["user"] else "")
    return [(str(hub["endpoint"] or "endpoint"), reached), ("token", token)]


def _place(place: dict[str, Any]) -> str:
    return f"{size(place['bytes_free'])} free in {place['path']}{'' if place['writable'] else ', not writable'}"
