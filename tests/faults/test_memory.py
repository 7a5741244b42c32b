"""Where memory runs out a command says what it was taking, and which settings take less."""

from __future__ import annotations

import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.commands import Base
from tests.faults.inject import run
from tests.training.runs import make_run
from zconvert.errors import UserError, out_of_memory
from zconvert.planning.out_of_memory import too_little_for_decoding, too_little_for_training
from zconvert.recipe import MidtrainRecipe
from zconvert.training import stages
from zconvert.training.loop import Trainer
from zconvert.training.state import states_in

CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.2 GiB is free."
)
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "17179869184 bytes. Error code 12 (Cannot allocate memory)"
)


def test_each_allocators_words_are_understood_and_nothing_else_is() -> None:
    assert out_of_memory(CUDA) == "CUDA out of memory. Tried to allocate 2.00 GiB"
    assert str(out_of_memory(CPU)).startswith("DefaultCPUAllocator: can't allocate memory: you tried to allocate 17179")
    assert out_of_memory(MemoryError()) == "no memory was left"
    assert out_of_memory(OSError(12, "Cannot allocate memory")) is not None
    for other in (RuntimeError("shape mismatch"), ValueError("out of memory"), OSError(28, "No space left on device")):
        assert out_of_memory(other) is None


@pytest.mark.parametrize(
    "error", [CUDA, *(pytest.param(error, marks=pytest.mark.slow) for error in (CPU, MemoryError()))]
)
def test_a_run_without_memory_says_what_it_takes_and_what_to_lower(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_run(tmp_path, max_steps=4, save_steps=1, gradient_checkpointing=False)
    stock, forwards = Trainer._sums, []

    def fail(self: Trainer, *args: Any) -> Any:
        forwards.append(1)
        if len(forwards) > 4:
            raise error
        return stock(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_sums", fail)
        with pytest.raises(UserError, match="midtrain needs more memory than there is") as caught:
            stages.train(MidtrainRecipe(**settings), lambda _progress: None)
    assert caught.value.found is not None
    assert caught.value.fix is not None
    assert str(out_of_memory(error)) in caught.value.found
    assert re.search(r"takes about [\d.e-]+ GB a device: .*optimizer", caught.value.found)
    for words in ("micro_batch_size: 1 with gradient_accumulation_steps: 4", "gradient_checkpointing: true"):
        assert words in caught.value.fix
    assert [step for step, _ in states_in(tmp_path / "run")] == [1, 2]
    stages.train(MidtrainRecipe(**{**settings, "gradient_checkpointing": True}), lambda _progress: None)


def test_each_change_that_is_proposed_takes_less_and_the_best_is_first(base: Base) -> None:
    recipe = MidtrainRecipe(**{**base.settings, "micro_batch_size": 64, "gradient_checkpointing": False})
    told = too_little_for_training(recipe, 1, "no memory")
    assert told.found is not None
    assert told.fix is not None
    total = float(re.search(r"about ([\d.e-]+) GB", told.found)[1])  # type: ignore[index]
    offered = [float(size) for size in re.findall(r"about ([\d.e-]+) GB", told.fix)]
    assert len(offered) >= 3
    assert offered == sorted(offered)
    assert max(offered) < total


def test_decoding_proposes_the_options_that_the_command_has(base: Base) -> None:
    options = {"batch_size": [4, 64], "max_new_tokens": 512, "dtype": "float32"}
    told = too_little_for_decoding(base.path("init"), "no memory", options)
    assert told.found is not None
    assert told.fix is not None
    assert "caches of 64 × 512 new tokens" in told.found
    assert {"--batch-size 32", "--max-new-tokens 256", "--dtype bfloat16"} <= set(re.findall(r"--[\w-]+ \w+", told.fix))
    alone = too_little_for_decoding(base.path("init"), "no memory", {"batch_size": 1})
    assert "--batch-size" not in str(alone.fix)


def little_memory() -> None:
    """Leaves this process some megabytes more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 120_000_000,) * 2)


def test_memory_that_really_runs_out_is_told_so(base: Base, tmp_path: Path) -> None:
    words = ["generate", base.path("init"), "the cat " * 8000, "--max-new-tokens", "4", "--device", "cpu"]
    ended = run(words, prepare=little_memory)
    assert ended.code == 1
    assert "needs more memory than there is" in ended.words
    assert "weights take about" in ended.words
    assert "Traceback" not in ended.stderr
