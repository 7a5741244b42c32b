"""The `zconvert` command: the list of commands, and nothing that takes time to import (torch comes in when needed)."""

from __future__ import annotations

from typing import Annotated

import typer

from zconvert import __version__
from zconvert.cli import (
    bench,
    convert_init,
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

app = typer.Typer(
    name="zconvert",
    help="Turn an autoregressive Mixture-of-Experts checkpoint into a block-diffusion model, the TiDAR way.",
    epilog="One after another: inspect → convert-init → midtrain → extend-context → sft → bench → evaluate → "
    "generate → export; or by one file: run. Recipes to copy: zconvert recipes list.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _examples(*lines: str) -> str:
    # Typer joins the lines of a paragraph; an empty line between keeps each example on its own.
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  [cyan]$ {line}[/cyan]" for line in lines)])


# In the order in which they are used; `--help` keeps it.
app.command(
    "inspect",
    epilog=_examples("zconvert inspect Qwen/Qwen3-30B-A3B", "zconvert inspect ./my-checkpoint --json"),
)(ui.handled(inspect.command))
app.command(
    "plan",
    epilog=_examples(
        "zconvert plan Qwen/Qwen3-30B-A3B --gpu h100-80gb --gpus 64 --tokens 600B",
        "zconvert plan ./my-tidar-init recipes/quickstart/midtrain.yaml --gpu my-machine.yaml",
        "zconvert plan config.json --accepted ./my-run --explain batch=8,context=32768",
    ),
)(ui.handled(plan.command))
app.command(
    "convert-init",
    epilog=_examples(
        "zconvert convert-init ./my-checkpoint --out ./my-tidar-init",
        "zconvert convert-init recipes/quickstart/convert-init.yaml",
    ),
)(ui.handled(convert_init.command))
app.command(
    "midtrain",
    epilog=_examples(
        "zconvert midtrain recipes/quickstart/midtrain.yaml",
        "zconvert midtrain recipes/quickstart/midtrain.yaml -- --nproc_per_node=8",
    ),
)(ui.handled(midtrain.command))
app.command("extend-context", epilog=_examples("zconvert extend-context recipes/quickstart/extend-context.yaml"))(
    ui.handled(extend_context.command)
)
app.command(
    "sft",
    epilog=_examples(
        "zconvert sft recipes/quickstart/sft.yaml", "zconvert sft recipes/quickstart/sft.yaml --show-example"
    ),
)(ui.handled(sft.command))
app.command(
    "generate",
    epilog=_examples(
        "zconvert generate ./my-run 'Once upon a time' --show-blocks",
        "zconvert generate ./my-run --sampler mixed --mix-weight 0.3 < prompt.txt",
        "zconvert generate ./my-run --prompts prompts.jsonl --out texts.jsonl",
        "zconvert generate ./my-run --chat --temperature 0.7",
    ),
)(ui.handled(generate.command))
app.command(
    "serve",
    epilog=_examples(
        "zconvert serve ./my-run --batch-size 16",
        "curl localhost:8000/v1/completions -H 'Content-Type: application/json' "
        """-d '{"model": "my-run", "prompt": "Once"}'""",
    ),
)(ui.handled(serve.command))
app.command("bench", epilog=_examples("zconvert bench ./my-run", "zconvert bench ./my-run --json > bench.json"))(
    ui.handled(bench.command)
)
app.command(
    "evaluate",
    epilog=_examples(
        "zconvert evaluate ./my-run --tasks gsm8k --limit 200",
        "zconvert evaluate ./my-run --baseline ./source --tasks humaneval --k 1,4,16 --samplers ar,lossless,mix:0.5 "
        "--allow-code-exec",
        "zconvert evaluate ./my-run --tasks gsm8k=./my-copy.jsonl,./my-task.yaml",
    ),
)(ui.handled(evaluate.command))
app.command("score", epilog=_examples("zconvert score ./my-run/evaluation --allow-code-exec"))(
    ui.handled(evaluate.score)
)
app.add_typer(
    tasks.app,
    name="tasks",
    epilog=_examples("zconvert tasks list", "zconvert tasks check gsm8k=./my-copy.jsonl"),
)
app.command(
    "lm-eval",
    context_settings=lm_eval.CONTEXT,
    epilog=_examples(
        "zconvert lm-eval run --model zconvert --model_args pretrained=./my-run,sampler=mix:0.5 --tasks gsm8k"
    ),
)(ui.handled(lm_eval.command))
app.command(
    "export",
    epilog=_examples(
        "zconvert export ./my-run --out ./my-tidar-model",
        "zconvert export ./my-run --hub my-name/my-tidar-model --private --dry-run",
        "zconvert export ./my-run --check vllm",
    ),
)(ui.handled(export.command))
app.command(
    "run",
    epilog=_examples("zconvert run recipes/quickstart/pipeline.yaml", "zconvert run pipeline.yaml --dry-run"),
)(ui.handled(run.command))
app.command("report", epilog=_examples("zconvert report ./my-run", "zconvert report ./my-run --out ./page"))(
    ui.handled(report.command)
)
app.add_typer(
    recipes.app,
    name="recipes",
    epilog=_examples("zconvert recipes list", "zconvert recipes copy zaya1-8b ./my-recipes"),
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
    app()


if __name__ == "__main__":
    main()
