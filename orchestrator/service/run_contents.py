"""What a run wrote, as the service gives it: samples, checkpoints, console (metrics: `metric_lines.py`).
Reads files; not for an event loop."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from orchestrator.checkpoint import AVERAGED, MANIFEST, NAME, STATE
from orchestrator.console_copy import CONSOLE_FILE
from orchestrator.reporting import token_tables
from orchestrator.reporting.metrics import COMPLETIONS_FOLDER
from orchestrator.service.errors import Problem
from orchestrator.service.schemas import CheckpointEntry, LogText, Samples, TokenSequence

LOG_BYTES = 2**16  # of one answer
Order = Literal["position", "reward", "-reward"]


def samples(
    folder: Path,
    *,
    step: int | None,
    order: Order,
    min_reward: float | None,
    max_reward: float | None,
    offset: int,
    limit: int,
    tokens: bool = False,
) -> Samples:
    """The samples of one step, of the newest if none is named; with their `tokens`, as far as these are kept. Raises
    Problem 404 for a step that has none."""
    files = {token_tables.step_of(file): file for file in token_tables.of_steps(folder / COMPLETIONS_FOLDER)}
    if step is None and not files:
        return Samples(steps=[], step=None, total=0, rows=[], tokens=[] if tokens else None)
    chosen = max(files) if step is None else step
    if chosen not in files:
        others = f"it has those of {len(files)} steps, {min(files)} to {max(files)}" if files else "it has none yet"
        raise Problem(404, f"run {folder.name} has no samples of step {chosen}; {others}", "step")
    rows = [each for each in enumerate(_rows(files[chosen])) if _within(each[1].get("reward"), min_reward, max_reward)]
    if order != "position":
        worst = math.inf if order == "reward" else -math.inf  # rows without a reward come last
        rows.sort(key=lambda each: _number(each[1].get("reward"), worst), reverse=order == "-reward")
    shown = rows[offset : offset + limit]
    kept = _tokens(folder, chosen, [line for line, _ in shown]) if tokens else None
    steps = sorted(files)
    return Samples(steps=steps, step=chosen, total=len(rows), rows=[row for _, row in shown], tokens=kept)


def checkpoints(folder: Path) -> list[CheckpointEntry]:
    """Those that are complete, the oldest first. Their files are not read: `troupe resume` verifies them."""
    found = [path for path in sorted((folder / "checkpoints").glob("step-*")) if NAME.fullmatch(path.name)]
    return [entry for path in found if (entry := _checkpoint(path)) is not None]


def log(folder: Path, *, offset: int | None, running: bool) -> LogText:
    """A part of what the run printed, from `offset` on, or its end. `running`: as it was before this call. The text
    ends with a whole line, unless a line alone is longer than an answer or nothing more will come."""
    file = folder / CONSOLE_FILE
    if not file.is_file():
        return LogText(text="", offset=0, next_offset=0, ended=not running)
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        start = max(0, size - LOG_BYTES) if offset is None else min(offset, size)
        stream.seek(start)
        text = stream.read(LOG_BYTES)
    at_end = start + len(text) >= size
    if not (at_end and not running) and (cut := text.rfind(b"\n") + 1):
        text = text[:cut]
    elif running and at_end and len(text) < LOG_BYTES:
        text = b""  # a line that is still being written
    if offset is None and start:
        skipped = text.find(b"\n") + 1
        start, text = start + skipped, text[skipped:]
    return LogText(
        text=text.decode(errors="replace"),
        offset=start,
        next_offset=start + len(text),
        ended=not running and start + len(text) >= size,
    )


def _rows(file: Path) -> list[dict[str, Any]]:
    return _remembered(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=16)
def _remembered(file: Path, changed: int) -> list[dict[str, Any]]:
    """Not to be changed. A file is written once; `changed` tells one that a resumed run has put in its place."""
    from pyarrow import parquet

    table = parquet.ParquetFile(file).read(use_threads=False)
    return [{name: _plain(value) for name, value in row.items()} for row in table.to_pylist()]


def _tokens(folder: Path, step: int, lines: Sequence[int]) -> list[list[TokenSequence]]:
    """Of each of these lines of a step's completions; an empty list for one of which none are kept."""
    try:
        kept = token_tables.read(folder / token_tables.FOLDER, step, lines)
    except FileNotFoundError:  # those of this step are removed by now, or were never kept
        kept = {}
    return [[TokenSequence(**each) for each in kept.get(line, ())] for line in lines]


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _within(reward: Any, low: float | None, high: float | None) -> bool:
    if low is None and high is None:
        return True
    value = _number(reward, math.nan)
    return (low is None or value >= low) and (high is None or value <= high)  # NaN is within no limits


def _number(value: Any, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else otherwise


def _checkpoint(path: Path) -> CheckpointEntry | None:
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        state: dict[str, Any] = json.loads((path / STATE).read_text())
        return CheckpointEntry(
            name=path.name,
            step=state["total_step"],
            phase=state["phase"],
            bytes=sum(file["bytes"] for file in manifest.values()),
            files=len(manifest),
            written=(path / MANIFEST).stat().st_mtime,
            averaged=any(name.startswith(f"{AVERAGED}/") for name in manifest),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # it was removed meanwhile, or is damaged
        return None
