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
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zconvert.checkpoint.folder import writing
from zconvert.data.packing import Batch, PackedRows
from zconvert.errors import UserError
from zconvert.formats import TRAIN_STATE, up_to_date
from zconvert.recipe import TrainingRecipe
from zconvert.tidar.settings import TidarSettings
from zconvert.training.implementations import checkpoint_activations
from zconvert.training.objective import LossSums, Targets, expected_accepted, packed_losses, scored_tokens
from zconvert.training.observers import Observer
from zconvert.training.optimizer import make_optimizer, set_learning_rate
from zconvert.training.parallel import Parallel
from zconvert.training.schedule import learning_rate_factor
from zconvert.training.slots import draw_slots, random_offsets, row_generators
from zconvert.training.state import load_latest, load_state, save_state

METRICS_FILE = "metrics.jsonl"
T = TypeVar("T")
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


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
            checkpoint_activations(self.layout_model)
        saved_at = time.monotonic()
        with _signals() as received, self._metrics_file() as metrics_file:
            while self.step < recipe.max_steps:
                self._train_step()
                for observer in self.observers:
                    self._window.extras |= observer.on_step(self) or {}
                late = recipe.save_minutes is not None and time.monotonic() - saved_at > 60 * recipe.save_minutes
                stopping, late = self._agreed(received, late)
                last = self.is_last
                if self.logs_now:
                    metrics = self._take_metrics()
                    if metrics_file is not None:
                        with writing(self.run_dir / METRICS_FILE):
                            metrics_file.write((json.dumps(metrics) + "\n").encode())
                    self.on_progress(Progress(metrics=metrics))
                if self.step % recipe.save_steps == 0 or last or late or stopping is not None:
                    self._save_state()
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
        window, alpha = self._window, self.alpha
        # This process's part of what is summed over all after the step.
        sums = {"ar": 0.0, "diffusion": 0.0}
        slot_correct, slot_count = torch.zeros(2, self.settings.block_size, dtype=torch.int64, device=device)
        self.optimizer.zero_grad(set_to_none=True)
        for number, (batch, (offset, slots)) in enumerate(zip(batches, places, strict=True)):
            parallel.sync_gradients(self.model, last=number == len(batches) - 1)
            part, extra = self._forward(batch, offset, slots)
            loss = (alpha * part.ar / max(1, ar_count) + part.diffusion / diffusion_count) / (1 + alpha)
            if extra is not None:  # a mean over each process's tokens
                loss = loss + extra / (recipe.gradient_accumulation_steps * parallel.loss_scale)
            if not math.isfinite(loss.item()):
                raise UserError(
                    f"the loss is {loss.item()} at step {self.step + 1}",
                    expected="a finite number",
                    fix=f"lower learning_rate or max_grad_norm; the newest state in {self.run_dir} is unharmed",
                )
            (loss * parallel.loss_scale).backward()
            self.layout_model.release_gate()
            sums["ar"] += part.ar.item()
            sums["diffusion"] += part.diffusion.item()
            slot_correct += part.slot_correct
            slot_count += part.slot_count
        parallel.average_gradients(self.trained.parameters())
        window.grad_norm = parallel.clip_gradients(self.trained.parameters(), recipe.max_grad_norm)
        set_learning_rate(self.optimizer, self._learning_rate())
        self.optimizer.step()
        self.step += 1
        totals = parallel.sum([*sums.values(), *slot_correct.tolist(), *slot_count.tolist()])
        window.ar += totals[0]
        window.diffusion += totals[1]
        block_size = self.settings.block_size
        for window_total, new in (
            (window.slot_correct, totals[2 : 2 + block_size]),
            (window.slot_count, totals[2 + block_size :]),
        ):
            window_total[:] = [a + int(b) for a, b in zip(window_total, new, strict=True)]
        window.ar_count += ar_count
        window.diffusion_count += diffusion_count
        tokens = sum(batch.input_ids.numel() for batch in batches) * parallel.data_world
        window.tokens += tokens
        self.tokens_seen += tokens
        window.seconds += time.perf_counter() - started

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

    def _new_window(self) -> _Window:
        zeros = [0] * self.settings.block_size
        return _Window(slot_correct=list(zeros), slot_count=list(zeros))

    def _take_metrics(self) -> dict[str, Any]:
        """Means since the last call; the losses in nats a token."""
        window, self._window = self._window, self._new_window()
        ar = window.ar / max(1, window.ar_count)
        diffusion = window.diffusion / window.diffusion_count
        alpha = self.alpha
        accuracy = [c / n if n else 0.0 for c, n in zip(window.slot_correct, window.slot_count, strict=True)]
        return {
            "step": self.step,
            "max_steps": self.recipe.max_steps,
            "loss": (alpha * ar + diffusion) / (1 + alpha),
            "loss_ar": ar,
            "loss_diffusion": diffusion,
            "slot_accuracy": accuracy,
            "expected_accepted": expected_accepted(accuracy),
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
            "grad_norm": window.grad_norm,
            "tokens_per_second": window.tokens / window.seconds,
            "seconds": window.seconds,
            **window.extras,
        }

    def _save_state(self) -> None:
        self.parallel.rest(self.model)
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        numbers = {
            "format_version": TRAIN_STATE,
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "data": self.rows.state_dict(),
            "random": self.parallel.gather((torch.get_rng_state(), cuda)),
            "window": vars(self._window),
            "observers": [observer.state_dict() for observer in self.observers],
        }
        tensors = {**_named("model.", self._weights()), **_named("optimizer.", _tensors(self._optimizer_state()))}
        save_state(self.run_dir, self.step, numbers, tensors, self.recipe.save_total_limit, self.parallel)

    def _weights(self) -> dict[str, torch.Tensor]:
        """What a state holds of the model; tied weights once. They share the model's memory."""
        seen: dict[int, str] = {}
        tensors = self.trained.state_dict(keep_vars=True)
        return {name: t.detach() for name, t in tensors.items() if seen.setdefault(id(t), name) == name}

    def _optimizer_state(self) -> dict[str, Any]:
        """By names of parameters, so that it does not depend on how they are grouped."""
        return get_optimizer_state_dict(self.trained, self.optimizer, options=_FLAT)

    def _resume(self) -> None:
        wanted = self.recipe.resume_from_checkpoint
        if wanted == "never":
            return
        if wanted == "auto":
            warn = lambda text: self.on_progress(Progress(message=f"warning: {text}"))  # noqa: E731
            state = load_latest(self.run_dir, warn, self.parallel)
        else:
            state = load_state(Path(wanted), self.parallel)
        if state is None:
            return
        what = f"the train state {state.folder}"
        numbers = up_to_date(state.numbers, what, TRAIN_STATE, [self._with_tokens_seen])
        self.rows.load_state_dict(numbers["data"])
        optimizer = self._optimizer_state()
        into = {**_named("model.", self._weights()), **_named("optimizer.", _tensors(optimizer))}
        state.read_into(into, self.parallel)
        set_optimizer_state_dict(self.trained, self.optimizer, optimizer, options=_FLAT)
        self.step, self.tokens_seen = numbers["step"], numbers["tokens_seen"]
        self._window = _Window(**numbers["window"])
        # A recipe may ask for an evaluation, the last of them, that it did not ask for before; or no more.
        for observer, observed in zip(self.observers, numbers["observers"], strict=False):
            observer.load_state_dict(observed)
        if len(numbers["random"]) == self.parallel.world:
            cpu, cuda = numbers["random"][self.parallel.rank]
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state(cuda)
        self.on_progress(Progress(message=f"continuing after step {self.step}"))

    def _with_tokens_seen(self, numbers: dict[str, Any]) -> dict[str, Any]:
        """A state of version 0 did not count them: every step had as many, unless the number of processes changed."""
        recipe, processes = self.recipe, len(numbers["random"]) // self.parallel.context
        rows = recipe.micro_batch_size * recipe.gradient_accumulation_steps * processes
        return {**numbers, "tokens_seen": numbers["step"] * rows * recipe.sequence_len}

    @contextmanager
    def _metrics_file(self) -> Iterator[Any]:
        """metrics.jsonl, open for appending, without the rows of steps that will be done again; the first process's."""
        if not self.parallel.first:
            yield None
            return
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


def _named(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of an optimizer's state; of those that are made of others (in 8 bits, with scales) the others."""
    found: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if is_traceable_wrapper_subclass(value) and not isinstance(value, DTensor):
            inner, _ = value.__tensor_flatten__()
            found |= _tensors({f"{name}.{part}": getattr(value, part) for part in inner})
        elif isinstance(value, torch.Tensor) and name.startswith("state."):  # the rest is in the recipe
            found[name] = value
    return found


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
