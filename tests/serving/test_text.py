"""Text as it grows: whole characters only, and nothing of a stop string, however tokens and pieces fall."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoint.tiny import make_tokenizer
from zconvert.checkpoint.load import prompt_ids
from zconvert.serving.text import GrowingText, StopStrings, TextStream


def test_streamed_pieces_add_up_to_the_text_with_its_spaces() -> None:
    tokenizer = make_tokenizer(60)
    prompt = prompt_ids(tokenizer, "ten tall")
    tokens = tokenizer(" trees stand there", add_special_tokens=False).input_ids
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.add((token,)) for token in tokens] + [stream.flush()]
    assert "".join(pieces) == tokenizer.decode(prompt + tokens, skip_special_tokens=True)[len("ten tall") :]
    assert pieces[0].startswith(" ")


def test_an_incomplete_character_waits_for_its_bytes() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    tokens = tokenizer("aé€").input_ids
    stream = TextStream(tokenizer, tokens[:1])
    assert [stream.add((token,)) for token in tokens[1:-1]] == ["", "é", "", ""]
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"


@given(st.lists(st.text("ab", max_size=4), max_size=12), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_text_ends_before_the_stop_string_that_is_complete_first_however_it_is_cut(
    pieces: list[str], strings: list[str]
) -> None:
    whole = "".join(pieces)
    ends = [whole.index(stop) + len(stop) for stop in strings if stop in whole]
    expected = whole
    if ends:
        until = whole[: min(ends)]
        expected = until[: min(len(until) - len(stop) for stop in strings if until.endswith(stop))]
    stops = StopStrings(strings)
    shown = [stops.add(piece) for piece in pieces]
    assert stops.found == bool(ends)
    assert "".join(shown) + stops.flush() == expected
    assert all(expected.startswith("".join(shown[:count])) for count in range(len(shown)))


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    stops = StopStrings(["\n\nQ:", "END"])
    assert [stops.add(piece) for piece in ("one\n", "two E", "N", "d\n\n", "Q")] == ["one", "\ntwo ", "", "ENd", ""]
    assert stops.flush() == "\n\nQ"


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_a_growing_text_tells_how_many_tokens_are_the_whole(at_once: int) -> None:
    tokenizer = make_tokenizer(60)
    prompt = prompt_ids(tokenizer, "ten tall")
    tokens = tokenizer(" trees stand there and then they rest", add_special_tokens=False).input_ids
    text, shown, whole = GrowingText(tokenizer, prompt, ["there", "rest"]), "", None
    for count in range(at_once, len(tokens) + at_once, at_once):
        whole = text.stop(tokens[:count])
        shown += text.take()
        if whole is not None:
            break
    assert shown + text.take(final=True) == " trees stand "
    assert whole is not None
    assert tokenizer.decode(tokens[:whole]).endswith("there")
    assert not tokenizer.decode(tokens[: whole - 1]).endswith("there")


def test_a_text_without_stop_strings_goes_to_its_end() -> None:
    tokenizer = make_tokenizer(60)
    prompt = prompt_ids(tokenizer, "ten tall")
    tokens = tokenizer(" trees stand", add_special_tokens=False).input_ids
    text = GrowingText(tokenizer, prompt)
    assert text.stop(tokens[:2]) is None
    first = text.take()
    assert text.stop(tokens) is None
    assert first + text.take(final=True) == " trees stand"
