"""Longer context: documents chosen by length, and losses by position before and after, so that its use is seen."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zconvert.checkpoint.folder import write_file
from zconvert.checkpoint.rope import RopeChange, config_changes, extended, original_length
from zconvert.checkpoint.source import Source, read_config
from zconvert.data.documents import Documents
from zconvert.errors import UserError
from zconvert.recipe.extend_context import ContextSection
from zconvert.tidar.families import language_config
from zconvert.tidar.layout import packed_layout
from zconvert.tidar.model import LayoutModel
from zconvert.tidar.settings import TidarSettings
from zconvert.training.evaluating import evaluating
from zconvert.training.loss import cross_entropy_sum
from zconvert.training.pipeline import flat

CONTEXT_FILE = "context.json"
"""in a run's folder: losses by position, before and after"""
_VIEW = ".base"


class ContextExtension:
    """What the extend-context stage does beside training."""

    def __init__(
        self, source: Source, settings: TidarSettings, section: ContextSection, run_dir: Path, *, writes: bool = True
    ) -> None:
        """Checks whether the checkpoint can be extended so; nothing is written yet.

        Args:
            source: the checkpoint.
            settings: its own.
            section: of the recipe.
            run_dir: of the run.
            writes: this process writes the report, one of several.

        Raises:
            UserError: it cannot.
        """
        if settings.mode == "gated":
            raise UserError(
                "the context of a gated checkpoint cannot be extended",
                found="a frozen source, which has to learn the new positions",
                fix="extend the source first, and convert it after that",
            )
        self.original, self.settings, self.section, self.run_dir = source, settings, section, run_dir
        self.writes = writes
        config = language_config(read_config(source.folder))
        self.change = RopeChange(
            section.target_len,
            section.original_len,
            section.rope,
            section.rope_theta,
            section.attention_factor,
            section.layer_types,
        )
        self.original_len = original_length(config, self.change)
        self.changes = config_changes(config, self.change)
        before = flat(config)
        self.told = ", ".join(
            f"{key} {before.get(key)} → {value}"
            for key, value in flat(self.changes).items()
            if before.get(key) != value
        )
        """what changes, in one line"""

    def make_source(self) -> None:
        """Makes the folder behind `source`; one process does."""
        extended(self.original, self.change, self.run_dir / _VIEW)

    @property
    def source(self) -> Source:
        """The checkpoint with its positions changed, as a folder of links in the run's folder."""
        return Source(self.run_dir / _VIEW, self.original.name, self.original.revision)

    def choose(self, documents: Documents, seed: int) -> Documents:
        """The training documents: see `prefer_long`."""
        return prefer_long(documents, self.original_len, self.section.long_share, seed)

    def report_before(self, load: Callable[[], LayoutModel], documents: Documents, measured_on: str) -> None:
        """Writes the losses of the checkpoint as it was, unless a run that is continued has done so already.

        Args:
            load: makes the unextended model.
            documents: held-out ones, of which the longest are measured.
            measured_on: where they come from, in words.
        """
        longest = self._longest(documents)
        key = {
            "original_len": self.original_len,
            "target_len": self.section.target_len,
            "config": self.changes,
            "measured_on": measured_on,
            "tokens": sum(map(len, longest)),
        }
        if self.report().get("before") and key.items() <= self.report().items():
            return
        before = position_losses(load(), longest, self.settings, self.section.target_len, self.section.buckets)
        self._write({**key, "before": before})

    def report_after(self, model: LayoutModel, documents: Documents) -> None:
        """Adds the losses of the trained model, and removes the folder of links."""
        longest = self._longest(documents)
        after = position_losses(model, longest, self.settings, self.section.target_len, self.section.buckets)
        self._write({**self.report(), "after": after})

    def close(self) -> None:
        """Removes the folder of links; the process that made it does."""
        shutil.rmtree(self.run_dir / _VIEW, ignore_errors=True)

    def report(self) -> dict[str, Any]:
        """What was written so far."""
        try:
            found = json.loads((self.run_dir / CONTEXT_FILE).read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _longest(self, documents: Documents) -> list[Tensor]:
        """(n,) ids of the longest documents, cut to the target; in their own order."""
        by_length = sorted(range(len(documents)), key=lambda number: -documents.length(number))
        chosen = sorted(by_length[: self.section.report_documents])
        return [documents.tokens(number)[0][: self.section.target_len].long() for number in chosen]

    def _write(self, document: dict[str, Any]) -> None:
        if self.writes:
            write_file(self.run_dir / CONTEXT_FILE, json.dumps(document) + "\n")


def prefer_long(documents: Documents, longer_than: int, share: float, seed: int) -> Documents:
    """Leaves short documents out, drawn by the seed, until long ones make up a share of the tokens.

    Args:
        documents: all there are.
        longer_than: tokens; documents with more are long, and all of them stay.
        share: 0 … 1 of the tokens.
        seed: fixes which ones leave.

    Raises:
        UserError: no document is long.
    """
    lengths = documents.ends.diff(prepend=documents.ends.new_zeros(1))
    long = lengths > longer_than
    long_tokens = int(lengths[long].sum())
    if share == 0 or long_tokens >= share * documents.token_count:
        return documents
    if not long_tokens:
        raise UserError(
            f"no document is longer than {longer_than:,} tokens, so nothing can teach the longer context",
            found=f"{len(documents):,} documents, the longest of {int(lengths.max()):,} tokens",
            fix="give longer documents, or set context.long_share to 0",
        )
    room = long_tokens * (1 - share) / share
    short = (~long).nonzero().flatten()
    short = short[torch.randperm(len(short), generator=torch.Generator().manual_seed(seed))]
    stays = long.clone()
    stays[short[lengths[short].cumsum(0) <= room]] = True
    of_token = stays.repeat_interleave(lengths)
    return Documents(documents.ids[of_token], documents.loss_mask[of_token], lengths[stays].cumsum(0))


@torch.inference_mode()
def position_losses(
    model: LayoutModel, documents: list[Tensor], settings: TidarSettings, target_len: int, buckets: int
) -> list[dict[str, Any]]:
    """Mean losses by position in the document.

    Args:
        model: any converted model.
        documents: (n,) int64 ids each, n at most target_len.
        settings: the checkpoint's.
        target_len: positions in all.
        buckets: so many equal parts of them.

    Returns:
        For each part `from` and `to` (positions), `tokens` (predicted by AR), and in nats a token `loss_ar` and
        `loss_diffusion`, null where no document reaches.
    """
    edges = [round(number * target_len / buckets) for number in range(buckets + 1)]
    sums = torch.zeros(4, buckets, dtype=torch.float64)  # AR loss and count, diffusion loss and count
    with evaluating(model):
        for document in documents:
            ids = document.to(model.device)[None]
            length = ids.shape[1]
            row = torch.cat([ids, torch.full_like(ids, settings.mask_token_id)], dim=1)
            hidden = model.hidden_states(row, packed_layout(torch.zeros_like(ids), settings.block_size))[0]
            before = F.pad(hidden[: length - 1], (0, 0, 1, 0))  # at each token, what predicts it
            for bucket, (start, end) in enumerate(itertools.pairwise(edges)):
                for kind, states, first in ((0, before, max(1, start)), (2, hidden[length:], start)):
                    labels = ids[0, first:end]
                    if len(labels):
                        loss, _ = cross_entropy_sum(model, states[first : first + len(labels)], labels, _CHUNK)
                        sums[kind, bucket] += loss.double().cpu()
                        sums[kind + 1, bucket] += len(labels)
    ar, ar_count, diffusion, diffusion_count = sums.tolist()
    return [
        {
            "from": edges[number],
            "to": edges[number + 1],
            "tokens": int(ar_count[number]),
            "loss_ar": ar[number] / ar_count[number] if ar_count[number] else None,
            "loss_diffusion": diffusion[number] / diffusion_count[number] if diffusion_count[number] else None,
        }
        for number in range(buckets)
    ]


_CHUNK = 1024
"""tokens whose logits are held at a time"""
