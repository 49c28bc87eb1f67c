"""Commands of engines that are started elsewhere than a run: on another cluster, by another job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.application import RunFolder, app

TOKEN = "TROUPE_ENGINE_TOKEN"
Address = Annotated[str, typer.Argument(help="HOST:PORT, or https://HOST:PORT.")]
Role = Annotated[str | None, typer.Option("--role", help="The engine role that it joins. Default: the only one.")]


@app.command()
def engine(
    model: Annotated[
        str | None, typer.Option("--model", help="Folder or hub name. Default: the run's, which must be here, too.")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen at; 0: a free one.")] = 8420,
    gpus: Annotated[int, typer.Option("--gpus", min=0, help="GPUs of the engine.")] = 0,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of an engine on the CPU.")] = 1,
) -> None:
    """Start an engine that runs can attach: `troupe attach RUN HOST:PORT` there."""
    import secrets

    token = os.environ.get(TOKEN) or secrets.token_urlsafe(32)
    os.environ |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    if gpus == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from orchestrator.cluster.control import refuse_token
    from rollout.attached.server import Offer, serve

    refuse_token(token)
    if TOKEN not in os.environ:
        typer.echo(f"export {TOKEN}={token}")
    serve(Offer(token, model, threads, gpus), host, port, lambda line: typer.echo(line))


@app.command()
def attach(
    folder: RunFolder,
    address: Address,
    role: Role = None,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help=f"File with the engine's token. Default: {TOKEN}.")
    ] = None,
) -> None:
    """Let an engine that was started elsewhere join a running job."""
    from actors.errors import ConfigError
    from orchestrator.api import attach as attach_to

    try:
        token = token_file.read_text().strip() if token_file else os.environ.get(TOKEN)
    except OSError as error:
        raise ConfigError(f"--token-file {token_file}: {error}") from None
    if not token:
        raise ConfigError(f"set {TOKEN} to the token that `troupe engine` was started with, or give --token-file")
    joined = attach_to(folder).attach(address, token, role=role)
    typer.echo(f"{address} has joined {joined}; `troupe status {folder}` shows it")


@app.command()
def detach(folder: RunFolder, address: Address, role: Role = None) -> None:
    """Let go of an engine that was attached, once it has finished what it has."""
    from orchestrator.api import attach as attach_to

    left = attach_to(folder).detach(address, role=role)
    typer.echo(f"{address} leaves {left}")
