"""The training loop of every stage: batches -> losses -> steps -> metrics, and states that it continues from exactly.

A run that was stopped, by a signal or by pulling the plug, and started again gives the same losses and weights as one
that never stopped (bit for bit on a CPU with the same number of threads): everything that decides the next step is in
the train state, and nothing else decides it.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from zconvert.data.packing import Batch, PackedRows
from zconvert.errors import UserError
from zconvert.recipe import TrainingRecipe
from zconvert.tidar.settings import TidarSettings
from zconvert.training.continuing import resume_run, save_run, unharmed
from zconvert.training.implementations import checkpoint_activations
from zconvert.training.metrics import Window, metrics_file
from zconvert.training.objective import LossSums, Targets, packed_losses, scored_tokens
from zconvert.training.observers import Observer
from zconvert.training.optimizer import make_optimizer, set_learning_rate
from zconvert.training.parallel import Parallel
from zconvert.training.schedule import learning_rate_factor
from zconvert.training.slots import draw_slots, random_offsets, row_generators
from zconvert.training.state import load_start

_MOST_NAMED = 8
"""documents that an error names"""
T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """What a run reports: after each logged step (`metrics`), and in words (`message`)."""

    metrics: dict[str, Any] | None = None
    message: str | None = None


OnProgress = Callable[[Progress], None]


class Interrupted(Exception):
    """The run stopped at a signal, its state saved."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped after step {step}; the same command continues from there")
        self.signal_number = signal_number


class Trainer:
    """One run of one stage, as one of its processes goes through it."""

    def __init__(
        self,
        model: Any,
        rows: PackedRows,
        recipe: TrainingRecipe,
        settings: TidarSettings,
        on_progress: OnProgress,
        parallel: Parallel | None = None,
    ) -> None:
        """Sets up the optimizer; nothing is read or written yet.

        Args:
            model: a transformers causal model, float32 weights, on its device.
            rows: the data.
            recipe: of the stage.
            settings: of the checkpoint that is trained.
            on_progress: is told of every logged step.
            parallel: the run's processes, which `model` was loaded by; by default there is one.
        """
        self.parallel = parallel or Parallel()
        self.model, self.rows, self.recipe, self.settings = model, rows, recipe, settings
        self.layout_model = self.parallel.layout_model(model, gated=settings.mode == "gated")
        self.gated = self.layout_model.gated
        if self.gated is not None:
            self.gated.float()  # whatever the frozen source is in
        self.trained: Any = model if self.gated is None else self.gated
        """what moves, and what a train state holds of the model"""
        self.on_progress = on_progress
        self.run_dir = Path(recipe.output_dir)
        self.observers: list[Observer] = []
        """asked after each step, in this order"""
        self.save_checkpoint: Callable[[Path], None] | None = None
        """writes a checkpoint that others can load, called in every process; see `checkpoint_steps`"""
        self.step = 0
        self.tokens_seen = 0
        self.optimizer = make_optimizer(self.trained.named_parameters(), recipe)
        self.window = Window.of(settings.block_size)
        """sums since the last row of metrics"""

    def run(self) -> None:
        """Trains to `max_steps`, from the newest state if there is one.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the state is saved.
            UserError: a loss that is not a number, a damaged state, a full disk.
        """
        recipe = self.recipe
        self._resume()
        self.trained.train()  # a frozen source stays in evaluation mode: nothing of it is drawn at random
        if recipe.gradient_checkpointing:
            checkpoint_activations(self.layout_model)
        saved_at = time.monotonic()
        rows = metrics_file(self.run_dir, self.step) if self.parallel.first else nullcontext(lambda _row: None)
        with _signals() as received, rows as add_row:
            while self.step < recipe.max_steps:
                self._train_step()
                for observer in self.observers:
                    self.window.extras |= observer.on_step(self) or {}
                late = recipe.save_minutes is not None and time.monotonic() - saved_at > 60 * recipe.save_minutes
                stopping, late = self._agreed(received, late)
                last = self.is_last
                if self.logs_now:
                    metrics = self._take_metrics()
                    add_row(metrics)
                    self.on_progress(Progress(metrics=metrics))
                if self.step % recipe.save_steps == 0 or last or late or stopping is not None:
                    save_run(self)
                    saved_at = time.monotonic()
                if recipe.checkpoint_steps and self.step % recipe.checkpoint_steps == 0 and not last:
                    self._save_checkpoint()
                if stopping is not None and not last:
                    raise Interrupted(stopping, self.step)

    @property
    def is_last(self) -> bool:
        """Whether the step just done was the run's last."""
        return self.step == self.recipe.max_steps

    @property
    def logs_now(self) -> bool:
        """Whether the step just done gets a row of metrics."""
        return self.step % self.recipe.logging_steps == 0 or self.is_last

    def _agreed(self, received: list[int], late: bool) -> tuple[int | None, bool]:
        """What a signal or the clock tells any process, all do after the same step."""
        interrupts, terminations, lates = self.parallel.sum(
            [float(signal.SIGINT in received), float(signal.SIGTERM in received), float(late)]
        )
        stopping = signal.SIGTERM if terminations else signal.SIGINT if interrupts else None
        return stopping, bool(lates)

    def _save_checkpoint(self) -> None:
        folder = self.run_dir / f"checkpoint-{self.step}"
        # A run that resumed behind it has it already, and would write the same.
        if self.save_checkpoint is not None and not self.parallel.gather(folder.exists())[0]:
            self.parallel.rest(self.model)
            self.save_checkpoint(folder)

    def _train_step(self) -> None:
        recipe, parallel, started = self.recipe, self.parallel, time.perf_counter()
        device = self.layout_model.device
        batches = [self.rows.next_batch().to(device) for _ in range(recipe.gradient_accumulation_steps)]
        # Counts of the whole step first: each micro-batch's sums are divided by them.
        places = [self._place_slots(batch, number) for number, batch in enumerate(batches)]
        targets = [Targets.of(batch, slots) for batch, (_, slots) in zip(batches, places, strict=True)]
        counts = parallel.sum([sum(int(t.ar.sum()) for t in targets), sum(int(t.diffusion.sum()) for t in targets)])
        ar_count, diffusion_count = (int(count) // parallel.context for count in counts)
        if not diffusion_count:
            raise UserError(f"step {self.step + 1} has no scored token", fix="check the data's loss masks")
        alpha = self.alpha
        # This process's part of what is summed over all after the step.
        sums = {"ar": 0.0, "diffusion": 0.0}
        not_finite: list[tuple[float, list[str]]] = []
        slot_correct, slot_count = torch.zeros(2, self.settings.block_size, dtype=torch.int64, device=device)
        self.optimizer.zero_grad(set_to_none=True)
        for number, (batch, (offset, slots)) in enumerate(zip(batches, places, strict=True)):
            parallel.sync_gradients(self.model, last=number == len(batches) - 1)
            part, extra = self._forward(batch, offset, slots)
            loss = (alpha * part.ar / max(1, ar_count) + part.diffusion / diffusion_count) / (1 + alpha)
            if extra is not None:  # a mean over each process's tokens
                loss = loss + extra / (recipe.gradient_accumulation_steps * parallel.loss_scale)
            if not math.isfinite(loss.item()):
                # Told after the backward pass, in which the other processes take part.
                not_finite.append((loss.item(), self.rows.documents_of(batch)))
            (loss * parallel.loss_scale).backward()
            self.layout_model.release_gate()
            sums["ar"] += part.ar.item()
            sums["diffusion"] += part.diffusion.item()
            slot_correct += part.slot_correct
            slot_count += part.slot_count
        parallel.average_gradients(self.trained.parameters())
        grad_norm = parallel.clip_gradients(self.trained.parameters(), recipe.max_grad_norm)
        counted = [*sums.values(), *slot_correct.tolist(), *slot_count.tolist()]
        *totals, anywhere = parallel.sum([*counted, len(not_finite)])
        if anywhere or not math.isfinite(grad_norm):
            self._refuse_step(not_finite, grad_norm, batches)
        set_learning_rate(self.optimizer, self._learning_rate())
        self.optimizer.step()
        self.step += 1
        tokens = sum(batch.input_ids.numel() for batch in batches) * parallel.data_world
        self.tokens_seen += tokens
        self.window.add(
            losses=(totals[0], totals[1]),
            counts=(ar_count, diffusion_count),
            slots=[int(count) for count in totals[2:]],
            grad_norm=grad_norm,
            tokens=tokens,
            seconds=time.perf_counter() - started,
        )

    def _refuse_step(self, not_finite: list[tuple[float, list[str]]], grad_norm: float, batches: list[Batch]) -> None:
        """Stops all processes before a step that would spoil the weights, and says which documents it was about."""
        told = [entry for entries in self.parallel.gather(not_finite) for entry in entries]
        what = f"the loss is {told[0][0]}" if told else f"the gradient's norm is {grad_norm}"
        if not told:
            mine = [(0.0, self.rows.documents_of(batch)) for batch in batches]
            told = [entry for entries in self.parallel.gather(mine) for entry in entries]
        documents = list(dict.fromkeys(name for _, names in told for name in names))
        more = f" and {len(documents) - _MOST_NAMED} more" if len(documents) > _MOST_NAMED else ""
        raise UserError(
            f"{what} at step {self.step + 1} of {self.recipe.stage}",
            found=f"in {', '.join(documents[:_MOST_NAMED])}{more}",
            expected="a finite number",
            fix=f"look at these documents, or lower learning_rate or max_grad_norm; {unharmed(self.run_dir)}",
        )

    def _place_slots(self, batch: Batch, micro_batch: int) -> tuple[torch.Tensor | int, torch.Tensor | None]:
        """The phase of a batch's blocks, and which tokens have a mask slot; None: all."""
        block_size, diffusion = self.settings.block_size, self.recipe.diffusion
        # Numbers of these rows among all rows of the run, whichever process has them: they draw the same anywhere.
        rows, parallel = batch.input_ids.shape[0], self.parallel
        done = (self.step * self.recipe.gradient_accumulation_steps + micro_batch) * parallel.data_world
        first = (done + parallel.data_rank) * rows
        generators = row_generators(self.recipe.seed, range(first, first + rows))
        offset: torch.Tensor | int = 0
        if diffusion.block_offset == "random":
            offset = random_offsets(batch.document_ids, block_size, generators)
        if diffusion.diffusion_fraction == 1.0:
            return offset, None
        scored, fraction = scored_tokens(batch), diffusion.diffusion_fraction
        return offset, draw_slots(batch.document_ids, scored, block_size, offset, fraction, generators)

    def _forward(
        self, batch: Batch, offset: torch.Tensor | int, slots: torch.Tensor | None
    ) -> tuple[LossSums, torch.Tensor | None]:
        """The losses of a batch, and what observers add to them."""

        def forward() -> dict[str, Any]:
            with self.autocast():
                sums = self._sums(batch, offset, slots)
            extras = [extra for observer in self.observers if (extra := observer.extra_loss()) is not None]
            return {**vars(sums), **({"extra": torch.stack(extras).sum()} if extras else {})}

        found = self.parallel.run(self.model, forward)
        return LossSums(**{name: found[name] for name in LossSums.__annotations__}), found.get("extra")

    def losses_of(self, batch: Batch) -> LossSums:
        """Both losses of a batch on the model's device, as this run trains on them; every process calls it."""
        return LossSums(**self.parallel.run(self.model, lambda: vars(self._sums(batch, 0, None))))

    def alone(self, action: Callable[[], T]) -> T:
        """See `Parallel.alone`."""
        return self.parallel.alone(self.layout_model, action)

    def _sums(self, batch: Batch, offset: torch.Tensor | int, slots: torch.Tensor | None) -> LossSums:
        return packed_losses(
            self.layout_model,
            batch,
            mask_token_id=self.settings.mask_token_id,
            block_size=self.settings.block_size,
            offset=offset,
            slots=slots,
            objective=self.recipe.diffusion.objective or ("data" if self.gated is None else "forward_kl"),
            loss_chunk_size=self.recipe.loss_chunk_size,
            context=self.parallel.context_parallel,
        )

    def autocast(self) -> torch.autocast:
        """The number format of the recipe's forwards."""
        return torch.autocast(self.layout_model.device.type, torch.bfloat16, enabled=self.recipe.dtype == "bfloat16")

    @property
    def alpha(self) -> float:
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

    def _take_metrics(self) -> dict[str, Any]:
        """A row: what was since the one before."""
        window, self.window = self.window, Window.of(self.settings.block_size)
        return {
            "step": self.step,
            "max_steps": self.recipe.max_steps,
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
            **window.means(self.alpha),
        }

    def _resume(self) -> None:
        def warn(text: str) -> None:
            self.on_progress(Progress(message=f"warning: {text}"))

        state = load_start(self.recipe.resume_from_checkpoint, self.run_dir, warn, self.parallel)
        if state is not None:
            resume_run(self, state)
            self.on_progress(Progress(message=f"continuing after step {self.step}"))


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
