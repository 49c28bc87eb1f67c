"""Commands that follow runs: which there are, what one prints, measures and samples. They read the runs' folders."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.application import AsJson, RunFolder, Runs, app

if TYPE_CHECKING:
    from orchestrator.service.run_folders import RunFolders
    from orchestrator.service.schemas import RunSummary

POLL_S = 0.5
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run is over.")]


@app.command("ls")
def list_runs(runs: Runs = Path("runs"), as_json: AsJson = False) -> None:
    """List the runs of a folder, the newest first."""
    from orchestrator.reporting.tables import show_lines
    from orchestrator.reporting.terminal_tables import Rows

    found = _folders(runs).summaries()
    if as_json:
        typer.echo(json.dumps([run.model_dump() for run in found]))
        return
    lines = [_listed(run) for run in found]
    why = ["why"] if any(line[-1] for line in lines) else []
    rows = Rows("run", "state", "step", "priority", "methods", "since", *why, numbers=("step", "priority"), prose=why)
    for line in lines:
        rows.add(*line[: 6 + len(why)])
    show_lines([rows])


def _listed(run: RunSummary) -> list[str]:
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.created))
    why = "" if run.detail.startswith((f"{run.state};", f"{run.state} ")) else run.detail
    why = why.removeprefix(run.state).removeprefix(": ")
    priority = "" if run.priority is None else str(run.priority)
    return [run.id, run.state, str(run.step), priority, ", ".join(run.methods), started, why]


@app.command()
def logs(folder: RunFolder, follow: Follow = False) -> None:
    """Print what a run has printed, from its last lines on."""
    from orchestrator.service.run_contents import log

    runs, offset = _folders(folder.resolve().parent), None
    with _in_words(f"{folder} is not a run's folder"):
        runs.folder(folder.resolve().name)
    while True:
        running = not runs.summary(folder.resolve().name).state.over  # before reading: the last lines must be read
        part = log(runs.folder(folder.resolve().name), offset=offset, running=running and follow)
        typer.echo(part.text, nl=False)
        if part.ended or (not follow and not part.text):
            return
        if not part.text:
            time.sleep(POLL_S)
        offset = part.next_offset


@app.command()
def metrics(
    folder: RunFolder,
    name: Annotated[list[str] | None, typer.Option("--name", help="Only this metric; may be given again.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="The last so many lines.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Print what a run measured last, a line for each step and evaluation."""
    from orchestrator.service.metric_lines import MetricLines

    lines = MetricLines(_run(folder)).answer(after=-1, phase=None, names=name or (), limit=limit)
    found: list[dict[str, Any]] = json.loads(lines)
    for line in found:
        typer.echo(json.dumps(line) if as_json else line_of(line))


@app.command()
def samples(
    folder: RunFolder,
    step: Annotated[int | None, typer.Option("--step", min=0, help="Default: the newest that has samples.")] = None,
    best: Annotated[bool, typer.Option("--best", help="The highest rewards first.")] = False,
    worst: Annotated[bool, typer.Option("--worst", help="The lowest rewards first.")] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many.")] = 10,
    tokens: Annotated[
        str | None, typer.Option("--tokens", help="Colour their tokens by advantages, sample_logps, mask ...")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print completions of a step with their rewards."""
    from orchestrator.service import run_contents

    order: run_contents.Order = "-reward" if best else "reward" if worst else "position"
    limits: dict[str, Any] = {"min_reward": None, "max_reward": None, "offset": 0, "limit": limit}
    with _in_words():
        found = run_contents.samples(_run(folder), step=step, order=order, **limits, tokens=tokens is not None)
    kept = [[each.model_dump() for each in sequences] for sequences in found.tokens or ()]
    if as_json:
        for index, row in enumerate(found.rows):
            typer.echo(json.dumps({**row, "tokens": kept[index]} if kept else row))
    elif tokens is not None:
        _show_tokens(found.rows, kept, tokens)
    else:
        for row in found.rows:
            typer.echo(f"{row.get('reward')}  {row.get('prompt')!r} {row.get('completion')!r}")


def _show_tokens(rows: list[dict[str, Any]], kept: list[list[dict[str, Any]]], column: str) -> None:
    from orchestrator.reporting.token_text import coloured, strengths

    shares = iter(strengths([each for sequences in kept for each in sequences], column))
    for row, sequences in zip(rows, kept, strict=True):
        typer.secho(f"{row.get('reward')}  {row.get('prompt')!r}", bold=True)
        for each in sequences:
            typer.echo("".join(typer.style(text, fg, bg) for text, fg, bg in coloured(each, next(shares), column)))
        if not sequences:
            typer.echo("its tokens are not kept (logging.token_samples, logging.token_steps)")


@app.command()
def chat(
    folder: RunFolder,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Say this, and end with the answer.")] = None,
    role: Annotated[str | None, typer.Option("--role", help="Another engine role than the policy's.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Of each answer.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0, max=2, help="0: the likeliest answer.")] = 1.0,
) -> None:
    """Chat with the policy of a run while it trains. An empty line ends it."""
    from actors.errors import ConfigError
    from orchestrator.api import attach
    from orchestrator.cluster.control import RunFile
    from orchestrator.service import client

    handle = attach(folder)
    run = RunFile.read(handle.folder) if handle.reachable else None
    if run is None or run.chat is None:
        why = f"it is {handle.status().state}" if run is None else "it samples nothing"
        raise ConfigError(f"the run in {folder} cannot be chatted with: {why}")
    messages: list[dict[str, str]] = []
    model = f"{run.name}/{role}" if role else run.name
    limits: dict[str, Any] = {"temperature": temperature, **({"max_tokens": max_tokens} if max_tokens else {})}
    while said := message or typer.prompt("you", default="", show_default=False):
        messages.append({"role": "user", "content": said})
        answer = ""
        for part in client.chat(run.chat, model, messages, **limits):
            typer.echo(part, nl=False)
            answer += part
        typer.echo()
        if message:
            return
        messages.append({"role": "assistant", "content": answer})


@contextmanager
def _in_words(why: str | None = None) -> Iterator[None]:
    """What the service would refuse is refused here, too. `why`: other words for it."""
    from actors.errors import ConfigError
    from orchestrator.service.errors import Problem

    try:
        yield
    except Problem as problem:
        raise ConfigError(why or str(problem)) from None


def _folders(runs: Path) -> RunFolders:
    from orchestrator.service.run_folders import RunFolders

    return RunFolders(runs)


def _run(folder: Path) -> Path:
    from orchestrator.config.loading import saved_config

    return saved_config(folder).parent


def line_of(measured: Mapping[str, Any]) -> str:
    """A line of metrics, to be read."""
    values = (
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in measured.items()
        if name not in ("step", "phase", "time")
    )
    return f"{measured['step']:>6} {measured['phase']}  {'  '.join(values)}"
