"""`zconvert serve`: an OpenAI-compatible endpoint on a converted checkpoint."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import replace
from typing import Annotated

import typer
from rich.text import Text

from zconvert.checkpoint.anatomy import context_of
from zconvert.checkpoint.source import read_config, require_converted, resolve
from zconvert.cli import options
from zconvert.cli.ui import err
from zconvert.errors import UserError
from zconvert.tidar.families import language_config

API_KEY = "ZCONVERT_API_KEY"
"""environment variable with the key that clients must send; it is no option, since process lists show those"""

_DEFAULT_CONTEXT = 8192  # of a config that tells none


def command(
    checkpoint: options.Checkpoint,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen at; 0.0.0.0 is every one of this machine, 127.0.0.1 is for this machine alone."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0: any that is free.")] = 8000,
    model_name: Annotated[
        str | None, typer.Option(help="Name that clients call the model by. Default: the checkpoint's.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts decoded at a time.")] = 8,
    max_queue: Annotated[int, typer.Option(min=0, help="Texts that may wait; more are turned away (HTTP 429).")] = 128,
    max_context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a prompt and its text at most. Default: the checkpoint's.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take in all.")] = 600.0,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds that running texts have to end in after Ctrl-C or SIGTERM.")
    ] = 30.0,
    sampler: options.SamplerOption = options.Sampler.LOSSLESS,
    mix_weight: options.MixWeight = None,
    mode: options.ModeOption = options.Mode.SINGLE,
    compiled: options.CompileOption = None,
    proposals: options.Proposals = None,
    block_size: options.BlockSize = None,
    dtype: options.DtypeOption = options.Dtype.AUTO,
    device: options.DeviceOption = options.Device.AUTO,
    revision: options.Revision = None,
    token: options.Token = None,
) -> None:
    """Serve completions and chat by OpenAI's API, streamed or not, at /v1.

    Requests may name a sampler of their own (lossless, mixed). /health and /metrics (Prometheus) tell how it is.
    With ZCONVERT_API_KEY in the environment, clients must send that key as their API key.
    """
    options.require_fixed([mode], compiled)
    counts = options.accepted_counts(proposals, block_size)
    # A mistake is told before what takes seconds to import, and what is not installed before weights are fetched.
    require_converted(resolve(checkpoint, revision=revision, token=token, weights=False))
    try:
        from zconvert.serving.run import Server, bound
    except ImportError as error:
        raise UserError(
            "serving needs starlette, uvicorn and prometheus_client",
            found=error,
            fix="pip install 'zconvert[serve]'",
        ) from error

    settings = require_converted(source := resolve(checkpoint, revision=revision, token=token))
    api_key = os.environ.get(API_KEY) or None
    guarded = api_key is not None or _is_loopback(host)
    with bound(host, port) as address, err.status(Text(f"Loading {checkpoint} …")) as status:
        plan = options.plan(settings, sampler, mix_weight, mode, counts, block_size)
        from zconvert.checkpoint.load import end_token_ids, load_model
        from zconvert.serving.encoding import Served
        from zconvert.serving.server import Limits, Service
        from zconvert.serving.worker import Worker
        from zconvert.tidar.generate import layout_model_of

        model, tokenizer = load_model(source, dtype=str(dtype), device=str(device))
        plan = replace(plan, eos_token_ids=end_token_ids(model, tokenizer))
        config = language_config(read_config(source.folder))
        served = Served(
            name=model_name or source.name,
            tokenizer=tokenizer,
            plan=plan,
            context=max_context or context_of(config) or _DEFAULT_CONTEXT,
            vocabulary=model.get_input_embeddings().num_embeddings,
        )
        layout_model = layout_model_of(model)
        if compiled is not None:
            status.update("Compiling the decoder …")
        make = options.engine_maker(layout_model, plan, mode, compiled, settings, source.folder, batch_size)
        make()  # what can go wrong does so before anybody is served; the worker makes its own, in its own thread
        worker = Worker(make)
        limits = Limits(places=batch_size + max_queue, timeout=timeout, grace=grace)
        url = f"http://{f'[{host}]' if ':' in host else host}:{address.getsockname()[1]}/v1"

        def ready() -> None:
            _announce(served.name, url, guarded)
            options.warn_untrained(settings, sampler)

        server = Server(Service(served, worker, limits, api_key), grace, on_ready=ready)
        status.stop()
        server.run(sockets=[address])


def _announce(name: str, url: str, guarded: bool) -> None:
    err.print(Text(f"Serving {name} at {url}"), soft_wrap=True)
    if not guarded:
        what = f"Anybody who can reach this machine can use it: {API_KEY} is not set."
        err.print(Text(what, style="yellow"), soft_wrap=True)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
