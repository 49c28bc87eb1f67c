"""Commands of the service: the one that is it, and those that are its clients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.application import AsJson, Overrides, Recipe, Runs, app

Host = Annotated[str, typer.Option("--host", help="Address to listen at.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen at; 0: a free one.")]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Recipes may name users' files, packages and environment variables.")
]
Preempt = Annotated[
    bool, typer.Option("--preempt", help="A run takes the place of running ones of lower priority, which wait then.")
]
AtOnce = Annotated[int | None, typer.Option("--at-once", min=1, help="How many runs may run at once.")]
MaxFailures = Annotated[
    int, typer.Option("--max-failures", min=1, help="Without a new checkpoint between them; then a run is given up.")
]


@app.command()
def serve(
    runs: Runs = Path("runs"),
    host: Host = "127.0.0.1",
    port: Port = 8400,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", help="File with the token. Default: TROUPE_TOKEN, else RUNS/.service/token."),
    ] = None,
    no_token: Annotated[
        bool, typer.Option("--no-token", help="Let in every process of this machine; only at a loopback address.")
    ] = False,
    allow_code: AllowCode = False,
    dashboard: Annotated[
        str | None,
        typer.Option("--dashboard", help="URL of a Ray's dashboard: runs are jobs there. Default: processes here."),
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option("--ray-address", help="HOST:PORT of that Ray, which plans are made for.")
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="Runs are one process each, without Ray.")] = False,
    preempt: Preempt = False,
    at_once: AtOnce = None,
    max_failures: MaxFailures = 3,
    autoscaling: Annotated[
        bool, typer.Option("--autoscaling", help="That Ray adds nodes by itself: runs do not wait for room, but in it.")
    ] = False,
) -> None:
    """Serve the runs of a folder over HTTP: submit, list, follow, control."""
    from orchestrator.queueing.progress import Budget
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
        preempt=preempt,
        at_once=at_once,
        autoscaling=autoscaling,
        budget=Budget(max_failures),
    )
    taken = bound(settings)

    def started() -> None:
        service_folder.announce(runs, url_of(taken))
        typer.echo(f"serving {settings.runs} at {url_of(taken)} (API: {url_of(taken)}/docs)")

    serve_app(create_app(settings), taken, started)


@app.command()
def up(
    runs: Runs = Path("runs"),
    host: Host = "127.0.0.1",
    port: Port = 8400,
    cpus: Annotated[int | None, typer.Option("--cpus", min=1, help="CPUs that runs may reserve.")] = None,
    object_store_mib: Annotated[
        int | None, typer.Option("--object-store-mib", min=80, help="Its size. Default: 512.")
    ] = None,
    allow_code: AllowCode = False,
    preempt: Preempt = False,
    at_once: AtOnce = None,
    max_failures: MaxFailures = 3,
) -> None:
    """Start a Ray with its dashboard on this machine, and the service; runs are its jobs. Where that Ray lives and its
    service has died, start the service alone."""
    from orchestrator.service import private_ray
    from orchestrator.service.settings import Settings

    Settings(runs, host, port, token="checked by the service itself")
    arguments = ["--host", host, "--port", str(port), "--max-failures", str(max_failures)]
    arguments += [*(["--allow-code"] if allow_code else []), *(["--preempt"] if preempt else [])]
    arguments += ["--at-once", str(at_once)] if at_once is not None else []
    found, anew = private_ray.up(runs.resolve(), cpus=cpus, object_store_mib=object_store_mib, serve=arguments)
    if not anew:
        typer.echo("Ray was there, and the runs on it go on: only the service was started")
    typer.echo(f"service    {found.service}, with the token in {runs / '.service' / 'token'}")
    typer.echo(f"Ray        {found.address}, dashboard {found.dashboard}, token in {runs / '.service' / 'ray-token'}")
    typer.echo(f"submit     troupe submit RECIPE --runs {runs}; end all by `troupe down --runs {runs}`")


@app.command()
def down(runs: Runs = Path("runs")) -> None:
    """End what `troupe up` started, and the runs on it, each after its step and a checkpoint."""
    from orchestrator.service import private_ray

    ended = private_ray.down(runs.resolve())
    typer.echo("ended" if ended else f"nothing runs for {runs}")


@app.command()
def submit(
    recipe: Recipe,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option("--name", help="The run's id; the same again is the same run.")] = None,
    priority: Annotated[
        int, typer.Option("--priority", help="Its place in the queue: higher ones first, then the one submitted first.")
    ] = 0,
    runs: Runs = Path("runs"),
    url: Annotated[
        str | None, typer.Option("--url", help="Of the service. Default: TROUPE_URL, else the one of --runs.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Start a run at a service (`troupe up`, `troupe serve`), or let it wait for room there, and return."""
    from orchestrator.service.client import Client
    from orchestrator.service.service_folder import found_service

    client = Client(*found_service(runs, url))
    found = client.submit(recipe, overrides or [], name, priority)
    if as_json:
        typer.echo(json.dumps(found))
        return
    why = "" if found["detail"] == found["state"] else f": {found['detail']}"
    submitted = "submitted" if found["created_now"] else "was submitted before"
    typer.echo(f"{found['id']}: {submitted}, {found['state']}{why}")
    typer.echo(f"follow it by `troupe logs -f {runs / found['id']}`")
