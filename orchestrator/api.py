"""Runs from Python, in a script or a notebook: start a run, follow it, control it, get its result.

    start() ──► `troupe run` in a process of its own ──► RUN/events.jsonl, metrics.jsonl ──► events(), metrics()
                       ▲                                                                     result(): exit code
                       └── RUN/requests ◄── scale, pause, resume, checkpoint, stop

A run has a process of its own, not a thread of this one, because it needs its process' main thread and connection to
Ray, handles signals, and ends by killing its process when its Ray dies. None of this affects a notebook's kernel. The
kernel may also be restarted while the run continues: `attach(folder)` finds the run again.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.cluster import control
from orchestrator.config.loading import SUBMITTED, find_recipe, load_config, resumable_config, saved_config
from orchestrator.config.schema import RunConfig
from orchestrator.console_copy import CONSOLE_FILE
from orchestrator.restarts import COMMAND, folder_of
from orchestrator.run_handle import RunHandle, wait_for
from orchestrator.status import failure_of

START_TIMEOUT_S = 600.0  # until a run has its folder: reading the data, the first time perhaps from the Hub


def start(
    config: RunConfig | str | Path,
    overrides: Sequence[str] = (),
    *,
    local: bool = False,
    timeout_s: float = START_TIMEOUT_S,
    **settings: Any,
) -> RunHandle:
    """Start a run in a process of its own. `config`: a configuration, the name of a recipe, or a YAML file.

    `overrides` are as on the command line, `"train.steps=20"`; `settings` are the same as keyword arguments, with two
    underscores for a dot: `train__steps=20`. `local`: without Ray. What the run prints goes to `console.log` in its
    folder.

    Returns once the run is accepted: it has read its data and has a folder. Raises ConfigError if it is refused, and
    RunError if it ends before that, or if it takes longer than `timeout_s`; its process is ended then.
    """
    given = _overrides(overrides, settings)
    with tempfile.TemporaryDirectory(prefix="troupe-") as scratch:
        if isinstance(config, RunConfig):
            recipe = Path(scratch) / "config.json"
            recipe.write_text(config.model_dump_json())
        else:
            recipe = find_recipe(config)
        output = load_config(recipe, given).output
        output.mkdir(parents=True, exist_ok=True)
        others = set(output.glob("*"))
        command = ["run", str(recipe), *given, *(["--local"] if local else [])]
        return _launched(command, output, lambda pid: folder_of(output, pid, others), timeout_s)


def resume(
    folder: str | Path,
    overrides: Sequence[str] = (),
    *,
    local: bool = False,
    timeout_s: float = START_TIMEOUT_S,
    **settings: Any,
) -> RunHandle:
    """Continue a run that has ended, from its newest checkpoint, or from the start if it never saved one, in a process
    of its own. Arguments and errors are those of `start`. `console.log` is written anew."""
    folder = Path(folder).resolve()
    resumable_config(folder)
    before = len(_resumptions(folder))
    command = ["resume", str(folder), *_overrides(overrides, settings), *(["--local"] if local else [])]
    return _launched(command, folder, lambda _: folder if len(_resumptions(folder)) > before else None, timeout_s)


def attach(folder: str | Path) -> RunHandle:
    """A handle of a run that exists: another process started it, or this notebook did before its kernel was restarted,
    or it waits in the queue of a service. Raises ConfigError if the folder is not that of a run."""
    if not (Path(folder) / SUBMITTED).is_file():
        saved_config(Path(folder))
    return RunHandle(Path(folder), None)


def _overrides(given: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    return [*given, *(f"{key.replace('__', '.')}={_yaml(value)}" for key, value in settings.items())]


def _resumptions(folder: Path) -> list[dict[str, Any]]:
    return [event for event in control.events(folder) if event["event"] in ("resumed", "begun_again")]


def _launched(
    command: Sequence[str], where: Path, accepted: Callable[[int], Path | None], timeout_s: float
) -> RunHandle:
    """Start a `troupe` command that drives a run, and wait until the run is accepted: `accepted(pid)` is its folder
    then. Until then, what the command prints is kept in `where`."""
    console = where / f".console-{uuid.uuid4().hex[:8]}.log"
    with console.open("wb") as stream:
        process = subprocess.Popen(
            [*COMMAND, *command],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        folder = wait_for(
            lambda: accepted(process.pid) or (process.poll() is not None and failure_of(process, console)),
            timeout_s,
            "the run to be accepted",
        )
    except BaseException:  # Ctrl-C, too: the caller gets no handle to end it
        process.terminate()
        raise
    if isinstance(folder, Exception):
        console.unlink()
        raise folder
    assert isinstance(folder, Path)
    console.rename(folder / CONSOLE_FILE)
    return RunHandle(folder, process)


def _yaml(value: Any) -> str:
    """A value as an override's text has it."""
    return json.dumps(value, default=str)
