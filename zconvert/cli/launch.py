"""Several processes for a training stage: `zconvert midtrain RECIPE.yaml -- --nproc_per_node=8` starts torchrun."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import uuid
from typing import Annotated, NoReturn

import typer

from zconvert.cli.ui import print_error
from zconvert.errors import UserError

SECONDS_TO_SAVE = 300
"""after a signal the processes finish their step and save a state; torchrun alone would kill them after 30"""
_PLACES = ("--rdzv", "--master", "--nnodes", "--node")

TorchrunOptions = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="-- TORCHRUN_OPTIONS",
        help="Start several processes, by torchrun's options: --nproc_per_node=8, with -- before it.",
        show_default=False,
    ),
]


def launch(command: list[str], options: list[str]) -> NoReturn:
    """Runs a command of zconvert in the processes that torchrun's options ask for, and exits as they did.

    Args:
        command: the command and its arguments.
        options: of torchrun.

    Raises:
        typer.Exit: the command has run, with its exit code.
        typer.BadParameter: an option is none.
    """
    if not options[0].startswith("-"):
        raise typer.BadParameter(f"one recipe at a time; {options[0]!r} is no option of torchrun either")
    if "WORLD_SIZE" in os.environ:
        raise typer.BadParameter("this is a process of a launcher already: give it the options, and none behind --")
    options = [option for option in options if option != "--standalone"]
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # what happened is told below, in one sentence
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, determine_local_world_size, parse_args

    for name, stated in list(logging.root.manager.loggerDict.items()):
        if name.startswith("torch.distributed") and isinstance(stated, logging.Logger):
            stated.setLevel(logging.CRITICAL)
    if not any(option.startswith(_PLACES) for option in options):  # one machine; any port that is free
        options = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--rdzv-id={uuid.uuid4()}", *options]
    args = parse_args([f"--shutdown-timeout={SECONDS_TO_SAVE}", *options, "--module", "zconvert", *command])
    processes = determine_local_world_size(args.nproc_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config, entrypoint, arguments = config_from_args(args)
    try:
        elastic_launch(config=config, entrypoint=entrypoint)(*arguments)
    except SignalException as stop:
        raise typer.Exit(128 + stop.sigval) from None
    except ChildFailedError as failed:
        codes = {rank: failure.exitcode for rank, failure in failed.failures.items()}
        # Processes that go on without the failed one are ended by SIGTERM.
        killed = [(rank, -code) for rank, code in codes.items() if code < 0 and -code != signal.SIGTERM]
        for rank, number in killed[:1]:
            print_error(
                UserError(
                    f"process {rank} of the run was killed",
                    found=f"signal {signal.Signals(number).name}",
                    fix="was there too little memory? The same command continues from the newest train state",
                )
            )
            raise typer.Exit(128 + number) from None
        raise typer.Exit(max(codes.values(), key=lambda code: code if code > 0 else 0)) from None
    raise typer.Exit


def speaks() -> bool:
    """Whether this process is the one of its run that prints."""
    return os.environ.get("RANK", "0") == "0"


def under_torchrun() -> bool:
    """Whether a launcher watches this process, and tells which one of the run failed."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def leave_at_once(code: int) -> None:
    """Has a process of several end without asking the others, who may be gone: torch waits for them, or aborts."""
    if "WORLD_SIZE" not in os.environ:
        return

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(leave)
