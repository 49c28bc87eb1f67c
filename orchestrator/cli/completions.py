"""Commands that ask a model, or score what was answered, and train nothing."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.application import AsJson, Local, Overrides, app

if TYPE_CHECKING:
    from orchestrator.completions.evaluate import Evaluation

Model = Annotated[str, typer.Argument(help="A run's folder, a checkpoint, a phase's folder, a model's, a hub name.")]
Rewards = Annotated[
    list[str] | None,
    typer.Option(
        "--reward", help="A reward's name, path/to/file.py:function, ray://NAMESPACE/NAME or a URL; repeat it."
    ),
]
FromRecipe = Annotated[
    str | None, typer.Option("--recipe", help="A recipe, YAML file or run's folder: its rewards, roles and sampling.")
]
Phase = Annotated[str | None, typer.Option("--phase", help="Which phase of it. Default: the last that fits.")]
Split = Annotated[str | None, typer.Option("--split", help="Which split of the data set.")]
Step = Annotated[int | None, typer.Option("--step", help="Of a run: that checkpoint. Default: the newest.")]


@app.command()
def generate(
    model: Model,
    data: Annotated[str, typer.Argument(help="Prompts: hub name, file, folder, or example:NAME.")],
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="Completions of each prompt.")] = 1,
    split: Split = None,
    reward: Rewards = None,
    scored: Annotated[bool, typer.Option("--scored", help="Score them by the rewards of the recipe or run.")] = False,
    recipe: FromRecipe = None,
    phase: Phase = None,
    step: Step = None,
    local: Local = False,
) -> None:
    """Sample completions of prompts, with the fleet, as Parquet; `troupe resume` goes on after an interruption."""
    from orchestrator.completions.generate import generate as generate_completions

    generate_completions(
        model,
        data,
        overrides or [],
        samples=samples,
        split=split,
        rewards=reward or (),
        scored=scored,
        recipe=recipe,
        phase=phase,
        step=step,
        local=local,
    )


@app.command()
def score(
    data: Annotated[str, typer.Argument(help="Prompts with completions: hub name, file, folder, or example:NAME.")],
    overrides: Overrides = None,
    reward: Rewards = None,
    recipe: FromRecipe = None,
    split: Split = None,
    model: Annotated[str | None, typer.Option("--model", help="Whose tokens completion_ids are; else bytes.")] = None,
    local: Local = False,
    as_json: AsJson = False,
) -> None:
    """Score the completions of a data set by rewards, as Parquet."""
    from orchestrator.completions.score import score as score_completions
    from orchestrator.completions.score import spreads

    with _console_apart(as_json):
        done = score_completions(
            data, overrides or [], rewards=reward or (), recipe=recipe, split=split, model=model, local=local
        )
    assert done.output is not None, "a run that scores writes"
    found = spreads(done.output)
    if as_json:
        rewards = {name: vars(spread) for name, spread in found.items()}
        typer.echo(json.dumps({"run": str(done.folder), "data": str(done.output), "rewards": rewards}))
        return
    from orchestrator.reporting.completion_tables import reward_table
    from orchestrator.reporting.tables import show_lines

    show_lines([reward_table(found)])


@app.command()
def evaluate(
    model: Model,
    overrides: Overrides = None,
    k: Annotated[list[int] | None, typer.Option("-k", help="pass@k; repeat it for several. Default: 1.")] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", "-n", min=1, help="Completions of each prompt. Default: the largest k.")
    ] = None,
    threshold: Annotated[float, typer.Option("--threshold", help="Reward from which a sample is right.")] = 1.0,
    data: Annotated[str | None, typer.Option("--data", help="Prompts, instead of the task's evaluation.data.")] = None,
    split: Split = None,
    reward: Rewards = None,
    recipe: FromRecipe = None,
    phase: Phase = None,
    step: Step = None,
    local: Local = False,
    report: Annotated[
        bool, typer.Option("--report", help="MODEL is the folder of an evaluation that has ended: its numbers.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model at a task: pass@k, mean reward, standard errors."""
    from orchestrator.completions.evaluate import evaluate as evaluate_model
    from orchestrator.completions.evaluate import report as report_of

    ks = k or [1]
    if report:
        found = report_of(Path(model), ks, threshold)
    else:
        with _console_apart(as_json):
            found = evaluate_model(
                model,
                overrides or [],
                ks=ks,
                samples=samples,
                threshold=threshold,
                data=data,
                split=split,
                rewards=reward or (),
                recipe=recipe,
                phase=phase,
                step=step,
                local=local,
            )
    _show(found, as_json)


def _show(found: Evaluation, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(found.to_json()))
        return
    from orchestrator.reporting.completion_tables import evaluation_lines
    from orchestrator.reporting.tables import show_lines

    show_lines(evaluation_lines(found))


@contextlib.contextmanager
def _console_apart(as_json: bool) -> Iterator[None]:
    """With JSON on standard output, what a run prints goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield
