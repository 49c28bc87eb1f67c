"""The application that the commands of each room register with, and the arguments that several of them take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli import completion

REFUSED, BROKEN = 2, 1  # exit codes

app = typer.Typer(
    name="troupe",
    help="Post-training of language models on Ray, with a group of actors per role.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Recipe = Annotated[
    str,
    typer.Argument(
        help="Name of a shipped recipe (see `troupe recipes`), or a YAML file.", autocompletion=completion.recipe_names
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key.key=value, for example train.steps=100.", autocompletion=completion.override_keys),
]
RunFolder = Annotated[Path, typer.Argument(help="The run's folder, as `troupe run` printed it.")]
Local = Annotated[bool, typer.Option("--local", help="Everything in this process, without Ray: for debugging.")]
Runs = Annotated[Path, typer.Option("--runs", help="The folder that holds the runs' folders.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        typer.echo(f"troupe {metadata.version('troupe')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...
