"""Which token stands for "not known yet": an existing mask token, else a spare embedding row, else a new row.

Read from `tokenizer.json` alone; no tokenizer is built. Ids are dense in every tokenizer that can be extended: an
added token gets the id that follows the last one, whatever id its entry asks for.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from zconvert.checkpoint.headers import Headers, TensorInfo
from zconvert.checkpoint.json_patch import append_to_list, parse_json_object, patch_json, read_json, read_json_text
from zconvert.checkpoint.tokenizer_file import check_growth, read_without_merges
from zconvert.errors import UserError
from zconvert.tidar.families import language_config

KNOWN_MASK_TOKENS = ("<mask>", "[MASK]", "<|mask|>", "<|mask_token|>")
NEW_MASK_TOKEN = "<mask>"
ROW_MULTIPLE = 64
"""grown embeddings have a multiple of this many rows, as kernels like them"""
TOKENIZER_FILE = "tokenizer.json"
EMBEDDING_NAMES = (
    *("model.embed_tokens.weight", "embed_tokens.weight", "transformer.wte.weight"),
    *("language_model.model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),  # composite models
)
HEAD_NAMES = ("lm_head.weight", "embed_out.weight", "output.weight", "language_model.lm_head.weight")


@dataclass(frozen=True)
class MaskToken:
    """The chosen mask token."""

    id: int
    text: str
    source: Literal["existing", "spare_row", "grown", "virtual"]
    """where its embedding row is: an entry's own, a row beyond the tokenizer's entries, a row to add, or nowhere"""
    rows: int
    """embedding rows the checkpoint has with it; more than before only where `source` is grown"""


@dataclass(frozen=True)
class Vocabulary:
    """The entries of a tokenizer: `tokenizer.json`'s `model.vocab` together with its `added_tokens`."""

    ids: dict[str, int]
    texts: dict[int, str] = field(repr=False)
    added: frozenset[str] = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)


def read_vocabulary(folder: Path) -> Vocabulary:
    """Reads all entries of a checkpoint's tokenizer.

    Raises:
        UserError: there is no `tokenizer.json`, or it is malformed.
    """
    path = folder / TOKENIZER_FILE
    if not os.path.lexists(path):  # a link that leads nowhere is told of as what it is, by the reading
        others = [name for name in ("tokenizer.model", "vocab.json", "tekken.json") if (folder / name).exists()]
        raise UserError(
            f"{folder} has no {TOKENIZER_FILE}",
            found=", ".join(others) or "no tokenizer files",
            expected=f"a checkpoint with its tokenizer, in {TOKENIZER_FILE}",
            fix="copy the tokenizer's files into the folder; for older ones "
            f"AutoTokenizer.from_pretrained(SOURCE).save_pretrained(DIR) writes {TOKENIZER_FILE}",
        )
    loaded = read_json(folder / "tokenizer_config.json").get("fast_tokenizer_files")
    if loaded not in (None, [], [TOKENIZER_FILE]):
        raise UserError(
            f"{folder / 'tokenizer_config.json'} has another file than {TOKENIZER_FILE} loaded",
            found=f"fast_tokenizer_files: {loaded!r:.100}",
            expected=f"{TOKENIZER_FILE} alone, which is what was looked at",
            fix="take fast_tokenizer_files out, if you trust the checkpoint",
        )
    return _vocabulary(parse_json_object(read_without_merges(path), str(path)), path)


def embedding_tensor(headers: Headers, config: dict[str, Any]) -> TensorInfo:
    """The input embedding: by its usual name, else by shape.

    Raises:
        UserError: there is none, or it does not agree with `vocab_size`.
    """
    model = language_config(config)
    vocab_size, width = model.get("vocab_size"), model.get("hidden_size")
    named = [headers.tensors[name] for name in EMBEDDING_NAMES if name in headers.tensors]
    shaped = [t for t in headers.tensors.values() if t.shape == (vocab_size, width) and "embed" in t.name]
    found = next((t for t in [*named, *shaped] if t.name not in HEAD_NAMES and len(t.shape) == 2), None)
    if found is None:
        raise UserError(
            "the checkpoint has no input embedding",
            found=f"{len(headers.tensors)} tensors, none of the usual names",
            expected=f"one of {', '.join(EMBEDDING_NAMES)}, of shape [{vocab_size}, {width}]",
            fix="the checkpoint is incomplete, or not a language model: download or copy it again",
        )
    if vocab_size is not None and found.shape[0] != vocab_size:
        raise UserError(
            f"{found.name} does not agree with config.json",
            found=f"{found.shape[0]} rows, vocab_size {vocab_size}",
            expected="as many rows as vocab_size",
            fix="the files are of different checkpoints: download or copy them again",
        )
    return found


def choose_mask_token(
    folder: Path,
    headers: Headers,
    config: dict[str, Any],
    wanted: str | int | None = None,
    vocabulary: Vocabulary | None = None,
    *,
    virtual: bool = False,
) -> MaskToken:
    """Chooses the mask token: the tokenizer's own, else a spare row's id, else one that needs a new row.

    Args:
        folder: the checkpoint's folder, with the tokenizer's files.
        headers: its tensors.
        config: its `config.json`.
        wanted: text or id of the token to take instead; a text that the tokenizer lacks is added to it.
        vocabulary: the tokenizer's entries, where they were read already.
        virtual: none needs a row, so that where none is wanted it is an id that neither tokenizer nor embedding have.

    Raises:
        UserError: tokenizer and embedding do not fit, or `wanted` cannot be the mask token.
    """
    rows = embedding_tensor(headers, config).shape[0]
    vocabulary = vocabulary or read_vocabulary(folder)
    _check_fit(vocabulary, rows)
    if virtual and wanted is None:
        return MaskToken(rows, "", "virtual", rows)
    if isinstance(wanted, int):
        if wanted in vocabulary.texts:
            return _existing(folder, vocabulary, config, vocabulary.texts[wanted], rows)
        if wanted != len(vocabulary):
            raise UserError(
                f"id {wanted} cannot be the mask token",
                found=f"a tokenizer with ids 0 to {len(vocabulary) - 1}",
                expected=f"one of these, or {len(vocabulary)}: ids have no gaps",
                fix=f"--mask-token {len(vocabulary)}, or leave it out",
            )
        # A new entry was asked for by its id: its text must be new too.
        return _new(vocabulary, next(text for text in _new_texts() if text not in vocabulary.ids), rows)
    if wanted is not None and not wanted.strip():
        raise UserError(
            "the mask token has no text",
            found=repr(wanted),
            expected="a text such as <mask>, or an id",
            fix="give one, or leave it out: zconvert then chooses",
        )
    declared = _declared_mask_token(folder)
    for text in [wanted] if wanted is not None else [declared, *KNOWN_MASK_TOKENS]:
        if text is not None and text in vocabulary.ids:
            return _existing(folder, vocabulary, config, text, rows)
    return _new(vocabulary, wanted or declared or NEW_MASK_TOKEN, rows)


def tokenizer_patches(folder: Path, mask: MaskToken, vocabulary: Vocabulary | None = None) -> dict[str, str]:
    """New texts of the tokenizer's files, so that transformers knows the mask token by name and id.

    Args:
        folder: the checkpoint's folder.
        mask: from `choose_mask_token`.
        vocabulary: the tokenizer's entries, where they were read already.

    Returns:
        file name -> text, of the files that change.

    Raises:
        UserError: a file is malformed.
    """
    entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    texts: dict[str, str] = {}
    if mask.source == "virtual":
        return texts
    if mask.text not in (vocabulary or read_vocabulary(folder)).added:
        tokenizer = read_json_text(folder / TOKENIZER_FILE)
        added = {"id": mask.id, "content": mask.text, **entry}
        texts[TOKENIZER_FILE] = append_to_list(tokenizer, "added_tokens", added, name=TOKENIZER_FILE)
    for name, made in (("tokenizer_config.json", True), ("special_tokens_map.json", False)):
        if not (folder / name).exists():
            if made:
                texts[name] = patch_json("{}", {"mask_token": mask.text}) + "\n"
            continue
        text = read_json_text(folder / name)
        members = parse_json_object(text, name)
        if _text_of(members.get("mask_token")) != mask.text:
            texts[name] = text = patch_json(text, {"mask_token": mask.text}, name=name)
        decoder = members.get("added_tokens_decoder")
        # Where the list is there it is all that transformers 4 reads; where it is not, a list of one would be.
        if isinstance(decoder, dict) and str(mask.id) not in decoder:
            added = {str(mask.id): {"content": mask.text, **entry}}
            texts[name] = patch_json(text, added, inside=["added_tokens_decoder"], name=name)
    name = "added_tokens.json"
    if (folder / name).exists():
        text = read_json_text(folder / name)
        if mask.text not in parse_json_object(text, name):
            texts[name] = patch_json(text, {mask.text: mask.id}, name=name)
    return texts


def _vocabulary(document: dict[str, Any], path: Path) -> Vocabulary:
    check_growth(document, path)
    try:
        entries = document["model"]["vocab"]
        if isinstance(entries, list):  # unigram models: [text, score] in the order of ids
            ids = {str(text): place for place, (text, _) in enumerate(entries)}
        else:
            ids = {str(text): int(place) for text, place in entries.items()}
        added = {str(token["content"]): int(token["id"]) for token in document.get("added_tokens") or ()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is not a tokenizer",
            found=f"{type(error).__name__}: {error}",
            expected="model.vocab and added_tokens",
            fix="download or copy the file again",
        ) from error
    ids = {**added, **ids}  # an added token that the model has too goes by the model's id
    texts = {place: text for text, place in ids.items()}
    if len(texts) < len(ids):
        text, place = next((text, place) for text, place in ids.items() if texts[place] != text)
        raise UserError(
            f"{path} gives one id to two tokens",
            found=f"id {place} to {text!r} and {texts[place]!r}",
            expected="one id each",
            fix="download or copy the file again",
        )
    return Vocabulary(ids, texts, frozenset(added))


def _check_fit(vocabulary: Vocabulary, rows: int) -> None:
    if not vocabulary.ids:
        raise UserError("the tokenizer is empty", found="no entries", expected="a vocabulary", fix="copy it again")
    last = max(vocabulary.texts)
    if last >= rows:
        raise UserError(
            "the tokenizer does not fit the model: it has ids that the embedding has no row for",
            found=f"id {last} ({vocabulary.texts[last]!r}), {rows} embedding rows",
            expected=f"ids from 0 to {rows - 1}",
            fix="use the tokenizer that belongs to the checkpoint",
        )


def _existing(folder: Path, vocabulary: Vocabulary, config: dict[str, Any], text: str, rows: int) -> MaskToken:
    place = vocabulary.ids[text]
    for file, values in (
        ("config.json", config),
        ("generation_config.json", read_json(folder / "generation_config.json")),
    ):
        for role in ("eos_token_id", "bos_token_id", "pad_token_id"):
            if place in _as_list(values.get(role)):
                raise UserError(
                    f"{text!r} cannot be the mask token",
                    found=f"it is the {role} of {file}",
                    expected="a token that the text never holds",
                    fix="leave --mask-token out, or choose another one",
                )
    return MaskToken(place, text, "existing", rows)


def _new(vocabulary: Vocabulary, text: str, rows: int) -> MaskToken:
    place = len(vocabulary)
    if place not in vocabulary.texts and max(vocabulary.texts) + 1 == place:
        if place < rows:
            return MaskToken(place, text, "spare_row", rows)
        return MaskToken(place, text, "grown", (place // ROW_MULTIPLE + 1) * ROW_MULTIPLE)
    hole = next(i for i in range(place + 1) if i not in vocabulary.texts)
    raise UserError(
        "no mask token can be added to the tokenizer: its ids have gaps",
        found=f"{place} entries, none of them with id {hole}, the last with {max(vocabulary.texts)}",
        expected=f"ids from 0 to {place - 1}",
        fix="name an entry that texts never hold: --mask-token TEXT",
    )


def _new_texts() -> Iterator[str]:
    yield NEW_MASK_TOKEN
    yield from (f"<|mask_{number}|>" for number in itertools.count())


def _declared_mask_token(folder: Path) -> str | None:
    """The mask token that the tokenizer's configuration names."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        text = _text_of(read_json(folder / name).get("mask_token"))
        if text:
            return text
    return None


def _text_of(token: Any) -> str | None:
    """A special token's text: given as such, or as an entry with a `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _as_list(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else [value]
