"""What `doctor` runs in a process of its own, since a broken torch can take its process along.

Each finding is a line of JSON on stdout, flushed at once: where the process dies, the last line says over what.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any


def tell(**found: Any) -> None:
    """Writes a finding; other programs' output on stdout has no such mark."""
    sys.stdout.write(f"\x1e{json.dumps(found)}\n")
    sys.stdout.flush()


def main(modules: list[str]) -> None:
    """Imports modules, and asks torch for its threads and devices."""
    for name in modules:
        tell(importing=name)
        try:
            importlib.import_module(name)
        except BaseException as error:
            tell(broken=name, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    tell(importing=None)
    torch: Any = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        tell(threads=torch.get_num_threads(), cuda=torch.version.cuda, hip=torch.version.hip)
        try:
            tell(devices=[device(torch, number) for number in range(torch.cuda.device_count())])
        except Exception as error:
            tell(devices=[], devices_error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def device(torch: Any, number: int) -> dict[str, Any]:
    """A GPU, after a small sum on it: a build without kernels for it fails there."""
    properties = torch.cuda.get_device_properties(number)
    told = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "bytes": properties.total_memory,
        "bytes_free": None,
        "works": True,
        "error": None,
    }
    try:
        told["bytes_free"] = torch.cuda.mem_get_info(number)[0]
        torch.ones(8, device=f"cuda:{number}").sum().item()
    except Exception as error:
        told |= {"works": False, "error": " ".join(str(error).split())[:300]}
    return told


if __name__ == "__main__":
    main(sys.argv[1:])
