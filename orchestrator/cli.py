"""The command `troupe`. Commands import lazily, so that help and refusals appear at once."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from actors.errors import Interrupted, RunError, UserError
from orchestrator.import_pin import pin

if TYPE_CHECKING:
    from orchestrator.api import RunHandle

REFUSED, BROKEN = 2, 1  # exit codes

app = typer.Typer(
    name="troupe",
    help="Post-training of language models on Ray, with a group of actors per role.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Recipe = Annotated[str, typer.Argument(help="Name of a shipped recipe (see `troupe recipes`), or a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.key=value, for example train.steps=100.")]
RunFolder = Annotated[Path, typer.Argument(help="The run's folder, as `troupe run` printed it.")]
Restarts = Annotated[
    int, typer.Option("--restarts", min=0, help="After a failure, go on from the last checkpoint, up to N times.")
]
Local = Annotated[bool, typer.Option("--local", help="Everything in this process, without Ray: for debugging.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Ends the process. Exit codes: 0 done, 1 the run failed, 2 the input is refused (a few lines, no traceback), 130
    Ctrl-C, 143 SIGTERM. `arguments`: default, the command line."""
    try:
        pin()
        app(arguments)
    except UserError as error:
        _complain("refused", error)
        sys.exit(REFUSED)
    except RunError as error:
        _complain("the run failed", error)
        sys.exit(BROKEN)
    except Interrupted as ended:  # it has said where it stands
        sys.exit(ended.exit_code)


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


@app.command()
def run(recipe: Recipe, overrides: Overrides = None, local: Local = False, restarts: Restarts = 0) -> None:
    """Train as a recipe says."""
    from orchestrator.config.loading import load_config

    config = load_config(recipe, overrides or [])
    if restarts:
        from orchestrator.restarts import supervise_run

        flags = ["--local"] if local else []
        raise typer.Exit(supervise_run(config.output, [recipe, *(overrides or []), *flags], flags, restarts))
    from orchestrator.run import run as run_config

    run_config(config, local=local)


@app.command()
def resume(
    folder: RunFolder,
    overrides: Overrides = None,
    step: Annotated[
        int | None, typer.Option("--step", min=1, help="Go on from this step's checkpoint; later ones are given up.")
    ] = None,
    local: Local = False,
) -> None:
    """Continue a run from its newest checkpoint, exactly, or with other settings, which the run keeps from then on."""
    from orchestrator.config.loading import load_run

    config = load_run(folder, overrides or [])
    from orchestrator.run import run as run_config

    run_config(config, local=local, resume=folder, from_step=step)


@app.command()
def plan(recipe: Recipe, overrides: Overrides = None) -> None:
    """Show what `run` would do, and what it would refuse; launch nothing."""
    from orchestrator.config.loading import load_config

    config = load_config(recipe, overrides or [])
    from orchestrator.reporting.tables import show_plan

    if not show_plan(config):
        raise typer.Exit(REFUSED)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show this method's options.")] = None,
    papers: Annotated[bool, typer.Option("--papers", help="Show where each method is from.")] = False,
) -> None:
    """List the methods, or one method's stages and options."""
    from orchestrator.reporting.tables import show_method, show_methods

    show_methods(papers=papers) if name is None else show_method(name)


@app.command()
def keys(
    prefix: Annotated[str | None, typer.Argument(help="Only keys that begin with this, for example train.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every key, not only the top level.")] = False,
) -> None:
    """Say what each key of a recipe does, and what it may be."""
    from orchestrator.reporting.tables import show_keys

    show_keys(prefix, everything=everything)


@app.command()
def recipes() -> None:
    """List the shipped recipes."""
    from orchestrator.reporting.tables import show_recipes

    show_recipes()


@app.command()
def check(
    data: Annotated[str, typer.Argument(help="Hub name, file, folder, or example:NAME.")],
    method: Annotated[str, typer.Option("--method", help="Which method the data is for.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.key=value, for example data.columns.chosen=better.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Which split of the data set.")] = "train",
    bad_rows: Annotated[int, typer.Option("--bad-rows", help="How many rows may be unusable.")] = 0,
    model: Annotated[str | None, typer.Option("--model", help="Tokenise for it, too, and name rows too long.")] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", help="Longest row in tokens; needs --model.")
    ] = None,
    max_prompt_length: Annotated[
        int | None, typer.Option("--max-prompt-length", help="Longest prompt in tokens; needs --model.")
    ] = None,
) -> None:
    """Read a data set as a method would, and say what is wrong with it."""
    from orchestrator.reporting.tables import show_data

    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    show_data(data, method, model, overrides or [], split=split, max_bad_rows=bad_rows, **limits)


@app.command("check-reward")
def check_reward(
    reward: Annotated[
        str, typer.Argument(help="A reward's name, path/to/file.py:function, ray://NAMESPACE/NAME, a URL, or `judge`.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value of the reward, for example timeout_s=5 options.factor=2.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="Hub name, file or folder; else a few examples.")] = None,
    split: Annotated[str, typer.Option("--split", help="Which split of the data set.")] = "train",
    rows: Annotated[int, typer.Option("--rows", min=1, help="How many rows, at most.")] = 4,
    completions: Annotated[
        str, typer.Option("--completions", help="The column that holds what is to be scored.")
    ] = "completion",
    model: Annotated[str | None, typer.Option("--model", help="Whose tokens completion_ids are; else bytes.")] = None,
    address: Annotated[str | None, typer.Option("--address", help="HOST:PORT of the Ray that an actor is in.")] = None,
) -> None:
    """Call a reward with a few rows, show what it returns and how long it takes, and say what is wrong with it."""
    from orchestrator.reporting.reward_check import show_reward
    from orchestrator.reporting.tables import show_lines

    lines, outcome = show_reward(
        reward,
        overrides or [],
        data=data,
        split=split,
        rows=rows,
        completions=completions,
        model=model,
        address=address,
    )
    show_lines(lines)
    if outcome.hangs:  # its thread would keep this process for as long as it hangs
        sys.stdout.flush()
        os._exit(BROKEN)
    if outcome.values is None:
        raise typer.Exit(BROKEN)


@app.command()
def scale(folder: RunFolder, target: Annotated[str, typer.Argument(help="ROLE=N, for example rollout=4.")]) -> None:
    """Change the number of a running job's workers."""
    from orchestrator.cluster.control_actor import parse_scale

    role, count = parse_scale(target)
    _handle(folder).scale(role, count)
    typer.echo(f"asked for {count} {role} worker(s); `troupe status {folder}` shows them come and go")


@app.command()
def pause(folder: RunFolder) -> None:
    """Hold a run before its next step; its processes stay."""
    typer.echo(f"paused after step {_handle(folder).pause()}; `troupe unpause {folder}` lets it go on")


@app.command()
def unpause(folder: RunFolder) -> None:
    """Let a paused run go on."""
    typer.echo(f"goes on after step {_handle(folder).resume()}")


@app.command()
def checkpoint(folder: RunFolder) -> None:
    """Let a running job write a checkpoint before its next step."""
    typer.echo(str(_handle(folder).checkpoint()))


@app.command()
def stop(folder: RunFolder) -> None:
    """End a running job after its step and a checkpoint."""
    last = _handle(folder).stop()
    typer.echo(f"stopped; {f'`troupe resume {folder}` continues it from {last.name}' if last else 'no checkpoint yet'}")


@app.command()
def status(folder: RunFolder) -> None:
    """Say how a run stands, and what it measured last."""
    run = _handle(folder)
    seen = run.status()
    typer.echo(f"{typer.style(run.folder.name, bold=True)}: {seen.state}")
    for table, indent in ((seen.workers, 2), (seen.metrics, None)):
        if table:
            typer.echo(json.dumps(dict(table), indent=indent))


@app.command()
def doctor() -> None:
    """Say what works on this machine, by trying it."""
    from orchestrator.reporting.doctor import doctor as examine

    if not examine():
        raise typer.Exit(BROKEN)


def _handle(folder: Path) -> RunHandle:
    from orchestrator.api import attach

    return attach(folder)


def _complain(what: str, error: Exception) -> None:
    for line in (f"{what}: {error}", *getattr(error, "__notes__", [])):
        print(f"troupe: {line}", file=sys.stderr)


if __name__ == "__main__":
    main()
