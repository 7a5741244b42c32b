"""JSON patches: what is asked for changes, every other byte stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zconvert.checkpoint.json_patch import append_to_list, parse_json_object, patch_json, read_json_text
from zconvert.errors import UserError

CONFIG = """{
  "architectures": [
    "ZayaForCausalLM"
  ],
  "rms_norm_eps": 1e-05,
  "rope": {"theta":   5000000.0},
  "vocab_size": 384
}
"""


def test_a_new_member_goes_to_the_end_in_the_documents_own_indentation() -> None:
    patched = patch_json(CONFIG, {"tidar": {"block_size": 4, "stages": []}})
    assert patched == CONFIG[: CONFIG.rindex("\n}")] + (
        ',\n  "tidar": {\n    "block_size": 4,\n    "stages": []\n  }\n}\n'
    )


def test_replacing_a_member_leaves_every_other_byte() -> None:
    assert patch_json(CONFIG, {"vocab_size": 448}) == CONFIG.replace("384", "448")
    assert "1e-05" in patch_json(CONFIG, {"vocab_size": 1})


@pytest.mark.parametrize("key", ["architectures", "rope", "vocab_size"])
def test_a_removed_member_takes_one_comma_with_it(key: str) -> None:
    patched = patch_json(CONFIG, {}, remove=[key, "absent"])
    assert list(json.loads(patched)) == [k for k in json.loads(CONFIG) if k != key]
    assert "\n\n" not in patched


def test_the_only_member_can_be_removed() -> None:
    assert json.loads(patch_json('{\n  "a": 1\n}', {}, remove=["a"])) == {}


def test_removing_and_setting_the_same_member_sets_it() -> None:
    assert patch_json('{"a": 1}', {"a": 2}, remove=["a"]) == '{"a": 2}'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", '{\n  "k": [\n    1\n  ]\n}'),
        ('{"a":1}', '{"a":1,"k":[1]}'),
        ('{"a": 1, "b": 2}', '{"a": 1, "b": 2, "k": [1]}'),
        ('{"a": 1}', '{"a": 1, "k": [1]}'),
        ('{\n\t"a": 1\n}', '{\n\t"a": 1,\n\t"k": [\n\t\t1\n\t]\n}'),
        ('{\r\n "a": 1\r\n}\r\n', '{\r\n "a": 1,\r\n "k": [\r\n  1\r\n ]\r\n}\r\n'),
    ],
)
def test_the_style_of_the_document_is_followed(text: str, expected: str) -> None:
    assert patch_json(text, {"k": [1]}) == expected


def test_braces_commas_and_quotes_in_strings_are_not_taken_for_structure() -> None:
    text = '{"template": "{% if a %}\\"x\\": {}, [}", "\\u006b": 1}'
    assert patch_json(text, {"k": 2}) == text.replace("1}", "2}")


def test_of_repeated_members_the_one_that_parsers_keep_is_replaced() -> None:
    assert patch_json('{"a": 1, "a": 2}', {"a": 3}) == '{"a": 1, "a": 3}'
    assert json.loads(patch_json('{"a": 1, "b": 0, "a": 2}', {}, remove=["a"])) == {"b": 0}


def test_nested_objects_are_patched_in_place_and_made_where_missing() -> None:
    text = '{\n  "metadata": {\n    "total_size": 10\n  },\n  "weight_map": {}\n}'
    assert patch_json(text, {"total_size": 12}, inside=["metadata"]) == text.replace("10", "12")
    assert json.loads(patch_json(text, {"x": 1}, inside=["a", "b"]))["a"] == {"b": {"x": 1}}
    assert patch_json(text, {"w": "s"}, inside=["weight_map"]).endswith('"weight_map": {\n    "w": "s"\n  }\n}')


def test_appending_to_a_list_keeps_what_stands_in_it() -> None:
    text = '{\n  "added_tokens": [\n    {\n      "id": 0\n    }\n  ],\n  "model": {"vocab": {"a":   1}}\n}'
    patched = append_to_list(text, "added_tokens", {"id": 1})
    assert patched == text.replace("    }\n  ]", '    },\n    {\n      "id": 1\n    }\n  ]')


@pytest.mark.parametrize("text", ['{"ids":[]}', '{"ids": []}', '{\n  "ids": []\n}', "{}"])
def test_appending_makes_a_list_of_one_where_there_was_none(text: str) -> None:
    assert json.loads(append_to_list(text, "ids", 7)) == {"ids": [7]}


@pytest.mark.parametrize("text", ["", "{", '{"a": 1,}', "[1]", "null", '{"a": 1} x'])
def test_malformed_json_is_a_users_error(text: str) -> None:
    with pytest.raises(UserError, match=r"config\.json is malformed"):
        patch_json(text, {"k": 1}, name="config.json")


def test_a_member_of_the_wrong_kind_is_a_users_error() -> None:
    with pytest.raises(UserError, match="no list"):
        append_to_list('{"a": 1}', "a", 2)
    with pytest.raises(UserError, match="no object"):
        patch_json('{"a": 1}', {"x": 1}, inside=["a"])


def test_unreadable_and_binary_files_are_users_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_json_text(tmp_path / "none.json")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="not a JSON file"):
        read_json_text(tmp_path / "b.json")


def test_numbers_that_json_has_no_words_for_survive() -> None:
    assert parse_json_object(patch_json('{"limit": [0.0, Infinity], "n": NaN}', {"k": 1}))["k"] == 1
