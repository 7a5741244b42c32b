"""`zconvert generate --chat`: a conversation by the chat template, from a terminal or a pipe."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from tests.commands import run_command
from tests.serving.endpoint import Model, make_converted
from zconvert.cli import chat
from zconvert.cli.streaming import show_plain
from zconvert.data.chat import asking_ids
from zconvert.tidar.decoding import Result as Decoded
from zconvert.tidar.decoding import Step
from zconvert.tidar.engine import Engine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_converted(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return Model.load(checkpoint)


def run(checkpoint: Path, stdin: str, *arguments: str) -> Result:
    return run_command("generate", checkpoint, "--chat", "--max-new-tokens", 9, *arguments, stdin=stdin)


def answers(model: Model, *asked: str) -> list[str]:
    """What the plain decode loop says, turn by turn."""
    messages: list[dict[str, Any]] = []
    for text in asked:
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": model.greedy(asking_ids(messages, model.tokenizer), 9)})
    return [message["content"] for message in messages[1::2]]


def test_each_answer_knows_what_was_said_before(checkpoint: Path, model: Model) -> None:
    result = run(checkpoint, "seven men\n\n  sing  \n")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == answers(model, "seven men", "sing")
    assert answers(model, "sing") != answers(model, "seven men", "sing")[1:]
    assert result.stderr.count("tokens/s") == 2
    assert "tokens a forward in 2 answers" in result.stderr


def test_a_conversation_may_be_forgotten_and_ended(checkpoint: Path, model: Model) -> None:
    result = run(checkpoint, "seven men\n/reset\n/rest\nsing\n/quit\nnever read\n")
    assert result.stdout.splitlines() == answers(model, "seven men") + answers(model, "sing")
    assert "There is no /rest" in result.stderr


def test_blocks_are_shown_with_the_same_text(checkpoint: Path) -> None:
    assert run(checkpoint, "sing\n", "--show-blocks").stdout == run(checkpoint, "sing\n").stdout


def test_a_checkpoint_without_a_template_cannot_chat(tmp_path: Path) -> None:
    result = run(make_converted(tmp_path, template=False), "sing\n")
    assert result.exit_code == 1
    assert "has no chat template" in " ".join(result.stderr.split())


def test_a_conversation_that_gets_too_long_is_told_and_goes_on_after_a_reset(checkpoint: Path, model: Model) -> None:
    result = run(checkpoint, f"{'sing ' * 120}\n/reset\nsing\n")
    assert result.exit_code == 0
    assert "the conversation is too long" in result.stderr
    assert result.stdout.splitlines() == answers(model, "sing")


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = model.greedy(asking_ids([{"role": "user", "content": "seven men"}], model.tokenizer), 30)
    step = Engine.step

    def interrupted(engine: Engine) -> list[tuple[Decoded, Step]]:
        if engine.counters.forwards == 2:
            signal.raise_signal(signal.SIGINT)
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    lines = iter(["seven men"])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines, None) or _end())
    talk = chat.Chat(Engine(model.layout_model, model.plan, max_batch=1), model.tokenizer, 200, [], None, show_plain)
    before = signal.getsignal(signal.SIGINT)
    talk.talk()
    said = talk.messages[1]["content"]
    assert said == capsys.readouterr().out.rstrip("\n")
    assert said
    assert whole.startswith(said)
    assert len(said) < len(whole)
    assert signal.getsignal(signal.SIGINT) is before


def _end() -> str:
    raise EOFError
