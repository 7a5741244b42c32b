"""Evaluation during a run: both losses and slot accuracies on held-out rows, and acceptance measured by decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from zconvert.data.documents import Documents
from zconvert.data.packing import Batch, PackedRows
from zconvert.tidar.acceptance import Sampling
from zconvert.tidar.decoding import DecodePlan
from zconvert.tidar.engine import decode
from zconvert.tidar.model import LayoutModel
from zconvert.training.objective import Targets, expected_accepted
from zconvert.training.observers import Observer

if TYPE_CHECKING:
    from zconvert.training.loop import Trainer


class Evaluator(Observer):
    """Evaluates every so many steps, always on the same rows and prompts."""

    def __init__(
        self,
        batches: Sequence[Batch],
        prompts: Sequence[list[int]],
        *,
        steps: int,
        new_tokens: int,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        """Takes what is measured on.

        Args:
            batches: held-out rows.
            prompts: token ids each; none: nothing is decoded.
            steps: between evaluations.
            new_tokens: decoded for a prompt at most.
            eos_token_ids: tokens that end a text.
        """
        self.batches, self.prompts = batches, prompts
        self.steps, self.new_tokens, self.eos_token_ids = steps, new_tokens, eos_token_ids

    def on_step(self, trainer: Trainer) -> dict[str, Any] | None:
        """Evaluates where it is due."""
        if trainer.step % self.steps and not trainer.is_last:
            return None
        return {"evaluation": self.evaluate(trainer)}

    def evaluate(self, trainer: Trainer) -> dict[str, Any]:
        """Measures the model as it is now; blocks start with the documents, whatever the training's phases.

        Returns:
            losses in nats a token, `slot_accuracy` by place in the block, `expected_accepted` from it, and
            `tokens_per_forward` from decoding greedily, the prefill left out.
        """
        with evaluating(trainer.layout_model):
            found = {"step": trainer.step, **self._losses(trainer)}
            if self.prompts:
                plan = DecodePlan.tidar(trainer.settings, Sampling(0.0), self.eos_token_ids)
                found["tokens_per_forward"] = trainer.alone(
                    lambda: tokens_per_forward(trainer.layout_model, self.prompts, plan, self.new_tokens)
                )
        return found

    @torch.inference_mode()
    def _losses(self, trainer: Trainer) -> dict[str, Any]:
        ar = diffusion = 0.0
        ar_count = diffusion_count = 0
        correct = count = torch.zeros(trainer.settings.block_size, dtype=torch.long)
        for on_cpu in self.batches:
            batch = on_cpu.to(trainer.layout_model.device)
            targets = Targets.of(batch)
            with trainer.autocast():
                sums = trainer.losses_of(batch)
            ar, diffusion = ar + float(sums.ar), diffusion + float(sums.diffusion)
            ar_count, diffusion_count = ar_count + int(targets.ar.sum()), diffusion_count + int(targets.diffusion.sum())
            correct, count = correct + sums.slot_correct.cpu(), count + sums.slot_count.cpu()
        ar, diffusion = ar / max(1, ar_count), diffusion / max(1, diffusion_count)
        accuracy = (correct / count.clamp_min(1)).tolist()
        return {
            "loss": (trainer.alpha * ar + diffusion) / (1 + trainer.alpha),
            "loss_ar": ar,
            "loss_diffusion": diffusion,
            "slot_accuracy": accuracy,
            "expected_accepted": expected_accepted(accuracy),
        }


def tokens_per_forward(
    model: LayoutModel, prompts: Sequence[list[int]], plan: DecodePlan, new_tokens: int
) -> float | None:
    """New tokens for each decoding forward, prefills left out; None where every text ended in its prefill."""
    tokens = forwards = 0
    for prompt in prompts:
        for number, step in enumerate(decode(model, prompt, plan, new_tokens)):
            if number:
                tokens += len(step.tokens)
                forwards += 1
    return tokens / forwards if forwards else None


@contextmanager
def evaluating(model: LayoutModel) -> Iterator[None]:
    """Within, the model is in evaluation mode."""
    was_training = model.model.training
    model.model.eval()
    try:
        yield
    finally:
        model.model.train(was_training)


def held_out_rows(documents: Documents, *, rows: int, sequence_len: int, rows_per_batch: int, pad: int) -> list[Batch]:
    """The first rows of some documents, the same whatever the run's seed; each document about once at most."""
    wanted = min(rows, -(-documents.token_count // sequence_len))
    at_once = min(rows_per_batch, wanted)
    packed = PackedRows(
        documents, sequence_len=sequence_len, rows=at_once, seed=0, sample_packing=True, pad_token_id=pad
    )
    return [packed.next_batch() for _ in range(wanted // at_once)]


def held_out_prompts(documents: Documents, *, prompts: int, prompt_tokens: int) -> list[list[int]]:
    """The beginnings of the first documents: never more than half of one, so that there is a text to go on with."""
    beginnings = (documents.tokens(n)[0][: min(prompt_tokens, documents.length(n) // 2)] for n in range(len(documents)))
    return [ids.tolist() for ids in beginnings if len(ids)][:prompts]
