"""Training text that the checkpoint writes itself, so that drafts are learnt on the text that they have to match.

Each batch of prompts is of one length, so that nothing is padded, and draws from a seed of its own: what it becomes
depends on nothing before it. So the batches go to disk one by one, and a run that was killed goes on with the same
text.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch

from zconvert.checkpoint.folder import writing
from zconvert.data.chat import prompt
from zconvert.data.documents import Document
from zconvert.data.reading import open_dataset
from zconvert.data.tokenising import BadRows, OnMessage, Outcome, Rules, at_row, parse, text_of
from zconvert.errors import UserError
from zconvert.recipe import SelfGeneratedRecipe


@dataclass(frozen=True)
class Writer:
    """The checkpoint that writes.

    Args:
        load: gives its transformers model, in evaluation mode, decoding causally; called only where text is missing.
        fingerprint: tells its weights from others.
        end_ids: tokens that end a text.
        suppressed_ids: tokens that are never to be drawn, such as the mask token.
    """

    load: Callable[[], Any]
    fingerprint: str
    end_ids: frozenset[int]
    suppressed_ids: frozenset[int]


def read_prompts(rules: Rules, on_message: OnMessage | None) -> list[list[int]]:
    """Token ids of all prompts of a self-generated dataset, in order.

    Raises:
        UserError: the prompts cannot be read, or there are none.
    """
    dataset = rules.dataset
    bad_rows = BadRows(dataset, on_message)
    rows = open_dataset(dataset, dataset.prompts_path).rows()

    def outcomes() -> Iterator[Outcome]:
        for row in rows:
            try:
                yield [Document(_prompt_ids(parse(row, dataset), rules), [])]
            except UserError as error:
                yield at_row(row, error)

    prompts = [document.ids for outcome in bad_rows.good(outcomes()) for document in outcome]
    bad_rows.summary()
    if not prompts:
        raise UserError(
            "there are no prompts to go on from",
            found=f"no rows in {dataset.prompts_path}",
            fix="check datasets[].self_generated.prompts in the recipe",
        )
    return prompts


def _prompt_ids(value: Any, rules: Rules) -> list[int]:
    dataset, tokenizer = rules.dataset, rules.tokenizer
    if dataset.type == "chat":
        return prompt(value, dataset, tokenizer, rules.chat_template)
    ids = list(tokenizer([text_of(value, *dataset.prompt_fields)], add_special_tokens=False)["input_ids"][0])
    bos = tokenizer.bos_token_id if dataset.add_bos else None
    return [bos, *ids] if bos is not None and ids[:1] != [bos] else ids


def identity(settings: SelfGeneratedRecipe, prompts: list[list[int]], writer: Writer) -> str:
    """A hash of all that decides the text."""
    parts = [
        settings.model_dump(mode="json", exclude={"prompts"}),
        prompts,
        writer.fingerprint,
        sorted(writer.end_ids),
        sorted(writer.suppressed_ids),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def write_texts(
    settings: SelfGeneratedRecipe,
    prompts: list[list[int]],
    writer: Writer,
    partial: Path,
    on_message: OnMessage | None = None,
) -> Iterator[Document]:
    """Prompts with their continuations, prompt by prompt and sample by sample.

    Args:
        settings: of the sampling.
        prompts: token ids, none empty.
        writer: the checkpoint.
        partial: file that collects the batches, a line each; what it holds already is not written again. The caller
            removes it when the documents are stored.
        on_message: is told how far it is.

    Raises:
        UserError: `partial` cannot be written.
    """
    jobs = [number for number in range(len(prompts)) for _ in range(settings.samples_per_prompt)]
    order = sorted(range(len(jobs)), key=lambda job: (len(prompts[jobs[job]]), job))
    batches: list[list[int]] = []
    for _, group in groupby(order, key=lambda job: len(prompts[jobs[job]])):
        while batch := list(islice(group, settings.batch_size)):
            batches.append(batch)
    with writing(partial):
        partial.parent.mkdir(parents=True, exist_ok=True)
        done = _written(partial, batches)
        with partial.open("ab") as file:
            model = writer.load() if len(done) < len(batches) else None
            for number in range(len(done), len(batches)):
                rows = [prompts[jobs[job]] for job in batches[number]]
                done.append(_continue(model, rows, settings, writer, number))
                file.write(json.dumps(done[-1]).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                if on_message is not None and (number + 1) % 100 == 0:
                    on_message(f"generated {number + 1:,} of {len(batches):,} batches of text")
    continuations: dict[int, list[int]] = {}
    for batch, texts in zip(batches, done, strict=True):
        continuations |= zip(batch, texts, strict=True)
    for job, number in enumerate(jobs):
        ids, more = prompts[number], continuations[job]
        scored = [settings.train_on_prompts and (position > 0) for position in range(len(ids))]
        yield Document([*ids, *more], [*scored, *[True] * len(more)])


def _written(partial: Path, batches: list[list[int]]) -> list[list[list[int]]]:
    """The batches that a killed run finished; its last line, if half-written, is cut off."""
    done: list[list[list[int]]] = []
    if not partial.exists():
        return done
    whole = 0
    for line in partial.read_bytes().splitlines(keepends=True)[: len(batches)]:
        try:
            texts = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            texts = None
        if not isinstance(texts, list) or len(texts) != len(batches[len(done)]):
            break
        done.append(texts)
        whole += len(line)
    with partial.open("r+b") as file:
        file.truncate(whole)
    return done


@torch.no_grad()
def _continue(
    model: Any, rows: list[list[int]], settings: SelfGeneratedRecipe, writer: Writer, number: int
) -> list[list[int]]:
    """Continuations of prompts of one length, without what follows an end."""
    from transformers import GenerationConfig

    ids = torch.tensor(rows, device=model.device)
    sampling = settings.temperature > 0
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=sampling,
        temperature=settings.temperature if sampling else None,
        top_p=settings.top_p if sampling else None,
        top_k=0 if sampling else None,
        eos_token_id=sorted(writer.end_ids) or None,
        pad_token_id=min(writer.end_ids, default=0),
        suppress_tokens=sorted(writer.suppressed_ids) or None,
        use_cache=True,
    )
    devices = [model.device.index or 0] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        digest = hashlib.sha256(f"{settings.seed}:{number}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:7], "big"))
        # The checkpoint's own generation config stays out of it, since its penalties and cuts are not its distribution:
        # what is None in the config that is given would be taken from there.
        own, model.generation_config = model.generation_config, GenerationConfig()
        try:
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        finally:
            model.generation_config = own
    found = []
    for row in out[:, ids.shape[1] :].tolist():
        end = next((place for place, token in enumerate(row) if token in writer.end_ids), len(row) - 1)
        found.append(row[: end + 1])
    return found
