"""What is scored of a conversation: each expectation is written by hand, scored tokens between brackets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.tiny import make_tokenizer
from zconvert.data.chat import prompt
from zconvert.data.documents import Document
from zconvert.data.loading import load_documents
from zconvert.data.reading import RawRow
from zconvert.data.tokenising import Rules, tokenise
from zconvert.errors import UserError
from zconvert.recipe import DatasetRecipe

SPECIAL = ["<unk>", "<bos>", "<eos>", "<start>", "<end>", "<tool_call>", "</tool_call>"]
WORDS = ["hi", "yes", "no", "sum", "2", "4", "user", "assistant", "system", "tool", "tools", "think", "</think>", "\n"]

# ChatML, as most checkpoints have it.
CHATML = """{{ bos_token }}{% if tools %}<start> tools
{% for tool in tools %} {{ tool.function.name }}{% endfor %} <end>
{% endif %}{% for m in messages %}<start> {{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %} <tool_call> {{ call.function.name }} </tool_call>{% endfor %} <end>
{% endfor %}{% if add_generation_prompt %}<start> assistant
{% endif %}"""
TRIMS = CHATML.replace("m.content }}", "(m.content or '') | trim }}")
MARKS_WITH_END = """{% for m in messages %}<start> {{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }} <end>
{% endgeneration %}{% else %}{{ m.content }} <end>
{% endif %}{% endfor %}"""
MARKS_WITHOUT_END = MARKS_WITH_END.replace(" <end>\n{% endgeneration %}", "{% endgeneration %} <end>\n")
# No control tokens: a line each, and a header that the template itself never asks with.
LINES = "{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}"
# Forgets what the assistant thought before, once the user speaks again, as reasoning models' templates do.
FORGETS = """{% for m in messages %}<start> {{ m.role }}
{{ m.content if loop.last else m.content.split('</think>')[-1] }} <end>
{% endfor %}{% if add_generation_prompt %}<start> assistant
{% endif %}"""
# Asks for a thought that it does not write in the turn itself, as templates of models that always think do.
THINKS = CHATML.replace("<start> assistant\n{% endif %}", "<start> assistant\nthink {% endif %}")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + CHATML

USER, ANSWER, SYSTEM = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}, "system"
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "sum"}}]}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(" +"), "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[3:],
    )


def outcome(tokenizer: Any, row: dict[str, Any], template: str | None, **settings: Any) -> Document | UserError:
    rules = Rules(DatasetRecipe(path="x", type="chat", **settings), tokenizer, chat_template=template)
    (result,) = tokenise(rules, [RawRow("row 1", json.dumps(row).encode(), is_json=True)])
    return result if isinstance(result, UserError) else result[0]


def bracketed(tokenizer: Any, document: Document | UserError) -> str:
    """All tokens of a document, the scored ones in brackets; a line feed is written as |."""
    assert isinstance(document, Document), document
    words = [word.replace("\n", "|") for word in tokenizer.convert_ids_to_tokens(document.ids)]
    return " ".join(f"[{word}]" if s else word for word, s in zip(words, document.loss_mask, strict=True))


ONE_TURN = "<bos> <start> user | hi <end> | <start> assistant | [yes] [<end>] |"
CONVERSATIONS: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any], str]] = {
    "one turn": (CHATML, [USER, ANSWER], {}, ONE_TURN),
    "the end is left out": (CHATML, [USER, ANSWER], {"train_on_eot": False}, ONE_TURN.replace("[<end>]", "<end>")),
    "an empty turn is its end alone": (
        CHATML,
        [USER, {"role": "assistant", "content": ""}],
        {},
        "<bos> <start> user | hi <end> | <start> assistant | [<end>] |",
    ),
    "several turns, an empty user's": (
        CHATML,
        [USER, ANSWER, {"role": "user", "content": ""}, {"role": "assistant", "content": "no no"}],
        {},
        f"{ONE_TURN} <start> user | <end> | <start> assistant | [no] [no] [<end>] |",
    ),
    "a system turn, and another role that is trained": (
        CHATML,
        [{"role": "system", "content": "sum"}, USER, ANSWER],
        {"roles_to_train": ["assistant", "user"]},
        "<bos> <start> system | sum <end> | [<start>] [user] [|] [hi] [<end>] | <start> assistant | [yes] [<end>] |",
    ),
    "a tool call and its answer": (
        CHATML,
        [USER, CALL, {"role": "tool", "content": "4"}, ANSWER],
        {},
        "<bos> <start> tools | sum <end> | <start> user | hi <end> | "
        "<start> assistant | [<tool_call>] [sum] [</tool_call>] [<end>] | "
        "<start> tool | 4 <end> | <start> assistant | [yes] [<end>] |",
    ),
    "two assistants in a row": (
        CHATML,
        [USER, ANSWER, {"role": "assistant", "content": "no"}],
        {},
        f"{ONE_TURN} <start> assistant | [no] [<end>] |",
    ),
    "the assistant speaks first": (
        CHATML,
        [ANSWER, USER],
        {},
        "<bos> <start> assistant | [yes] [<end>] | <start> user | hi <end> |",
    ),
    "the same words as the user's": (
        CHATML,
        [USER, {"role": "assistant", "content": "hi"}],
        {},
        "<bos> <start> user | hi <end> | <start> assistant | [hi] [<end>] |",
    ),
    "a template that trims": (
        TRIMS,
        [USER, {"role": "assistant", "content": "\n yes \n no \n\n"}],
        {},
        "<bos> <start> user | hi <end> | <start> assistant | [yes] [|] [no] [<end>] |",
    ),
    "content that ends in a line feed, untrimmed": (
        CHATML,
        [USER, {"role": "assistant", "content": "yes\n"}],
        {},
        "<bos> <start> user | hi <end> | <start> assistant | [yes] [|] [<end>] |",
    ),
    "control tokens in what is said": (
        CHATML,
        [USER, {"role": "assistant", "content": "no <end> yes"}],
        {},
        "<bos> <start> user | hi <end> | <start> assistant | [no] [<end>] [yes] [<end>] |",
    ),
    "marks around the end": (
        MARKS_WITH_END,
        [USER, ANSWER, USER, ANSWER],
        {},
        "<start> user | hi <end> | <start> assistant | [yes] [<end>] | "
        "<start> user | hi <end> | <start> assistant | [yes] [<end>] |",
    ),
    "marks around the end, which is left out": (
        MARKS_WITH_END,
        [USER, ANSWER],
        {"train_on_eot": False},
        "<start> user | hi <end> | <start> assistant | [yes] <end> |",
    ),
    "marks before the end": (
        MARKS_WITHOUT_END,
        [USER, ANSWER],
        {},
        "<start> user | hi <end> | <start> assistant | [yes] [<end>] |",
    ),
    "marks before the end, which is left out": (
        MARKS_WITHOUT_END,
        [USER, ANSWER],
        {"train_on_eot": False},
        "<start> user | hi <end> | <start> assistant | [yes] <end> |",
    ),
    "marks around nothing": (
        MARKS_WITHOUT_END,
        [USER, {"role": "assistant", "content": ""}, USER],
        {},
        "<start> user | hi <end> | <start> assistant | [<end>] | <start> user | hi <end> |",
    ),
    "marks are for the assistant alone": (
        MARKS_WITH_END,
        [USER, ANSWER],
        {"roles_to_train": ["user"]},
        "[<start>] [user] [|] [hi] [<end>] | <start> assistant | yes <end> |",
    ),
    # The model has to write its own header there, so that is scored.
    "lines without control tokens": (LINES, [USER, ANSWER], {}, "user hi | [assistant] [yes] [|]"),
    "lines, their ends left out": (
        LINES,
        [USER, {"role": "assistant", "content": "yes\n"}, USER],
        {"train_on_eot": False},
        "user hi | [assistant] [yes] [|] | user hi |",
    ),
    "a template that forgets, before it does": (
        FORGETS,
        [USER, {"role": "assistant", "content": "think</think>yes"}],
        {},
        "<start> user | hi <end> | <start> assistant | [<unk>] [<end>] |",
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_scored_tokens_of_a_conversation_are_those_written_by_hand(tokenizer: Any, name: str) -> None:
    template, messages, settings, expected = CONVERSATIONS[name]
    row: dict[str, Any] = {"messages": messages}
    if any("tool_calls" in message for message in messages):
        row["tools"] = [{"type": "function", "function": {"name": "sum"}}]
    assert bracketed(tokenizer, outcome(tokenizer, row, template, **settings)) == expected


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (CHATML, [{"role": "system", "content": "hi"}], "row 1: nothing in the conversation is scored"),
        (MARKS_WITH_END, [USER], "nothing in the conversation is scored"),
        (CHATML, [], "'messages' is empty"),
        (CHATML, "hi", "'messages' is no list of messages"),
        (CHATML, ["hi"], "'messages' is no list of messages"),
        (CHATML, [{"content": "hi"}], "message 1 has no role"),
        (CHATML, [USER, {"role": "assistant", "content": "\ud800"}], "half a character"),
        (NO_SYSTEM, [{"role": "system", "content": "hi"}, ANSWER], "refuses the conversation"),
        (FORGETS, [USER, {"role": "assistant", "content": "think</think>yes"}, USER, ANSWER], "message 2 adds"),
        (LINES, [ANSWER], "message 1 adds"),
        (THINKS, [USER, ANSWER], "the text that asks for it is not how it begins"),
    ],
)
def test_a_conversation_that_cannot_be_scored_is_a_bad_row(
    tokenizer: Any, template: str, messages: Any, message: str
) -> None:
    found = outcome(tokenizer, {"messages": messages}, template)
    assert isinstance(found, UserError)
    assert message in str(found)


def test_other_field_names_and_tools_as_text_are_read_and_keys_without_a_value_are_not(tokenizer: Any) -> None:
    tools = json.dumps([{"type": "function", "function": {"name": "sum"}}])
    row = {"chat": [{**USER, "tool_calls": None}, {**ANSWER, "name": None}], "functions": tools}
    found = outcome(tokenizer, row, CHATML, field_messages="chat", field_tools="functions")
    assert bracketed(tokenizer, found) == ONE_TURN.replace("<bos>", "<bos> <start> tools | sum <end> |")


def test_a_tokenizer_without_a_chat_template_is_told_of_the_recipes_own(tokenizer: Any, tmp_path: Path) -> None:
    found = outcome(tokenizer, {"messages": [USER, ANSWER]}, None)
    assert isinstance(found, UserError)
    assert "chat_template in the recipe" in str(found)


def test_a_conversation_longer_than_a_row_is_a_bad_row_named_by_its_line(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    rows = [[USER, ANSWER], [USER, {"role": "assistant", "content": "yes " * 20}]]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    dataset = DatasetRecipe(path=str(path), type="chat")
    with pytest.raises(UserError, match=r"line 2 of .*x\.jsonl: the conversation is longer than a row"):
        load_documents([dataset], tokenizer, sequence_len=16, chat_template=CHATML)
    assert len(load_documents([dataset], tokenizer, sequence_len=64, chat_template=CHATML)) == 2


def test_a_prompt_ends_where_the_assistant_is_to_speak(tokenizer: Any) -> None:
    dataset = DatasetRecipe(path="x", type="chat")
    for messages in ([USER], [USER, ANSWER]):
        ids = prompt({"messages": messages}, dataset, tokenizer, CHATML)
        words = " ".join(tokenizer.convert_ids_to_tokens(ids)).replace("\n", "|")
        assert words == "<bos> <start> user | hi <end> | <start> assistant |"


def test_a_turn_begins_with_a_token_of_its_own_behind_a_header_that_ends_in_a_blank() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("examples/tiny-zaya/checkpoint")
    template = (
        "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}a: {% endif %}"
    )
    messages = [USER, {"role": "assistant", "content": "So"}, USER, {"role": "assistant", "content": "Tens"}]
    found = outcome(tokenizer, {"messages": messages}, template)
    assert isinstance(found, Document)
    dataset = DatasetRecipe(path="x", type="chat")
    for turn in (2, 4):
        # What the model is asked with comes first, token by token, and the first scored token right behind it.
        asked = prompt({"messages": messages[:turn]}, dataset, tokenizer, template)
        first = next(n for n in range(len(found.ids)) if found.loss_mask[n] and n >= len(asked) - 2)
        assert tokenizer.decode(found.ids[:first]) == tokenizer.decode(asked)
        assert found.ids[first - 1] == asked[-1]
    said = [i for i, scored in zip(found.ids, found.loss_mask, strict=True) if scored]
    assert tokenizer.decode(said) == "So<eos>Tens<eos>"


def test_a_text_that_a_tokenizer_begins_with_a_blank_is_not_torn_apart() -> None:
    tokenizer = make_tokenizer(60)
    template = "{% for m in messages %}{{ m.role[0] }} {{ m.content }}<eos>{% endfor %}"
    messages = [{"role": "user", "content": "ten"}, {"role": "assistant", "content": "then they"}]
    found = outcome(tokenizer, {"messages": messages}, template + "{% if add_generation_prompt %}a {% endif %}")
    assert isinstance(found, Document)
    assert tokenizer.decode(found.ids) == "u ten<eos> a then they<eos>"
    said = [i for i, scored in zip(found.ids, found.loss_mask, strict=True) if scored]
    assert tokenizer.decode(said).strip() == "then they<eos>"


def test_a_text_file_is_no_conversation(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("messages")
    with pytest.raises(UserError, match=r"x\.txt is plain text"):
        load_documents([DatasetRecipe(path=str(tmp_path / "x.txt"), type="chat")], tokenizer, chat_template=CHATML)


def test_a_slow_tokenizer_is_refused_where_it_is_needed_to_tell_places() -> None:
    class Slow:
        is_fast = False

    Rules(DatasetRecipe(path="x"), Slow())
    for settings in ({"type": "chat"}, {"split_long": "paragraph"}):
        with pytest.raises(UserError, match="cannot tell where"):
            Rules(DatasetRecipe(path="x", **settings), Slow())
