"""YAML as recipes are written: plain mappings, lists and scalars, each key with its line. Knows nothing of recipes.

PyYAML alone reads `1e-5` as text, takes the last of two equal keys without a word, and builds objects from tags.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import yaml

KeyPath = tuple[str | int, ...]


class Problem(NamedTuple):
    """Something wrong in a file: its line from 1 (0 where it has none), and a sentence that says what."""

    line: int
    sentence: str


_FLOAT_TAG = "tag:yaml.org,2002:float"
_NUMBER_TAGS = (_FLOAT_TAG, "tag:yaml.org,2002:int")
_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
_HALF = re.compile("[\ud800-\udfff]")
_MAX_DEPTH = 20
_MAX_NUMBER = 100
_STARTS = (
    yaml.BlockMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
)
_ENDS = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


class _Loader(yaml.SafeLoader):
    """Safe loader that reads 1e-5 as a number, as YAML 1.2 does."""


class _Dumper(yaml.SafeDumper):
    """Its counterpart: puts text that looks like such a number into quotes."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)  # lists indented below their key, as people write them


for _resolver in (_Loader, _Dumper):
    _resolver.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+.0123456789"))


def read_yaml(text: str) -> tuple[dict[Any, Any], dict[KeyPath, int], list[Problem]]:
    """Reads one YAML mapping.

    Args:
        text: the document.

    Returns:
        The values; the line (from 1) of every key and list item by its path; and the problems that leave the rest
        readable (repeated keys).

    Raises:
        ValueError: it is no YAML, not one mapping, nested absurdly deep, or uses tags, anchors or aliases.

    >>> read_yaml("learning_rate: 1e-5")[0]
    {'learning_rate': 1e-05}
    """
    try:
        depth = 0
        for token in yaml.scan(text, Loader=_Loader):
            # Here rather than later, since PyYAML's time grows with the square of the depth.
            depth += isinstance(token, _STARTS) - isinstance(token, _ENDS)
            if depth > _MAX_DEPTH:
                raise ValueError(f"line {token.start_mark.line + 1}: nested more than {_MAX_DEPTH} deep")
            if isinstance(token, yaml.TagToken | yaml.AnchorToken | yaml.AliasToken):
                kind = type(token).__name__.removesuffix("Token").lower()
                raise ValueError(
                    f"line {token.start_mark.line + 1}: YAML {kind}s are not read here, write plain values"
                )
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if not isinstance(node, yaml.MappingNode):
                raise ValueError("it is not a list of `key: value` lines")
            lines: dict[KeyPath, int] = {}
            problems: list[Problem] = []
            return _build(loader, node, (), lines, problems), lines, problems
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def write_yaml(values: dict[str, Any]) -> str:
    """Writes a mapping in its own order; `read_yaml` reads the same values back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _build(loader: _Loader, node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], problems: list[Problem]) -> Any:
    if isinstance(node, yaml.MappingNode):
        values: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ValueError(f"line {key_node.start_mark.line + 1}: a key must be a plain name")
            _refuse_half_characters(key_node)
            key = str(key_node.value)
            here, line = (*path, key), key_node.start_mark.line + 1
            if key in values:
                sentence = f"{dotted(here)} (line {line}) stands there twice, first on line {lines[here]}"
                problems.append(Problem(line, sentence))
                continue
            lines[here] = line
            values[key] = _build(loader, value_node, here, lines, problems)
        return values
    if isinstance(node, yaml.SequenceNode):
        items = []
        for number, item in enumerate(node.value):
            lines[(*path, number)] = item.start_mark.line + 1
            items.append(_build(loader, item, (*path, number), lines, problems))
        return items
    _refuse_half_characters(node)
    if node.tag in _NUMBER_TAGS and len(node.value) > _MAX_NUMBER:  # some kinds take the square of their length
        raise ValueError(f"line {node.start_mark.line + 1}: a number of {len(node.value):,} characters")
    try:
        return loader.construct_object(node)
    except (ValueError, OverflowError) as error:  # such as the date 2024-13-45
        raise ValueError(f"line {node.start_mark.line + 1}: {error}") from None


def _refuse_half_characters(node: yaml.Node) -> None:
    """Such as "\\uD800" makes: no file, terminal or other library takes them."""
    if _HALF.search(node.value):
        raise ValueError(f"line {node.start_mark.line + 1}: half a character (a lone surrogate)")


def dotted(path: KeyPath) -> str:
    """A key's path as people write it.

    >>> dotted(("datasets", 0, "path"))
    'datasets[0].path'
    """
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
