"""`zconvert generate`: text from a converted checkpoint, printed as it is decoded."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from zconvert.checkpoint.load import end_token_ids, load_model, prompt_ids
from zconvert.checkpoint.source import require_converted, resolve
from zconvert.cli import options
from zconvert.cli.ui import err, out, print_json
from zconvert.errors import UserError

if TYPE_CHECKING:
    from zconvert.tidar.decoding import Step

_BLOCK_STYLES = ("black on bright_cyan", "black on bright_yellow")


class Sampler(StrEnum):
    """Values of --sampler."""

    LOSSLESS = "lossless"
    MIXED = "mixed"
    AR = "ar"


def command(
    checkpoint: options.Checkpoint,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Text to go on from; '-' or nothing reads stdin.")
    ] = None,
    prompt_option: Annotated[str | None, typer.Option("--prompt", help="The same, as an option.")] = None,
    sampler: Annotated[
        Sampler, typer.Option(help="lossless: as AR would sample; mixed: faster, not exact; ar: one token a forward.")
    ] = Sampler.LOSSLESS,
    mix_weight: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Of --sampler mixed: share of AR in what verifies. Default: 0.5."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this total probability.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 256,
    proposals: options.Proposals = None,
    block_size: options.BlockSize = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes sampling repeatable.")] = None,
    dtype: options.DtypeOption = options.Dtype.AUTO,
    device: options.DeviceOption = options.Device.AUTO,
    show_blocks: Annotated[bool, typer.Option("--show-blocks", help="Colour the tokens of each forward.")] = False,
    add_bos: Annotated[
        bool, typer.Option("--add-bos/--no-add-bos", help="Start with the BOS token, where there is one.")
    ] = True,
    as_json: options.Json = False,
    revision: options.Revision = None,
    token: options.Token = None,
) -> None:
    """Generate text, several tokens a forward. The text goes to stdout, the tally to stderr."""
    if as_json and show_blocks:
        raise typer.BadParameter(
            "it colours text, and --json prints none: leave one of them out", param_hint="--show-blocks"
        )
    counts = options.accepted_counts(proposals, block_size)
    settings = require_converted(source := resolve(checkpoint, revision=revision, token=token))
    text = _prompt(prompt, prompt_option)
    with err.status(Text(f"Loading {checkpoint} …")):
        import torch

        from zconvert.tidar.acceptance import Sampling
        from zconvert.tidar.engine import decode
        from zconvert.tidar.generate import layout_model_of, plan_of

        try:  # before the weights are read, which can take minutes
            plan = plan_of(
                settings,
                Sampling(temperature, top_k, top_p),
                frozenset(),
                sampler=sampler,
                mix_weight=mix_weight,
                proposals=counts,
                block_size=block_size,
            )
        except ValueError as error:
            raise UserError(f"these options cannot work: {error}", fix="see `zconvert generate --help`") from error
        model, tokenizer = load_model(source, dtype=str(dtype), device=str(device))
    plan = replace(plan, eos_token_ids=end_token_ids(model, tokenizer))
    ids = prompt_ids(tokenizer, text, add_bos=add_bos)
    layout_model = layout_model_of(model)
    generator = None if seed is None else torch.Generator().manual_seed(seed)

    stream = TextStream(tokenizer, ids)
    show = _collect if as_json else _show_blocks if show_blocks else _show
    tally, pieces = Tally(), []
    steps = decode(layout_model, ids, plan, max_new_tokens, generator)
    while (step := tally.timed(lambda: next(steps, None))) is not None:
        pieces.append(stream.add(step.tokens))
        show(pieces[-1], tally.forwards)
    pieces.append(stream.flush())
    show(pieces[-1], tally.forwards)
    if as_json:
        print_json({"prompt": text, "text": "".join(pieces), "sampler": str(sampler), **tally.to_dict()})
        return
    out.print()
    err.print(Text(str(tally), style="dim"), soft_wrap=True)


class TextStream:
    """Tokens in, text out: what each step adds to the text, whole characters only.

    A token's text depends on those before it (a leading space, the bytes of one character), so a window of them is
    decoded along and only what is new is returned.
    """

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        """Starts behind a prompt, which is not returned."""
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._start = 0
        self._done = len(prompt)

    def add(self, tokens: tuple[int, ...]) -> str:
        """The text that these tokens add; empty while a character is incomplete."""
        self._ids += tokens
        return self._new(final=False)

    def flush(self) -> str:
        """What was held back."""
        return self._new(final=True)

    def _new(self, *, final: bool) -> str:
        before, now = self._decode(self._ids[self._start : self._done]), self._decode(self._ids[self._start :])
        if len(now) <= len(before) or (now.endswith("\N{REPLACEMENT CHARACTER}") and not final):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Tally:
    """Tokens, forwards and time of a decoding."""

    def __init__(self) -> None:
        """Starts at zero."""
        self.tokens = 0
        self.forwards = 0
        self.seconds = 0.0

    def timed(self, forward: Callable[[], Step | None]) -> Step | None:
        """Runs one forward and counts what it gave."""
        start = time.perf_counter()
        step = forward()
        self.seconds += time.perf_counter() - start
        if step is not None:
            self.tokens += len(step.tokens)
            self.forwards += 1
        return step

    @property
    def tokens_per_forward(self) -> float | None:
        """Without the prefill and its token; None where nothing followed it."""
        return (self.tokens - 1) / (self.forwards - 1) if self.forwards > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "tokens": self.tokens,
            "forwards": self.forwards,
            "tokens_per_forward": self.tokens_per_forward,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
        }

    def __str__(self) -> str:
        """One line for people."""
        each = self.tokens_per_forward
        mean = "" if each is None else f" ({each:.2f} tokens each after the prefill)"
        counts = f"{_plural(self.tokens, 'token')} in {_plural(self.forwards, 'forward')}"
        return f"{counts}{mean}, {self.tokens / self.seconds:.1f} tokens/s"


def _prompt(argument: str | None, option: str | None) -> str:
    if argument is not None and option is not None:
        raise typer.BadParameter("the prompt was given twice, as an argument too", param_hint="--prompt")
    text = argument if argument is not None else option
    if text is not None and text != "-":
        return text
    if sys.stdin.isatty():
        err.print("Reading the prompt from the keyboard; end it with Ctrl-D.", style="dim")
    return sys.stdin.read()


def _show(piece: str, forward: int) -> None:
    text = _safe(piece) if sys.stdout.isatty() else piece  # a file or a pipe gets the text as it is
    sys.stdout.write(text)
    sys.stdout.flush()


def _show_blocks(piece: str, forward: int) -> None:
    out.print(Text(_safe(piece), style=_BLOCK_STYLES[forward % 2]), end="", soft_wrap=True)


def _collect(piece: str, forward: int) -> None:
    pass


def _safe(text: str) -> str:
    """Without control characters: a model's text must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
