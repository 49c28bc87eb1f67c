"""Commands that train: a run from its recipe, or on from where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actors.errors import ConfigError
from orchestrator.cli.application import Local, Overrides, Recipe, RunFolder, app
from orchestrator.console_copy import copy_output

Restarts = Annotated[
    int, typer.Option("--restarts", min=0, help="After a failure, go on from the last checkpoint, up to N times.")
]


Log = Annotated[Path | None, typer.Option("--log", help="Append what is printed to this file, too.")]


@app.command()
def run(
    recipe: Recipe,
    overrides: Overrides = None,
    local: Local = False,
    restarts: Restarts = 0,
    run_id: Annotated[
        str | None, typer.Option("--id", help="Name of the run's folder. Default: the run's name, time and process.")
    ] = None,
    log: Log = None,
) -> None:
    """Train as a recipe says."""
    from orchestrator.config.loading import load_config

    if log is not None:
        copy_output(log)
    if run_id is not None and restarts:
        raise ConfigError("--id and --restarts exclude each other: each attempt that left no checkpoint is a new run")
    config = load_config(recipe, overrides or [])
    if restarts:
        from orchestrator.restarts import supervise_run

        flags = ["--local"] if local else []
        raise typer.Exit(supervise_run(config.output, [recipe, *(overrides or []), *flags], flags, restarts))
    from orchestrator.run import run as run_config

    run_config(config, local=local, run_id=run_id)


@app.command()
def resume(
    folder: RunFolder,
    overrides: Overrides = None,
    step: Annotated[
        int | None, typer.Option("--step", min=1, help="Go on from this step's checkpoint; later ones are given up.")
    ] = None,
    local: Local = False,
    log: Log = None,
) -> None:
    """Continue a run from its newest checkpoint, exactly, or with other settings, which the run keeps from then on.
    One that never saved a checkpoint begins again from the start."""
    from orchestrator.config.loading import load_config, resumable_config

    if log is not None:
        copy_output(log)
    config = load_config(resumable_config(folder), overrides or [])
    from orchestrator.run import run as run_config

    run_config(config, local=local, resume=folder, from_step=step)
