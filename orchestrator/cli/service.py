"""Commands of the service: the one that is it, and those that are its clients."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.application import app

Runs = Annotated[Path, typer.Option("--runs", help="The folder that holds the runs' folders.")]


@app.command()
def serve(
    runs: Runs = Path("runs"),
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen at; 0: a free one.")] = 8400,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", help="File with the token. Default: TROUPE_TOKEN, else RUNS/.service/token."),
    ] = None,
    no_token: Annotated[
        bool, typer.Option("--no-token", help="Let in every process of this machine; only at a loopback address.")
    ] = False,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Recipes may name users' files, packages and environment variables.")
    ] = False,
    dashboard: Annotated[
        str | None,
        typer.Option("--dashboard", help="URL of a Ray's dashboard: runs are jobs there. Default: processes here."),
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option("--ray-address", help="HOST:PORT of that Ray, which plans are made for.")
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="Runs are one process each, without Ray.")] = False,
) -> None:
    """Serve the runs of a folder over HTTP: submit, list, follow, control."""
    from orchestrator.service import service_folder
    from orchestrator.service.app import create_app
    from orchestrator.service.server import bound, url_of
    from orchestrator.service.server import serve as serve_app
    from orchestrator.service.settings import Settings

    service_folder.service_folder(runs)
    token = None if no_token else service_folder.token_of(runs, token_file)
    settings = Settings(
        runs.resolve(),
        host,
        port,
        token,
        allow_code=allow_code,
        dashboard=dashboard,
        ray_address=ray_address,
        local=local,
    )
    taken = bound(settings)

    def started() -> None:
        service_folder.announce(runs, url_of(taken))
        typer.echo(f"serving {settings.runs} at {url_of(taken)} (API: {url_of(taken)}/docs)")

    serve_app(create_app(settings), taken, started)
