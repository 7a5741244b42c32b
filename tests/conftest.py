"""For every test: no network, nothing of the user's own Hugging Face folder, one CPU thread."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

# Before torch and the Hub client are imported, which read these once. Tiny tensors gain nothing from a second thread.
_HF_HOME = tempfile.TemporaryDirectory(prefix="zconvert-tests-", ignore_cleanup_errors=True)
os.environ["HF_HOME"] = _HF_HOME.name
for _name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_ENDPOINT", "ZCONVERT_DEBUG", "COLUMNS"):
    os.environ.pop(_name, None)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _renew_threads() -> None:
    """In a fork of a process that has set torch's number of threads, torch makes its pool of threads anew when it is
    first needed; threads that need it in just that moment, as loading has some, fail with "Invalid thread pool!".
    """
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(torch.get_num_threads())


os.register_at_fork(after_in_child=_renew_threads)


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Any connection beyond this machine fails at once, with a message that says why."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests may not reach the network, tried {address}")
        connect(self, address)

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", refuse)
    yield
    patch.undo()
