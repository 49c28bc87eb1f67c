"""Commands that watch and steer a run in progress, by its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli.application import AsJson, RunFolder, app
from orchestrator.cli.watching import line_of

if TYPE_CHECKING:
    from orchestrator.run_handle import RunHandle


SHOWN_WAIT_S = 1.0


@app.command()
def scale(
    folder: RunFolder,
    target: Annotated[str, typer.Argument(help="ROLE=N (rollout=4), or ROLE=auto.")],
    as_json: AsJson = False,
) -> None:
    """Change the number of a running job's workers."""
    from orchestrator.cluster.control import parse_scale

    role, count = parse_scale(target)
    handle = _handle(folder)
    handle.scale(role, count)
    if count == "auto":
        words = f"the number of {role} workers follows the load; `troupe status {folder}` says why it changes"
    else:
        words = f"asked for {count} {role} worker(s); `troupe status {folder}` shows them come and go"
        if role in handle.status().autoscale:
            words += f"\nit stays at {count} until `troupe scale {folder} {role}=auto`"
    _say(as_json, words, role=role, workers=count)


@app.command()
def prioritise(
    folder: RunFolder,
    priority: Annotated[int, typer.Argument(help="Higher ones are started first.")],
    as_json: AsJson = False,
) -> None:
    """Change the place in the queue of a run that was submitted to a service."""
    _handle(folder).prioritise(priority)
    _say(as_json, f"{folder.name} has priority {priority} now", priority=priority)


@app.command()
def pause(folder: RunFolder, as_json: AsJson = False) -> None:
    """Hold a run before its next step; its processes stay."""
    step = _handle(folder).pause()
    _say(as_json, f"paused after step {step}; `troupe unpause {folder}` lets it go on", step=step)


@app.command()
def unpause(folder: RunFolder, as_json: AsJson = False) -> None:
    """Let a paused run go on."""
    step = _handle(folder).resume()
    _say(as_json, f"goes on after step {step}", step=step)


@app.command()
def checkpoint(folder: RunFolder, as_json: AsJson = False) -> None:
    """Let a running job write a checkpoint before its next step."""
    path = str(_handle(folder).checkpoint())
    _say(as_json, path, checkpoint=path)


@app.command()
def stop(folder: RunFolder, as_json: AsJson = False) -> None:
    """End a running job after its step and a checkpoint."""
    last = _handle(folder).stop()
    more = (
        f"`troupe resume {folder}` continues it from {last.name}"
        if last
        else f"it saved no checkpoint; `troupe resume {folder}` begins it again"
    )
    _say(as_json, f"stopped; {more}", checkpoint=str(last) if last else None)


@app.command()
def status(folder: RunFolder, as_json: AsJson = False) -> None:
    """Say how a run stands, and what it measured last."""
    run = _handle(folder)
    seen = run.status()
    if as_json:
        typer.echo(json.dumps({"run": run.folder.name, **asdict(seen)}))
        return
    said = seen.state if seen.state.startswith(seen.kind) else f"{seen.kind}: {seen.state}"
    typer.echo(f"{typer.style(run.folder.name, bold=True)}: {said}")
    for each in seen.at_work:
        name = " ".join([each["stage"], *each["writes"]])
        calls = f"{each['calls']} call(s), " if each["calls"] else ""
        typer.echo(f"  at work: {name}, {calls}{each['share']:.0%} of the last second")
    for wait in seen.waits:
        if wait["seconds"] >= SHOWN_WAIT_S:
            typer.echo(f"  waits {wait['seconds']:.0f} s for {wait['what']}")
    for role, ranks in seen.ranks.items():
        typer.echo(f"  {role}: {len(ranks)} rank(s)")
        for rank in ranks:
            typer.echo(f"    {_process(role, rank)}")
    for role, count in seen.workers.items():
        by_load = ""
        if scaled := seen.autoscale.get(role):
            held = f", held until `troupe scale {folder} {role}=auto`" if scaled["held"] else ""
            last = f"; last decision {scaled['said']}" if scaled["said"] else ""
            by_load = f"; {scaled['min']} to {scaled['max']} by load{held}{last}"
        members = seen.members.get(role, ())
        elsewhere = sum("address" in member and member["state"] == "serving" for member in members)
        beyond = f", and {elsewhere} from elsewhere" if elsewhere else ""
        typer.echo(f"  {role}: {count['serving']} of {count['desired']} worker(s) serve{beyond}{by_load}")
        for member in members:
            typer.echo(f"    {_process(role, member)}")
    if seen.metrics:
        main = {name: value for name, value in seen.metrics.items() if "/" not in name}  # `troupe metrics` has all
        typer.echo(f"  step {line_of(main).strip()}")


def _process(role: str, told: Mapping[str, Any]) -> str:
    facts = (f"{name} {value}" for name, value in told.items() if name not in ("index", "state"))
    return f"{role}/{told['index']} {told['state']}: {', '.join(facts)}"


def _say(as_json: bool, words: str, **facts: Any) -> None:
    typer.echo(json.dumps(facts) if as_json else words)


def _handle(folder: Path) -> RunHandle:
    from orchestrator.api import attach

    return attach(folder)
