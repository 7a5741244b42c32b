"""The `zconvert` command: the list of commands, and nothing that takes time to import (torch comes in when needed)."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Annotated, Any

import typer

from zconvert import __version__
from zconvert.cli import (
    bench,
    convert_init,
    doctor,
    evaluate,
    export,
    extend_context,
    generate,
    inspect,
    lm_eval,
    midtrain,
    plan,
    recipes,
    report,
    run,
    serve,
    sft,
    tasks,
    ui,
)
from zconvert.cli.help import Command, Group, examples

app = typer.Typer(
    name="zconvert",
    cls=Group,
    help="Turn an autoregressive Mixture-of-Experts checkpoint into a block-diffusion model by the TiDAR recipe.\n\n"
    "One after another: inspect → plan → convert-init → midtrain → extend-context → sft → bench → evaluate → export; "
    "or by one file: run. `zconvert COMMAND --help` has each command's options and examples.",
    epilog=examples(
        "zconvert doctor",
        "zconvert recipes copy zaya1-8b ./my-recipes",
        "zconvert run ./my-recipes/pipeline.yaml",
        "zconvert generate ./my-run 'Once upon a time'",
    ),
    no_args_is_help=True,
    rich_markup_mode=None,  # help and usage errors are plain text: what they name can be copied
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _add(theme: str, name: str, function: Callable[..., Any], *lines: str, **settings: Any) -> None:
    app.command(name, cls=Command, rich_help_panel=theme, epilog=examples(*lines), **settings)(ui.handled(function))


# Themes and commands in the order in which they are used; `--help` keeps it.
_FIRST = "Before anything is spent"
_TRAIN = "Convert and train"
_DECODE = "Decode"
_MEASURE = "Measure, and hand on"

_add(_FIRST, "doctor", doctor.command, "zconvert doctor", "zconvert doctor --json")
_add(
    _FIRST,
    "inspect",
    inspect.command,
    "zconvert inspect Qwen/Qwen3-30B-A3B",
    "zconvert inspect ./my-checkpoint --json",
)
_add(
    _FIRST,
    "plan",
    plan.command,
    "zconvert plan Qwen/Qwen3-30B-A3B --gpu h100-80gb --gpus 64 --tokens 600B",
    "zconvert plan ./my-recipes/pipeline.yaml --gpu my-machine.yaml",
    "zconvert plan config.json --accepted ./my-run --explain batch=8,context=32768",
)
app.add_typer(
    recipes.app,
    name="recipes",
    rich_help_panel=_TRAIN,
    epilog=examples("zconvert recipes list", "zconvert recipes copy zaya1-8b ./my-recipes"),
)
_add(
    _TRAIN,
    "convert-init",
    convert_init.command,
    "zconvert convert-init ./my-checkpoint --out ./my-tidar-init",
    "zconvert convert-init Qwen/Qwen3-30B-A3B --out ./my-gated-init --mode gated",
    "zconvert convert-init ./my-recipes/convert-init.yaml",
)
_add(
    _TRAIN,
    "midtrain",
    midtrain.command,
    "zconvert midtrain ./my-recipes/midtrain.yaml",
    "zconvert midtrain ./my-recipes/midtrain.yaml -- --nproc_per_node=8",
)
_add(
    _TRAIN,
    "extend-context",
    extend_context.command,
    "zconvert extend-context ./my-recipes/extend-context.yaml",
)
_add(
    _TRAIN,
    "sft",
    sft.command,
    "zconvert sft ./my-recipes/sft.yaml --show-example",
    "zconvert sft ./my-recipes/sft.yaml",
)
_add(
    _TRAIN,
    "run",
    run.command,
    "zconvert run ./my-recipes/pipeline.yaml --dry-run",
    "zconvert run ./my-recipes/pipeline.yaml",
)
_add(_TRAIN, "report", report.command, "zconvert report ./my-run", "zconvert report ./my-run --out ./page")
_add(
    _DECODE,
    "generate",
    generate.command,
    "zconvert generate ./my-run 'Once upon a time' --show-blocks",
    "zconvert generate ./my-run --sampler mixed --mix-weight 0.3 < prompt.txt",
    "zconvert generate ./my-run --prompts prompts.jsonl --out texts.jsonl",
    "zconvert generate ./my-run --chat --temperature 0.7",
)
_add(
    _DECODE,
    "serve",
    serve.command,
    "zconvert serve ./my-run --batch-size 16",
    "curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\",
    """  -d '{"model": "my-run", "prompt": "Once upon a time"}'""",
)
_add(
    _MEASURE,
    "bench",
    bench.command,
    "zconvert bench ./my-run",
    "zconvert bench ./my-run --json > bench.json",
    "zconvert bench ./my-run --prompts prompts.jsonl --batch-size 1 --batch-size 8",
)
_add(
    _MEASURE,
    "evaluate",
    evaluate.command,
    "zconvert evaluate ./my-run --tasks gsm8k --limit 200",
    "zconvert evaluate ./my-run --baseline ./source --tasks humaneval --k 1,4,16 \\",
    "  --samplers ar,lossless,mix:0.5 --allow-code-exec",
    "zconvert evaluate ./my-run --tasks gsm8k=./my-copy.jsonl,./my-task.yaml",
)
_add(_MEASURE, "score", evaluate.score, "zconvert score ./my-run/evaluation --allow-code-exec")
app.add_typer(
    tasks.app,
    name="tasks",
    rich_help_panel=_MEASURE,
    epilog=examples("zconvert tasks list", "zconvert tasks check gsm8k=./my-copy.jsonl"),
)
_add(
    _MEASURE,
    "lm-eval",
    lm_eval.command,
    "zconvert lm-eval run --model zconvert --tasks gsm8k \\",
    "  --model_args pretrained=./my-run,sampler=mix:0.5",
    "zconvert lm-eval run --help",
    context_settings=lm_eval.CONTEXT,
    options_metavar="[ARGS]...",
)
_add(
    _MEASURE,
    "export",
    export.command,
    "zconvert export ./my-run --out ./my-tidar-model",
    "zconvert export ./my-run --hub my-name/my-tidar-model --private --dry-run",
    "zconvert export ./my-run --check vllm",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        ui.out.print(f"zconvert {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the console command."""
    ui.end_on_sigterm()
    # Headers of a large model are some 100,000 small objects, which the default (700) walks through again and again.
    gc.set_threshold(50_000, 20, 20)
    app(prog_name="zconvert")


if __name__ == "__main__":
    main()
