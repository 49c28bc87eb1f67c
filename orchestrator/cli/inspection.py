"""Commands that look at recipes, methods, data, rewards and this machine, and train nothing."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from orchestrator.cli import completion
from orchestrator.cli.application import BROKEN, REFUSED, AsJson, Overrides, Recipe, app


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show what `run` would do, and what it would refuse; launch nothing."""
    from orchestrator.config.loading import load_config

    config = load_config(recipe, overrides or [])
    from orchestrator.reporting.tables import show_plan

    if not show_plan(config, as_json=as_json):
        raise typer.Exit(REFUSED)


@app.command()
def methods(
    name: Annotated[
        str | None, typer.Argument(help="Show this method's options.", autocompletion=completion.method_names)
    ] = None,
    papers: Annotated[bool, typer.Option("--papers", help="Show where each method is from.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the methods, or one method's stages and options."""
    from orchestrator.reporting.tables import show_method, show_methods

    show_methods(papers=papers, as_json=as_json) if name is None else show_method(name, as_json=as_json)


@app.command()
def keys(
    prefix: Annotated[
        str | None,
        typer.Argument(help="Only keys that begin with this, for example train.", autocompletion=completion.key_names),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every key, not only the top level.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what each key of a recipe does, and what it may be."""
    from orchestrator.reporting.tables import show_keys

    show_keys(prefix, everything=everything, as_json=as_json)


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, with which an editor completes and checks keys, methods and options."""
    import json

    from orchestrator.config.json_schema import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=1))


@app.command()
def grafana() -> None:
    """Print a Grafana dashboard of the gauges that runs export on Ray's metrics port."""
    from orchestrator.reporting.grafana import as_file

    typer.echo(as_file(), nl=False)


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the shipped recipes."""
    from orchestrator.reporting.tables import show_recipes

    show_recipes(as_json=as_json)


@app.command()
def check(
    data: Annotated[str, typer.Argument(help="Hub name, file, folder, or example:NAME.")],
    method: Annotated[
        str, typer.Option("--method", help="Which method the data is for.", autocompletion=completion.method_names)
    ],
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
    as_json: AsJson = False,
) -> None:
    """Call a reward with a few rows, show what it returns and how long it takes, and say what is wrong with it."""
    import json

    from orchestrator.reporting.reward_check import check_call
    from orchestrator.reporting.tables import show_lines

    done = check_call(
        reward,
        overrides or [],
        data=data,
        split=split,
        rows=rows,
        completions=completions,
        model=model,
        address=address,
    )
    typer.echo(json.dumps(done.as_data())) if as_json else show_lines(done.lines())
    if done.outcome.hangs:  # its thread would keep this process for as long as it hangs
        sys.stdout.flush()
        os._exit(BROKEN)
    if done.outcome.values is None:
        raise typer.Exit(BROKEN)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what works on this machine, by trying it."""
    from orchestrator.reporting.doctor import doctor as examine

    if not examine(as_json=as_json):
        raise typer.Exit(BROKEN)
