"""Conversations -> token ids, and which of them are scored.

The tokenizer's chat template writes a conversation out; what is scored are the turns of some roles, each without the
header that asks for it. Where they lie is told by the template's own `{% generation %}` marks, else by what each
message adds to the text of those before it; that difference is verified against the whole conversation.

    <user> 2+2? <end> <assistant> 4 <end>
    .      .    .     .           1 1        the last one with train_on_eot
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from zconvert.data import templates
from zconvert.data.documents import Document
from zconvert.errors import UserError
from zconvert.recipe import DatasetRecipe

_MARKS = re.compile(r"\{%-?\+?\s*generation\s*[-+]?%\}")
_FIX = "mend the row, or leave such rows out: datasets[].on_bad_row: skip"

Message = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """A scored stretch of a conversation's text: characters `start` to `end`, and the message's own content.

    None: the template marked the stretch, and may have left the token that ends the turn right behind it.
    """

    start: int
    end: int
    content: str | None


def conversation(row: dict[str, Any], dataset: DatasetRecipe, tokenizer: Any, template: str | None) -> Document:
    """One conversation as a document.

    Args:
        row: has the messages, and perhaps tools, under the keys that `dataset` names.
        dataset: the entry of the recipe.
        tokenizer: a fast transformers tokenizer.
        template: Jinja text; the tokenizer's own where None.

    Raises:
        UserError: the row is no conversation, the template refuses it, or nothing in it is scored.
    """
    messages, tools = messages_of(row, dataset), _tools_of(row, dataset)
    chosen = template_of(tokenizer, template, tools)
    roles = set(dataset.roles_to_train)
    if _MARKS.search(chosen) and roles == {"assistant"}:
        text, turns = _marked_turns(messages, tools, tokenizer, chosen)
    else:
        text, turns = _added_turns(messages, tools, tokenizer, chosen, roles)
    if not text.strip():
        raise UserError("the template makes an empty text of it", fix=_FIX)
    ids, offsets = _encode(text, [turn.start for turn in turns], tokenizer)
    turns = [Turn(max(turn.start, _bos_length(text, tokenizer)), turn.end, turn.content) for turn in turns]
    scored = scored_tokens(text, ids, offsets, turns, special_ids(tokenizer), train_on_eot=dataset.train_on_eot)
    if not any(scored):
        spoken = ", ".join(sorted({message["role"] for message in messages}))
        raise UserError(
            "nothing in the conversation is scored",
            found=f"messages of {spoken}",
            expected=f"something said by {' or '.join(dataset.roles_to_train)}",
            fix=_FIX,
        )
    return Document(ids, scored)


def prompt(row: dict[str, Any], dataset: DatasetRecipe, tokenizer: Any, template: str | None) -> list[int]:
    """Token ids of a conversation up to where the assistant is to speak; its own last turn is left out."""
    messages, tools = messages_of(row, dataset), _tools_of(row, dataset)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise UserError("the conversation has no prompt", expected="a message before the assistant's", fix=_FIX)
    return asking_ids(messages, tokenizer, template, tools)


def asking_ids(
    messages: Sequence[Message], tokenizer: Any, template: str | None = None, tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """Token ids of a conversation and what asks the assistant to speak next.

    Args:
        messages: each with its role.
        tokenizer: a fast transformers tokenizer.
        template: Jinja text; the tokenizer's own where None.
        tools: that the template is told of.

    Raises:
        UserError: there is no template, or it refuses the conversation.
    """
    text, _ = _render(messages, tools, tokenizer, template_of(tokenizer, template, tools), ask=True)
    return list(tokenizer([text], add_special_tokens=False)["input_ids"][0])


def messages_of(row: dict[str, Any], dataset: DatasetRecipe) -> list[Message]:
    """The messages of a row, checked; keys without a value (as Parquet has them) are left out."""
    name = dataset.field_messages
    if not isinstance(row, dict):
        raise UserError("it is plain text", expected="a row with messages", fix="give a .jsonl or .parquet file")
    if name not in row:
        raise UserError(
            f"it lacks {name!r}", found="keys " + ", ".join(map(repr, row)), fix="see datasets[].field_messages"
        )
    messages = row[name]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(
            f"{name!r} is no list of messages",
            found=type(messages).__name__,
            expected='[{"role": "user", "content": "…"}, …]',
            fix=_FIX,
        )
    if not messages:
        raise UserError(f"{name!r} is empty", expected="at least one message", fix=_FIX)
    for number, message in enumerate(messages, start=1):
        if not isinstance(message.get("role"), str):
            raise UserError(f"message {number} has no role", found="keys " + ", ".join(map(repr, message)), fix=_FIX)
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _tools_of(row: dict[str, Any], dataset: DatasetRecipe) -> list[dict[str, Any]] | None:
    tools = row.get(dataset.field_tools)
    if isinstance(tools, str):  # tables keep what has no fixed columns as JSON
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{dataset.field_tools!r} is text, but not JSON", found=error, fix=_FIX) from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UserError(f"{dataset.field_tools!r} is no list of tools", found=type(tools).__name__, fix=_FIX)
    return tools or None


def template_of(tokenizer: Any, template: str | None, tools: list[dict[str, Any]] | None = None) -> str:
    """The Jinja text in use.

    Raises:
        UserError: there is none.
    """
    if template is not None:
        return template
    try:
        return str(tokenizer.get_chat_template(tools=tools))
    except ValueError as error:
        raise UserError(
            "the tokenizer has no chat template to write conversations with",
            found=str(error).splitlines()[0],
            fix="give a file with a Jinja template: chat_template in the recipe",
        ) from None


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of control tokens, such as the end of a turn."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def _render(
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None,
    tokenizer: Any,
    template: str,
    *,
    ask: bool = False,
    marks: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation's text, and with `marks` the template's stretches of generation."""
    names = tokenizer.special_tokens_map
    text, spans = templates.shared.render(messages, template, tools=tools, ask=ask, marks=marks, names=names)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("it holds half a character (a lone surrogate)", fix="mend the text") from None
    return text, spans


def _marked_turns(
    messages: list[Message], tools: list[dict[str, Any]] | None, tokenizer: Any, template: str
) -> tuple[str, list[Turn]]:
    text, spans = _render(messages, tools, tokenizer, template, marks=True)
    return text, [Turn(start, end, None) for start, end in spans]


def _added_turns(
    messages: list[Message], tools: list[dict[str, Any]] | None, tokenizer: Any, template: str, roles: set[str]
) -> tuple[str, list[Turn]]:
    """Each trained message's own text: what it adds to the messages before it and the header that asks for it."""
    text, _ = _render(messages, tools, tokenizer, template)
    turns = []
    for number, message in enumerate(messages):
        if message["role"] not in roles:
            continue
        with_it = text
        if number + 1 < len(messages):
            with_it, _ = _render(messages[: number + 1], tools, tokenizer, template)
        start = 0
        if number:
            # The template knows how to ask the assistant only; another role's header counts as its own words.
            before, _ = _render(messages[:number], tools, tokenizer, template, ask=message["role"] == "assistant")
            start = len(before)
            if not with_it.startswith(before):
                raise _not_verified(number, "the text that asks for it is not how it begins")
        elif message["role"] == "assistant":
            start = _header_length(with_it, message, tools, tokenizer, template)
        if not text.startswith(with_it):
            raise _not_verified(number, "what follows changes how it is written")
        content = message.get("content")
        turns.append(Turn(start, len(with_it), content if isinstance(content, str) else ""))
    return text, turns


def _header_length(text: str, message: Message, tools: Any, tokenizer: Any, template: str) -> int:
    """Where the first message's own words begin, which no messages before it tell: after what is asked with."""
    try:
        before, _ = _render([], tools, tokenizer, template, ask=True)
    except UserError:
        before = ""
    if before and text.startswith(before):
        return len(before)
    raise _not_verified(0, "the template cannot ask for a first message")


def _not_verified(number: int, reason: str) -> UserError:
    return UserError(
        f"it cannot be told which tokens message {number + 1} adds",
        found=reason,
        expected="a template that writes each message the same way whatever follows, or has {% generation %} marks",
        fix="give such a template (chat_template in the recipe), or leave such rows out: datasets[].on_bad_row: skip",
    )


def _encode(text: str, starts: list[int], tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and offsets of a text, with a token of its own beginning at every start of a turn.

    In decoding a turn begins after the tokens of what asks for it. A token that reaches over that place, such as ` Yes`
    behind a header that ends in a blank, would never be asked for there, so the text is cut at such places.
    """
    ids, offsets = _encode_pieces([text], tokenizer)
    over = [place for place in starts if any(start < place < end for start, end in offsets)]
    if over:
        cuts = [0, *over, len(text)]
        cut_ids, cut_offsets = _encode_pieces([text[a:b] for a, b in pairwise(cuts)], tokenizer)
        # Tokenizers that put a blank before every text would put one into the middle: those are left as they were.
        if tokenizer.decode(cut_ids) == tokenizer.decode(ids):
            return cut_ids, cut_offsets
    return ids, offsets


def _encode_pieces(pieces: list[str], tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    encoded = tokenizer(pieces, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    begin = 0
    for piece, its_ids, its_offsets in zip(pieces, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        ids += its_ids
        offsets += [(begin + start, begin + end) for start, end in its_offsets]
        begin += len(piece)
    return ids, offsets


def scored_tokens(
    text: str,
    ids: list[int],
    offsets: list[tuple[int, int]],
    turns: list[Turn],
    special: frozenset[int],
    *,
    train_on_eot: bool,
) -> list[bool]:
    """Which tokens are scored: those that have something of a turn in them, and its end as wished.

    The end of a turn is its last control token with nothing but white space after it (which is never scored: nobody
    generates it), or the control token right behind a marked turn, or, of a template that knows none, the white space
    that it puts after the message.

    Args:
        text: the whole conversation.
        ids: its tokens.
        offsets: (start, end) of each in the text, in characters.
        turns: what was said, not overlapping.
        special: ids of control tokens.
        train_on_eot: score the ends of turns.
    """
    scored = [False] * len(ids)
    for turn in turns:
        inside = [n for n, (start, end) in enumerate(offsets) if start < turn.end and end > turn.start]
        after = next((n for n, (start, end) in enumerate(offsets) if start >= turn.end and start < end), None)
        marked = turn.content is None
        ends = [n for n in inside if ids[n] in special and not text[offsets[n][1] : turn.end].strip()]
        if ends:
            said, end_of_turn = [n for n in inside if n < ends[0]], ends
        elif (
            marked and after is not None and ids[after] in special and not text[turn.end : offsets[after][0]].strip(" ")
        ):
            said, end_of_turn = inside, [after]
        else:
            said_end = _words_end(text, turn)
            said = [n for n in inside if offsets[n][0] < said_end]
            end_of_turn = [n for n in inside if offsets[n][0] >= said_end]
        for n in said + (end_of_turn if train_on_eot else []):
            scored[n] = True
    return scored


def _bos_length(text: str, tokenizer: Any) -> int:
    """Characters of the BOS token that a conversation begins with: nobody has to predict it."""
    bos = tokenizer.bos_token
    return len(bos) if bos and text.startswith(bos) else 0


def _words_end(text: str, turn: Turn) -> int:
    """Where the white space begins that the template puts after a message."""
    stretch = text[turn.start : turn.end]
    bare = len(stretch.rstrip())
    for content in (turn.content or "", (turn.content or "").strip()):
        at = stretch.rfind(content) + len(content)
        if content and at >= bare:
            return turn.start + at
    return turn.start + bare
