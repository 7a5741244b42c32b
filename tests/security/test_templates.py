"""A chat template is a program of a stranger's: it ends in bounded time and memory, and reaches nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.security.commands import run
from tests.serving.endpoint import NAME, Model, make_converted
from tests.training.test_sft import make_sft
from zconvert.data import templates
from zconvert.data.chat import asking_ids
from zconvert.data.templates import Limits, Renderer
from zconvert.errors import UserError
from zconvert.recipe import dump_recipe
from zconvert.serving.encoding import Served, encode
from zconvert.serving.protocol import ApiError, Chat, parse

MESSAGES = [{"role": "user", "content": "hello"}]
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    renderer = Renderer(Limits(seconds=1.0, memory=2**28, characters=10_000))
    yield renderer
    renderer.close()


@pytest.fixture
def impatient(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands do not wait for ten seconds."""
    monkeypatch.setattr(templates, "shared", renderer)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (ENDLESS, "it takes over 1 seconds"),
        ("{{ 2 ** (2 ** 40) }}", "it takes over 1 seconds"),  # one operation, which no tracing would interrupt
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it calls itself too often"),
        ("{{ 'a' * 10 ** 10 }}", "too much memory"),
        ("{{ 'a' | center(10 ** 10) }}", "too much memory"),
        ("{{ '%10000000000d' | format(1) }}", "too much memory"),
        ("{{ 'a' * 20000 }}", "it writes 20,000 characters, of 10,000 at most"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.__init__.__globals__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% import 'os' as os %}", "no loader"),
        ("{% set x = 1 / 0 %}", "division by zero"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_a_template_that_takes_too_much_or_reaches_out_is_refused_and_the_next_is_run(
    renderer: Renderer, template: str, said: str
) -> None:
    with pytest.raises(UserError, match="the chat template refuses the conversation") as caught:
        renderer.render(MESSAGES, template)
    assert said in str(caught.value)
    assert "chat_template.jinja of the checkpoint" in str(caught.value)
    assert renderer.render(MESSAGES, PLAIN) == ("user: hello", [])


def test_text_that_doubles_again_and_again_is_ended(renderer: Renderer) -> None:
    doubling = "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
    with pytest.raises(UserError, match=r"too much memory|takes over"):
        renderer.render(MESSAGES, doubling)


def test_names_of_special_tokens_do_not_take_the_conversations_place(renderer: Renderer) -> None:
    names = {"conversations": "x", "chat_template": "evil", "bos_token": "<s>"}
    assert renderer.render(MESSAGES, "{{ bos_token }}" + PLAIN, names=names)[0] == "<s>user: hello"


def test_a_conversation_that_nests_too_deep_is_refused(renderer: Renderer) -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(UserError, match="not what JSON can hold"):
        renderer.render([{"role": "user", "content": deep}], PLAIN)


def test_the_process_that_runs_templates_knows_no_token(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "ZCONVERT_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "hf_sentinel")
    fresh = Renderer()
    fresh.render(MESSAGES, PLAIN)
    environment = Path(f"/proc/{fresh.process_id}/environ").read_bytes() if os.path.isdir("/proc") else b""
    fresh.close()
    assert b"hf_sentinel" not in environment


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_converted(tmp_path_factory.mktemp("chat"))


@pytest.mark.usefixtures("impatient")
def test_chat_goes_on_after_an_endless_template(converted: Path) -> None:
    (converted / "chat_template.jinja").write_text(ENDLESS)
    result = run("generate", converted, "--chat", stdin="hello\n/quit\n")
    assert result.exit_code == 0, result.output
    assert "it takes over 1 seconds" in " ".join(result.output.split())


@pytest.mark.usefixtures("impatient")
def test_a_server_refuses_a_request_that_its_template_does_not_end_with(converted: Path) -> None:
    (converted / "chat_template.jinja").write_text(ENDLESS)
    model = Model.load(converted)
    served = Served(
        NAME, model.tokenizer, SimpleNamespace(proposals=(), sampling=SimpleNamespace(mix_weight=1.0)), 256, 64
    )  # type: ignore[arg-type]
    with pytest.raises(ApiError, match="it takes over 1 seconds") as caught:
        encode(parse({"model": NAME, "messages": MESSAGES}, Chat), served)
    assert caught.value.status == 400


@pytest.mark.usefixtures("impatient")
def test_sft_names_the_row_and_the_template_that_does_not_end(tmp_path: Path) -> None:
    recipe = make_sft(tmp_path)
    (tmp_path / "endless.jinja").write_text(ENDLESS)
    recipe = recipe.model_copy(update={"chat_template": str(tmp_path / "endless.jinja")})
    (tmp_path / "sft.yaml").write_text(dump_recipe(recipe))
    result = run("sft", tmp_path / "sft.yaml", "--show-example")
    assert result.exit_code == 1
    said = " ".join(result.stderr.split())
    assert "line 1 of" in said
    assert "it takes over 1 seconds" in said
    assert "chat_template of the recipe" in said


def test_a_templates_text_is_that_of_transformers(converted: Path) -> None:
    (converted / "chat_template.jinja").write_text("{{ bos_token }}{{ messages | tojson(indent=2) }}é")
    tokenizer = Model.load(converted).tokenizer
    theirs = tokenizer.apply_chat_template([*MESSAGES, {"role": "user", "content": "é\u2028"}], tokenize=False)
    ours = templates.shared.render(
        [*MESSAGES, {"role": "user", "content": "é\u2028"}], tokenizer.chat_template, names=tokenizer.special_tokens_map
    )
    assert ours == (theirs, [])
    assert asking_ids(MESSAGES, tokenizer)
