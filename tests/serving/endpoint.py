"""A real server on a loopback port, whose engine the test holds by a gate, and a plain client."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.checkpoint.tiny import make_checkpoint
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.load import end_token_ids, load_model
from zconvert.checkpoint.source import require_converted, resolve
from zconvert.serving.encoding import Served
from zconvert.serving.run import Server, bound
from zconvert.serving.server import Limits, Service
from zconvert.serving.worker import Worker
from zconvert.tidar.acceptance import Sampling
from zconvert.tidar.decoding import DecodePlan, Result, Step
from zconvert.tidar.engine import Engine, decode
from zconvert.tidar.generate import layout_model_of, plan_of

NAME = "tiny"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'nobody' %}{{ raise_exception('nobody cannot speak') }}{% endif %}"
    "{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


def make_converted(folder: Path, *, template: bool = True) -> Path:
    """A tiny converted checkpoint, able to chat if wanted. Blocks of 4, a context of 256 tokens."""
    source = make_checkpoint(folder / "mixtral", "mixtral", dtype="float32")
    if template:
        (source / "chat_template.jinja").write_text(TEMPLATE)
    convert_init(resolve(source), folder / NAME, block_size=4)
    return folder / NAME


class Gate:
    """Lets so many of the engine's steps pass; open: all. Steps may be made to fail."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._left: float = float("inf")
        self.failures = 0

    def open(self) -> None:
        self.let(float("inf"))

    def close(self) -> None:
        with self._changed:
            self._left = 0

    def let(self, steps: float) -> None:
        with self._changed:
            self._left += steps
            self._changed.notify_all()

    def wait(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._left > 0, timeout=60)
            self._left -= 1
        if self.failures:
            self.failures -= 1
            raise RuntimeError("the device is gone")


class GatedEngine(Engine):
    gate: Gate

    def step(self) -> list[tuple[Result, Step]]:
        self.gate.wait()
        return super().step()


@dataclass
class Model:
    """A checkpoint that is loaded."""

    layout_model: Any
    tokenizer: Any
    plan: DecodePlan

    @classmethod
    def load(cls, folder: Path, sampler: str = "lossless") -> Model:
        source = resolve(folder)
        model, tokenizer = load_model(source)
        plan = plan_of(require_converted(source), Sampling(), end_token_ids(model, tokenizer), sampler=sampler)
        return cls(layout_model_of(model), tokenizer, plan)

    def plan_at(self, temperature: float) -> DecodePlan:
        return replace(self.plan, sampling=Sampling(temperature))

    def greedy(self, prompt: list[int], count: int) -> str:
        """The text that follows a prompt, by the plain decode loop."""
        tokens = [token for step in decode(self.layout_model, prompt, self.plan, count) for token in step.tokens]
        return self.tokenizer.decode(prompt + tokens, skip_special_tokens=True)[len(self.text(prompt)) :]

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


@dataclass
class Endpoint:
    """A server that runs."""

    port: int
    gate: Gate
    worker: Worker
    stop: Callable[[], None]
    key: str | None = None
    closing: list[http.client.HTTPConnection] = field(default_factory=list)

    def send(self, path: str, body: Any = None, **headers: str) -> http.client.HTTPResponse:
        """Sends a request, whose answer is read by the caller."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        self.closing.append(connection)
        given = {"Content-Type": "application/json", "Connection": "close", **headers}
        if self.key is not None:
            given.setdefault("Authorization", f"Bearer {self.key}")
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("GET" if data is None else "POST", path, data, given)
        return connection.getresponse()

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        response = self.send(path, body, **headers)
        return response.status, json.loads(response.read())

    def complete(self, **fields: Any) -> dict[str, Any]:
        status, answer = self.ask("/v1/completions", {"model": NAME, "temperature": 0, **fields})
        assert status == 200, answer
        return answer

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Until it holds; a minute is given up on."""
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.005)

    @property
    def idle(self) -> bool:
        """Neither texts nor places are taken."""
        state = self.worker.state
        return state.running == state.waiting == 0


def events(response: http.client.HTTPResponse) -> Iterator[Any]:
    """The events of a stream as they come; `[DONE]` as text."""
    assert response.headers["content-type"].startswith("text/event-stream")
    while line := response.readline():
        if line.strip():
            data = line.decode().removeprefix("data: ").strip()
            yield data if data == "[DONE]" else json.loads(data)


@contextmanager
def serving(
    model: Model,
    *,
    batch_size: int = 4,
    places: int = 64,
    timeout: float = 60,
    grace: float = 5,
    key: str | None = None,
) -> Iterator[Endpoint]:
    """Serves a model, from a thread of this process."""
    gate = Gate()

    def make_engine() -> Engine:
        engine = GatedEngine(model.layout_model, model.plan, max_batch=batch_size)
        engine.gate = gate
        return engine

    worker = Worker(make_engine)
    served = Served(NAME, model.tokenizer, model.plan, context=256, vocabulary=64)
    service = Service(served, worker, Limits(places, timeout, grace), key)
    ready = threading.Event()
    server = Server(service, grace, ready.set)
    with bound("127.0.0.1", 0) as address:
        port = address.getsockname()[1]
        thread = threading.Thread(target=lambda: server.run(sockets=[address]))
        thread.start()
        assert ready.wait(60)

        def stop() -> None:
            server.should_exit = True

        endpoint = Endpoint(port, gate, worker, stop, key)
        try:
            yield endpoint
        finally:
            gate.open()
            for connection in endpoint.closing:
                connection.close()
            stop()
            thread.join(60)
    assert not thread.is_alive()
    assert not worker.state.alive
