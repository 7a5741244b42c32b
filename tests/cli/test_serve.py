"""`zconvert serve`: a process that listens where it says, and stops when it is told to."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.commands import run_command
from tests.serving.endpoint import Model, make_converted
from zconvert.checkpoint.load import prompt_ids
from zconvert.cli import serve


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_converted(tmp_path_factory.mktemp("served"))


run = partial(run_command, "serve")


@contextmanager
def process(*arguments: object, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of its own, and its address."""
    command = [sys.executable, "-m", "zconvert", "serve", *map(str, arguments), "--port", "0"]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        # Whoever runs the tests in the background may have them ignore it, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as running:
        try:
            assert running.stderr is not None
            told = running.stderr.readline()
            found = re.search(r"Serving \S+ at (http://\S+)/v1", told)
            assert found, told + running.stderr.read()
            yield running, found[1]
        finally:
            running.kill()


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_it_serves_the_decode_loops_text_until_it_is_told_to_stop(
    checkpoint: Path, number: signal.Signals, code: int
) -> None:
    with process(checkpoint, "--model-name", "mine", ZCONVERT_API_KEY="secret") as (running, url):
        assert url.startswith("http://127.0.0.1:")
        body = json.dumps({"model": "mine", "prompt": "sing", "max_tokens": 9, "temperature": 0}).encode()
        headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body, headers)) as answer:
            text = json.load(answer)["choices"][0]["text"]
        model = Model.load(checkpoint)
        assert text == model.greedy(prompt_ids(model.tokenizer, "sing"), 9)
        running.send_signal(number)
        assert running.wait(60) == code
        assert running.stderr is not None
        told = running.stderr.read()
        assert "Traceback" not in told
        assert "secret" not in told


def test_a_port_that_is_taken_is_told_before_the_weights_are_read(checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run(checkpoint, "--port", taken.getsockname()[1])
    assert result.exit_code == 1
    assert "Address already in use" in result.stderr
    assert run(checkpoint, "--host", "999.1.1.1").exit_code == 1


def test_what_serving_needs_is_named_where_it_is_missing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "zconvert.serving.run", raising=False)
    result = run(checkpoint)
    assert result.exit_code == 1
    assert "pip install 'zconvert[serve]'" in result.stderr


def test_options_that_cannot_work_are_told(checkpoint: Path) -> None:
    assert run(checkpoint, "--port", "70000").exit_code == 2
    result = run(checkpoint, "--port", "0", "--block-size", "8")
    assert result.exit_code == 1
    assert "found:    8\n  expected: at most 4" in result.stderr


@pytest.mark.parametrize(
    ("host", "loopback"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False)]
)
def test_addresses_of_this_machine_alone_are_told_from_others(host: str, loopback: bool) -> None:
    assert serve._is_loopback(host) == loopback
