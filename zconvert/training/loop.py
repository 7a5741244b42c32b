"""The training loop of every stage: batches -> losses -> steps -> metrics, and states that it continues from exactly.

A run that was stopped, by a signal or by pulling the plug, and started again gives the same losses and weights as one
that never stopped (bit for bit on a CPU with the same number of threads): everything that decides the next step is in
the train state, and nothing else decides it.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from zconvert.checkpoint.folder import writing
from zconvert.data.packing import Batch, PackedRows
from zconvert.errors import UserError
from zconvert.recipe import TrainingRecipe
from zconvert.tidar.generate import layout_model_of
from zconvert.tidar.settings import TidarSettings
from zconvert.training.objective import LossSums, Targets, expected_accepted, packed_losses
from zconvert.training.schedule import learning_rate_factor
from zconvert.training.state import load_latest, load_state, save_state

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Progress:
    """What a run reports: after each logged step (`metrics`), and in words (`message`)."""

    metrics: dict[str, Any] | None = None
    message: str | None = None


OnProgress = Callable[[Progress], None]


class Observer(Protocol):
    """Something that looks at a run after each step: routing health, evaluation, a tracker."""

    def on_step(self, trainer: Trainer) -> dict[str, Any] | None:
        """Called after each step, in every process; what it returns goes into the next row of metrics."""


class Interrupted(Exception):
    """The run stopped at a signal, its state saved."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped after step {step}; the same command continues from there")
        self.signal_number = signal_number


@dataclass
class _Window:
    """Sums since the last logged step."""

    ar: float = 0.0
    diffusion: float = 0.0
    ar_count: int = 0
    diffusion_count: int = 0
    tokens: int = 0
    seconds: float = 0.0
    grad_norm: float = 0.0
    slot_correct: list[int] = field(default_factory=list)
    slot_count: list[int] = field(default_factory=list)
    extras: dict[str, Any] = field(default_factory=dict)
    """what observers said last"""


class Trainer:
    """One run of one stage in one process."""

    def __init__(
        self, model: Any, rows: PackedRows, recipe: TrainingRecipe, settings: TidarSettings, on_progress: OnProgress
    ) -> None:
        """Sets up the optimizer; nothing is read or written yet.

        Args:
            model: a transformers causal model, float32 weights, on its device.
            rows: the data.
            recipe: of the stage.
            settings: of the checkpoint that is trained.
            on_progress: is told of every logged step.
        """
        self.model, self.rows, self.recipe, self.settings = model, rows, recipe, settings
        self.layout_model = layout_model_of(model)
        self.gated = self.layout_model.gated
        self.trained: Any = model if self.gated is None else self.gated
        """what moves, and what a train state holds of the model"""
        if self.gated is not None:
            model.requires_grad_(False)
        self.on_progress = on_progress
        self.run_dir = Path(recipe.output_dir)
        self.observers: list[Observer] = []
        """asked after each step, in this order"""
        self.step = 0
        # Matrices are decayed; norms, biases and scales are not.
        groups = [
            {"params": [p for p in self.trained.parameters() if p.ndim >= 2], "weight_decay": recipe.weight_decay},
            {"params": [p for p in self.trained.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        betas = (recipe.adam_beta1, recipe.adam_beta2)
        self.optimizer = torch.optim.AdamW(
            groups, lr=recipe.learning_rate, betas=betas, eps=recipe.adam_epsilon, fused=True
        )
        self._offsets = torch.Generator().manual_seed(recipe.seed)
        self._window = self._new_window()

    def run(self) -> None:
        """Trains to `max_steps`, from the newest state where the recipe says so.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the state is saved.
            UserError: a loss that is not a number, a damaged state, a full disk.
        """
        recipe = self.recipe
        self._resume()
        self.trained.train()  # a frozen source stays in evaluation mode: nothing of it is drawn at random
        if recipe.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        with _signals() as received, self._metrics_file() as metrics_file:
            while self.step < recipe.max_steps:
                self._train_step()
                for observer in self.observers:
                    self._window.extras |= observer.on_step(self) or {}
                stopping = received[0] if received else None
                last = self.step == recipe.max_steps
                if self.step % recipe.logging_steps == 0 or last:
                    metrics = self._take_metrics()
                    with writing(self.run_dir / METRICS_FILE):
                        metrics_file.write((json.dumps(metrics) + "\n").encode())
                    self.on_progress(Progress(metrics=metrics))
                if self.step % recipe.save_steps == 0 or last or stopping is not None:
                    save_state(self.run_dir, self.step, self._state(), recipe.save_total_limit)
                if stopping is not None and not last:
                    raise Interrupted(stopping, self.step)

    def _train_step(self) -> None:
        recipe, started = self.recipe, time.perf_counter()
        device = self.layout_model.device
        batches = [_to(self.rows.next_batch(), device) for _ in range(recipe.gradient_accumulation_steps)]
        # Counts of the whole step first: each micro-batch's sums are divided by them.
        targets = [Targets.of(batch) for batch in batches]
        ar_count = sum(int(t.ar.sum()) for t in targets)
        diffusion_count = sum(int(t.diffusion.sum()) for t in targets)
        if not diffusion_count:
            raise UserError(f"step {self.step + 1} has no scored token", fix="check the data's loss masks")
        window, alpha = self._window, self._alpha
        self.optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
                sums = self._losses(batch)
            loss = (alpha * sums.ar / max(1, ar_count) + sums.diffusion / diffusion_count) / (1 + alpha)
            if not math.isfinite(loss.item()):
                raise UserError(
                    f"the loss is {loss.item()} at step {self.step + 1}",
                    expected="a finite number",
                    fix=f"lower learning_rate or max_grad_norm; the newest state in {self.run_dir} is unharmed",
                )
            loss.backward()
            self.layout_model.release_gate()
            window.ar += sums.ar.item()
            window.diffusion += sums.diffusion.item()
            for total, new in ((window.slot_correct, sums.slot_correct), (window.slot_count, sums.slot_count)):
                total[:] = [a + b for a, b in zip(total, new.tolist(), strict=True)]
        window.grad_norm = torch.nn.utils.clip_grad_norm_(self.trained.parameters(), recipe.max_grad_norm).item()
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self.optimizer.step()
        self.step += 1
        window.ar_count += ar_count
        window.diffusion_count += diffusion_count
        window.tokens += sum(batch.input_ids.numel() for batch in batches)
        window.seconds += time.perf_counter() - started

    def _losses(self, batch: Batch) -> LossSums:
        block_size = self.settings.block_size
        offset: torch.Tensor | int = 0
        if self.recipe.diffusion.block_offset == "random":
            offset = random_offsets(batch.document_ids, block_size, self._offsets)
        return packed_losses(
            self.layout_model,
            batch,
            mask_token_id=self.settings.mask_token_id,
            block_size=block_size,
            offset=offset,
            objective=self.recipe.diffusion.objective or ("data" if self.gated is None else "forward_kl"),
            loss_chunk_size=self.recipe.loss_chunk_size,
        )

    @property
    def _alpha(self) -> float:
        """Weight of the AR loss: a frozen source has nothing to learn from it."""
        return self.recipe.diffusion.alpha if self.gated is None else 0.0

    def _learning_rate(self) -> float:
        recipe = self.recipe
        return recipe.learning_rate * learning_rate_factor(
            self.step,
            schedule=recipe.lr_scheduler,
            max_steps=recipe.max_steps,
            warmup_steps=recipe.warmup_steps,
            decay_steps=recipe.decay_steps,
            min_lr_ratio=recipe.min_lr_ratio,
        )

    def _new_window(self) -> _Window:
        zeros = [0] * self.settings.block_size
        return _Window(slot_correct=list(zeros), slot_count=list(zeros))

    def _take_metrics(self) -> dict[str, Any]:
        """Means since the last call; the losses in nats a token."""
        window, self._window = self._window, self._new_window()
        ar = window.ar / max(1, window.ar_count)
        diffusion = window.diffusion / window.diffusion_count
        alpha = self._alpha
        accuracy = [c / n if n else 0.0 for c, n in zip(window.slot_correct, window.slot_count, strict=True)]
        return {
            "step": self.step,
            "max_steps": self.recipe.max_steps,
            "loss": (alpha * ar + diffusion) / (1 + alpha),
            "loss_ar": ar,
            "loss_diffusion": diffusion,
            "slot_accuracy": accuracy,
            "expected_accepted": expected_accepted(accuracy),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "grad_norm": window.grad_norm,
            "tokens_per_second": window.tokens / window.seconds,
            "seconds": window.seconds,
            **window.extras,
        }

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "model": self.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "data": self.rows.state_dict(),
            "offsets": self._offsets.get_state(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "window": vars(self._window),
        }

    def _resume(self) -> None:
        wanted = self.recipe.resume_from_checkpoint
        if wanted == "never":
            return
        if wanted == "auto":
            state = load_latest(self.run_dir, lambda text: self.on_progress(Progress(message=f"warning: {text}")))
        else:
            state = load_state(Path(wanted))
        if state is None:
            return
        self.trained.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rows.load_state_dict(state["data"])
        self._offsets.set_state(state["offsets"])
        torch.set_rng_state(state["torch_rng"])
        if state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        self.step = state["step"]
        self._window = _Window(**state["window"])
        self.on_progress(Progress(message=f"continuing after step {self.step}"))

    @contextmanager
    def _metrics_file(self) -> Iterator[Any]:
        """metrics.jsonl, open for appending, without the rows of steps that will be done again."""
        path = self.run_dir / METRICS_FILE
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= self.step:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    break  # a line half-written when the power went: it and what follows will be written again
        partial = path.with_suffix(".jsonl.partial")
        with writing(path):
            partial.write_text("".join(line + "\n" for line in kept))
            partial.replace(path)
            # Unbuffered: every row is there as soon as it is told of, and a full disk is noticed at its row.
            file = path.open("ab", buffering=0)
        with file:
            yield file


def random_offsets(document_ids: torch.Tensor, block_size: int, generator: torch.Generator) -> torch.Tensor:
    """(R, T) block phases in 0 … B-1, one drawn for each document."""
    documents, place = document_ids.unique(return_inverse=True)
    rows = document_ids.shape[0]
    drawn = torch.randint(block_size, (rows, len(documents)), generator=generator).to(document_ids.device)
    return drawn.gather(1, place)


def _to(batch: Batch, device: torch.device) -> Batch:
    return Batch(batch.input_ids.to(device), batch.document_ids.to(device), batch.loss_mask.to(device))


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them; a second SIGINT is a KeyboardInterrupt."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, _frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
