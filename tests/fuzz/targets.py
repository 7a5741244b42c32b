"""What is fuzzed: one function a target takes a stranger's bytes, and returns, or raises what is a fault.

Own errors (`UserError`, `ApiError`) are how bytes should be refused. What is accepted is held against something: the
safetensors library, the same file read back, the members that were not to change.
"""

from __future__ import annotations

import functools
import json
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any, BinaryIO

from hypothesis import strategies as st

from tests.fuzz.mutating import mutate
from tests.fuzz.seeds import seeds
from zconvert.checkpoint.describe import describe
from zconvert.checkpoint.headers import INDEX_FILE, SINGLE_FILE, read_headers
from zconvert.checkpoint.json_patch import append_to_list, parse_json_object, patch_json
from zconvert.checkpoint.listing import list_tensors
from zconvert.checkpoint.source import CONFIG_FILE, Source
from zconvert.errors import UserError
from zconvert.planning.model import facts_from_config
from zconvert.recipe import load_recipe
from zconvert.recipe.loading import BY_STAGE, dump_recipe
from zconvert.recipe.yaml_text import read_yaml, write_yaml
from zconvert.serving.protocol import ApiError, Chat, Completion, parse

Target = Callable[[bytes], None]
MOST_SAID = 20_000
"""characters of an error; one that quotes all of a large file is a fault too"""


def fuzz_header(data: bytes) -> None:
    """A weight file. An odd first byte asks for the length to be put before the header, which ends at byte 0."""
    if data[:1] and data[0] % 2:
        header, _, rest = data[1:].partition(b"\0")
        data = struct.pack("<Q", len(header)) + header + rest
    with _own_errors():
        headers = read_headers(Path("folder"), _InMemory(data))
        _agrees_with_safetensors(headers.tensors, data)


def fuzz_index(data: bytes) -> None:
    """An index, beside one good shard: nothing but the folder's own files may be opened for it."""
    folder = _folder()
    (folder / INDEX_FILE).write_bytes(data)
    with _nothing_opened_outside(folder):
        with _own_errors():
            for shard in read_headers(folder).shards:
                assert (folder / shard.name).parent.resolve() == folder.resolve()
        with _own_errors():
            list_tensors(Source(folder, "fuzzed"))


def fuzz_recipe(data: bytes) -> None:
    """A recipe of the stage that the first byte says: one that is accepted is the same when written and read again."""
    path = _folder() / "recipe.yaml"
    path.write_bytes(data[1:])
    kind = list(BY_STAGE.values())[(data[0] if data else 0) % len(BY_STAGE)]
    with _own_errors():
        recipe = load_recipe(path, kind)
        again = path.with_name("again.yaml")
        again.write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe(again, kind) == recipe


def fuzz_json_patch(data: bytes) -> None:
    """A JSON file that is edited; the first byte says how. What was not to change does not."""
    how, text = data[:1] or b"\0", data[1:].decode("utf-8", errors="replace")
    changes = {"tidar": {"block_size": 4, "proposals": [1, 2]}, "new": None, "old": "text"}
    inside = {0: [], 1: ["inner"], 2: ["inner", "deeper"]}[how[0] % 3]
    with _own_errors():
        if how[0] % 4 == 3:
            after = json.loads(append_to_list(text, "ids", 3))
            assert after["ids"][-1] == 3
            changed = {"ids"}
        else:
            after = json.loads(patch_json(text, changes, remove=["gone"], inside=inside))
            place = functools.reduce(lambda value, key: value[key], inside, after)
            assert {key: place[key] for key in changes} == changes
            assert "gone" not in place
            changed = {inside[0]} if inside else {*changes, "gone"}
        before = parse_json_object(text)
        assert _others(before, changed) == _others(after, changed)


def fuzz_request(data: bytes) -> None:
    """A request to the server, of both kinds: its errors are short JSON."""
    for kind in (Completion, Chat):
        try:
            asked = parse(data, kind)
        except ApiError as refusal:
            _is_short(json.dumps(refusal.body))
            continue
        assert asked.choices >= 1
        assert 0 <= asked.heat <= 2
        assert asked.new_tokens is None or asked.new_tokens >= 1
        if isinstance(asked, Chat):
            json.dumps(asked.conversation)


def fuzz_config(data: bytes) -> None:
    """A config.json beside good weights: what inspect and plan tell of it is JSON."""
    folder = _folder()
    (folder / CONFIG_FILE).write_bytes(data)
    (folder / INDEX_FILE).unlink(missing_ok=True)
    with _nothing_opened_outside(folder):
        with _own_errors():
            json.dumps(describe(Source(folder, "fuzzed")), allow_nan=False)
        with _own_errors():
            facts_from_config(parse_json_object(data.decode("utf-8", errors="replace")), "fuzzed")


TARGETS: dict[str, Target] = {
    "header": fuzz_header,
    "index": fuzz_index,
    "recipe": fuzz_recipe,
    "json_patch": fuzz_json_patch,
    "request": fuzz_request,
    "config": fuzz_config,
}


def mutated(target: str, data: bytes, random: Random) -> bytes:
    """An input of a target with some of its values changed, where it is a document."""
    if target == "recipe":
        return mutate(data, random, prefix=1, parse=lambda text: read_yaml(text)[0], write=_recipe_text)
    return mutate(data, random, prefix=1 if target in ("header", "json_patch") else 0)


def inputs(target: str) -> st.SearchStrategy[bytes]:
    """Good inputs with some values changed, and bytes of all kinds."""
    changed = st.builds(
        lambda seed, number: mutated(target, seed, Random(number)), st.sampled_from(seeds(target)), st.integers(0)
    )
    return (
        changed
        | st.binary(max_size=200)
        | st.text(max_size=200).map(lambda text: text.encode("utf-8", errors="replace"))
    )


def _recipe_text(document: Any) -> str:
    return write_yaml(document) if isinstance(document, dict) else json.dumps(document)


@dataclass(frozen=True)
class _InMemory:
    """A checkpoint's only weight file."""

    data: bytes

    def names(self) -> set[str]:
        return {SINGLE_FILE}

    def size(self, name: str) -> int:
        return len(self.data)

    def open(self, name: str) -> BinaryIO:
        return BytesIO(self.data)


@contextmanager
def _own_errors() -> Iterator[None]:
    try:
        yield
    except UserError as refusal:
        _is_short(str(refusal))


def _is_short(said: str) -> None:
    assert len(said) < MOST_SAID, f"an error of {len(said)} characters"


def _agrees_with_safetensors(tensors: dict[str, Any], data: bytes) -> None:
    from safetensors import SafetensorError, deserialize

    try:
        theirs = {name: (tuple(entry["shape"]), bytes(entry["data"])) for name, entry in deserialize(data)}
    except SafetensorError as error:
        raise AssertionError("safetensors refuses what was accepted here") from error
    assert theirs == {name: (t.shape, data[t.start : t.end]) for name, t in tensors.items()}


def _others(members: dict[str, Any], changed: set[str]) -> str:
    """All but the changed members, as text: NaN is not equal to itself."""
    return json.dumps({key: value for key, value in members.items() if key not in changed}, sort_keys=True)


@functools.cache
def _folder() -> Path:
    """A folder with the good weight files `model.safetensors`' shards are named after; it goes with the process."""
    folder = Path(_kept().name)
    header = json.dumps({"model.embed_tokens.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}})
    (folder / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(16))
    return folder


@functools.cache
def _kept() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="zconvert-fuzz-", ignore_cleanup_errors=True)


_allowed: Path | None = None
_strays: list[str] = []


@contextmanager
def _nothing_opened_outside(folder: Path) -> Iterator[None]:
    """Fails where a file outside of the folder is opened, but for Python's own modules."""
    global _allowed
    _watch_opens()
    _allowed = folder
    _strays.clear()
    try:
        yield
    finally:
        _allowed = None
    assert not _strays, f"opened outside of the folder: {_strays}"


@functools.cache
def _watch_opens() -> None:
    def seen(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and _allowed is not None and isinstance(arguments[0], str):
            place = Path(arguments[0])
            modules = place.suffix in (".py", ".pyc", ".so") or "__pycache__" in place.parts
            if not modules and not place.is_relative_to(_allowed):
                _strays.append(arguments[0])

    sys.addaudithook(seen)
