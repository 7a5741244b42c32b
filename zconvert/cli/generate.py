"""`zconvert generate`: text from a converted checkpoint: of a prompt, of a file of them, or in a conversation."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from zconvert.checkpoint.anatomy import context_of
from zconvert.checkpoint.folder import own_file
from zconvert.checkpoint.load import end_token_ids, load_model, load_tokenizer, prompt_ids
from zconvert.checkpoint.source import read_config, require_converted, resolve
from zconvert.cli import options
from zconvert.cli.streaming import Tally, show_blocks, show_nothing, show_plain, write
from zconvert.cli.ui import err, out, plural, print_json, progress
from zconvert.tidar.families import language_config

_FILES = "Many prompts"


def command(
    ctx: typer.Context,
    checkpoint: options.Checkpoint,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Text to go on from; '-' or nothing reads stdin.")
    ] = None,
    prompt_option: Annotated[str | None, typer.Option("--prompt", help="The prompt, as an option.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='JSONL file, with "prompt", else "text", or "messages" in each line, perhaps "id" and "seed".',
            rich_help_panel=_FILES,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--out", help="JSONL file for the texts of --prompts. Run again, it is completed.", rich_help_panel=_FILES
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Texts of --prompts decoded at a time.", rich_help_panel=_FILES)
    ] = 8,
    chat: Annotated[bool, typer.Option("--chat", help="Converse, line by line; /reset forgets, /quit ends.")] = False,
    sampler: options.SamplerOption = options.Sampler.LOSSLESS,
    mix_weight: options.MixWeight = None,
    mode: options.ModeOption = options.Mode.SINGLE,
    compiled: options.CompileOption = None,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy.", rich_help_panel=options.SAMPLING)] = 0.0,
    top_k: Annotated[
        int, typer.Option(min=0, help="Sample among the N likeliest tokens; 0: all.", rich_help_panel=options.SAMPLING)
    ] = 0,
    top_p: options.TopP = 1.0,
    min_p: Annotated[
        float,
        typer.Option(
            help="Sample among tokens with this share of the likeliest one's probability.",
            rich_help_panel=options.SAMPLING,
        ),
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: what was said already is less likely.", rich_help_panel=options.SAMPLING)
    ] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after N tokens.")] = 256,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be given several times.")] = None,
    proposals: options.Proposals = None,
    block_size: options.BlockSize = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Makes sampling repeatable.", rich_help_panel=options.SAMPLING)
    ] = None,
    dtype: options.DtypeOption = options.Dtype.AUTO,
    device: options.DeviceOption = options.Device.AUTO,
    blocks: Annotated[
        bool,
        typer.Option(
            "--show-blocks",
            help="Colour the text by the forwards that it came from; in a terminal without colours, brackets.",
        ),
    ] = False,
    add_bos: Annotated[
        bool, typer.Option("--add-bos/--no-add-bos", help="Start with the BOS token, where there is one.")
    ] = True,
    as_json: options.Json = False,
    revision: options.Revision = None,
    token: options.Token = None,
) -> None:
    """Generate text, several tokens a forward.

    Of one prompt, of a file of prompts (--prompts), or in a conversation (--chat). The text goes to stdout, the tally
    of tokens and forwards to stderr.
    """
    text = _one_prompt(prompt, prompt_option)
    _check_uses(text is not None, prompts, output, chat, blocks, as_json)
    counts = options.accepted_counts(proposals, block_size)
    options.require_fixed([mode], compiled)
    if stop and "" in stop:
        raise typer.BadParameter("it is empty: no text comes before it", param_hint="--stop")
    rows, done = [], set[int]()
    if prompts is not None:
        from zconvert.serving.prompts import read_rows, rows_done

        rows = read_rows(prompts)
    settings = require_converted(source := resolve(checkpoint, revision=revision, token=token))
    if output is not None:
        ctx.with_resource(own_file(output))
        done = rows_done(output, rows)
    if text is None and prompts is None and not chat:
        text = _read_stdin()
    with err.status(Text(f"Loading {checkpoint} …")) as status:
        plan = options.plan(  # before the weights are read, which can take minutes
            settings,
            sampler,
            mix_weight,
            mode,
            counts,
            block_size,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        from zconvert.cli.chat import Chat, require_template
        from zconvert.serving.batch import Settings, write_texts
        from zconvert.serving.text import GrowingText
        from zconvert.tidar.decoding import Request
        from zconvert.tidar.generate import layout_model_of

        if chat:
            require_template(load_tokenizer(source))
        model, tokenizer = load_model(source, dtype=str(dtype), device=str(device))
        plan = replace(plan, eos_token_ids=end_token_ids(model, tokenizer))
        layout_model, at_once = layout_model_of(model), 1 if output is None else batch_size
        if compiled is not None:
            status.update("Compiling the decoder …")
        engine = options.engine_maker(layout_model, plan, mode, compiled, settings, source.folder, at_once)()
    options.warn_untrained(settings, sampler)
    stops, context = stop or [], context_of(language_config(read_config(source.folder)))

    show = show_nothing if as_json else show_blocks if blocks else show_plain
    if chat:
        Chat(engine, tokenizer, max_new_tokens, stops, seed, show, context).talk()
        return
    if output is not None:
        shared = Settings(max_new_tokens, seed, stops, add_bos, context)
        with progress() as bars:
            task = bars.add_task("Decoding", completed=len(done), total=len(rows))
            write_texts(
                engine, tokenizer, rows, done, output, shared, lambda number: bars.update(task, completed=number)
            )
        if done:
            err.print(f"{plural(len(done), 'text')} of an earlier run kept.", style="dim")
        err.print(Text(f"{plural(len(rows), 'text')} in {output}", style="dim"), soft_wrap=True)
        return
    assert text is not None
    ids, tally = prompt_ids(tokenizer, text, add_bos=add_bos), Tally()
    written, result = write(
        engine,
        Request(ids, max_new_tokens, seed=seed),
        GrowingText(tokenizer, ids, stops),
        show,
        tally,
    )
    if as_json:
        told = {"prompt": text, "text": written, "sampler": str(sampler), "finish": result.finish, **tally.to_dict()}
        print_json(told)
        return
    out.print()
    err.print(Text(str(tally), style="dim"), soft_wrap=True)
    if settings.mode == "gated" and sampler is options.Sampler.LOSSLESS:
        err.print(Text(settings.lossless_means(), style="dim"), soft_wrap=True)


def _check_uses(
    prompted: bool, prompts: Path | None, output: Path | None, chat: bool, blocks: bool, as_json: bool
) -> None:
    """Refuses options that do not go together."""
    if chat + prompted + (prompts is not None) > 1:
        raise typer.BadParameter("there is a PROMPT, --prompts or --chat: give one of them", param_hint="--prompts")
    if (prompts is None) != (output is None):
        raise typer.BadParameter("--prompts and --out go together: give both", param_hint="--out")
    if as_json and blocks:
        raise typer.BadParameter(
            "it colours text, and --json prints none: leave one of them out", param_hint="--show-blocks"
        )
    if (chat and as_json) or (output is not None and (as_json or blocks)):
        name = "--json" if as_json else "--show-blocks"
        what = "--chat" if chat else "--prompts"
        raise typer.BadParameter(f"it has no meaning with {what}: leave one of them out", param_hint=name)


def _one_prompt(argument: str | None, option: str | None) -> str | None:
    """The prompt of the command line; None: it is to be read from stdin, or there is none."""
    if argument is not None and option is not None:
        raise typer.BadParameter("the prompt was given twice, as an argument too", param_hint="--prompt")
    text = argument if argument is not None else option
    return None if text == "-" else text


def _read_stdin() -> str:
    if sys.stdin.isatty():
        err.print("Reading the prompt from the keyboard; end it with Ctrl-D.", style="dim")
    return sys.stdin.read()
