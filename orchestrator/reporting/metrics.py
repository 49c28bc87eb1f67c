"""Metrics and completions that a run writes.

    RUN/metrics.jsonl             one line per write, flushed at once: `watch tail -n 3 RUN/metrics.jsonl` follows a run
    trackers                      the same numbers as PHASE/NAME, in TensorBoard, W&B ... (`trackers/`)
    RUN/completions/step_N.parquet   samples with their rewards
    RUN/tokens/step_N.parquet        their tokens, as far as they are kept (`token_tables.py`)
    Ray's metrics                 gauges `ray_troupe_NAME`, tagged with run and phase

A number that is not finite is `null` in the file, a gap in the curves, and is not exported to Ray.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from orchestrator.reporting import token_tables
from orchestrator.reporting.token_pieces import Pieces
from orchestrator.reporting.token_tables import TokenLimits, TokenRow
from orchestrator.reporting.trackers.tracker import Ended

METRICS_FILE = "metrics.jsonl"
COMPLETIONS_FOLDER = "completions"
GAUGE_TAGS = ("run", "phase")  # few: each combination of values is a time series of its own
FIELDS = ("step", "phase", "time")  # of a line, in addition to the metrics


def of_first_role(metrics: Mapping[str, Any], name: str) -> Any:
    """The metric of that name; where several roles report it, as `ROLE/NAME`, that of the first of them. None if there
    is none."""
    if name in metrics:
        return metrics[name]
    named = (full for full in metrics if full.partition("/")[2] == name and not full.startswith("eval_"))
    return next((metrics[full] for full in named), None)


class Sink(Protocol):
    """An additional destination of metrics."""

    def write(self, step: int, phase: str, metrics: Mapping[str, float]) -> None: ...

    def rewind(self, step: int) -> None:
        """Discards what was written for steps after `step`."""
        ...

    def close(self, ended: Ended) -> None:
        """May be called again; the second call does nothing."""
        ...


class MetricsLog:
    """The log of one run. `step` counts optimizer steps of the whole run, over all phases. `sinks`: where metrics go
    after the file has them."""

    def __init__(self, folder: Path, sinks: Sequence[Sink] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._completions, self._tokens = folder / COMPLETIONS_FOLDER, folder / token_tables.FOLDER
        self._sinks: tuple[Sink, ...] = (JsonLines(folder / METRICS_FILE), *sinks)

    def write(self, step: int, phase: str, metrics: Mapping[str, float]) -> None:
        """The line can be read by other processes when this returns. A step may have several lines (training,
        evaluation)."""
        for sink in self._sinks:
            sink.write(step, phase, metrics)

    def write_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> Path:
        """A Parquet file of one step's completions, written completely or not at all."""
        import pyarrow as pa
        from pyarrow import parquet

        self._completions.mkdir(exist_ok=True)
        file = self._completions / f"step_{step:06d}.parquet"
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: _column([row.get(name) for row in rows]) for name in names}
        table = pa.table({"step": [step] * len(rows)} | columns)
        parquet.write_table(table, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
        return file

    def write_tokens(self, step: int, rows: Sequence[TokenRow], pieces: Pieces, limits: TokenLimits) -> Path:
        """A Parquet file of the tokens of one step's completions; those of old steps are removed."""
        return token_tables.write(self._tokens, step, rows, pieces, limits)

    def rewind(self, step: int) -> None:
        """Discards the lines of steps after `step`, which a resumed run writes again."""
        for sink in self._sinks:
            sink.rewind(step)
        for file in [*token_tables.of_steps(self._completions), *token_tables.of_steps(self._tokens)]:
            if token_tables.step_of(file) > step:
                file.unlink()

    def close(self, ended: Ended = "finished") -> None:
        for sink in self._sinks:
            sink.close(ended)


class JsonLines:
    """`metrics.jsonl`. An incomplete last line of a killed run is skipped by `read` and removed by `rewind`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stream = file.open("a", buffering=1)

    def write(self, step: int, phase: str, metrics: Mapping[str, float]) -> None:
        line = {"step": step, "phase": phase, "time": round(time.time(), 3)}
        finite = {name: _rounded(value) if math.isfinite(value) else None for name, value in metrics.items()}
        self._stream.write(json.dumps({**line, **finite}) + "\n")

    def rewind(self, step: int) -> None:
        self._stream.close()
        kept = [line for line in read(self._file) if line["step"] <= step]
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(self._file)
        self._stream = self._file.open("a", buffering=1)

    def close(self, ended: Ended) -> None:
        self._stream.close()


class RayGauges:
    """Gauges on Ray's metrics port. That port has no authentication, so the only tags are run and phase."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Any] = {}

    def write(self, step: int, phase: str, metrics: Mapping[str, float]) -> None:
        for name, value in {"step": float(step), **metrics}.items():
            if math.isfinite(value):
                self._gauge(name).set(value, tags={"run": self._run, "phase": phase})

    def rewind(self, step: int) -> None:
        """A gauge holds only its last value."""

    def close(self, ended: Ended) -> None:
        self._gauges.clear()

    def _gauge(self, name: str) -> Any:
        from ray.util.metrics import Gauge

        if name not in self._gauges:
            self._gauges[name] = Gauge(gauge_name(name), description=name, tag_keys=GAUGE_TAGS)
        return self._gauges[name]


def gauge_name(metric: str) -> str:
    """Of a metric, as this process registers it; Ray exports it with the prefix `ray_`."""
    return "troupe_" + re.sub(r"[^0-9a-zA-Z_]+", "_", metric)


def read(file: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file, in order; an incomplete last line is left out."""
    return list(_complete_lines(file.read_text().split("\n"))) if file.exists() else []


def _complete_lines(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            parsed = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(parsed, dict) and "step" in parsed:
            yield parsed


def _column(values: list[Any]) -> Any:
    """An Arrow array of values of one plain type: strings, numbers ... Other values become JSON strings: Arrow would
    refuse them, or change them (a mapping gets the keys of all the others)."""
    import pyarrow as pa

    kinds = {_KINDS.get(type(value)) for value in values if value is not None}
    if len(kinds) <= 1 and None not in kinds:
        try:
            return pa.array(values)
        except (pa.ArrowException, OverflowError, UnicodeError):  # a very large integer, half a character
            pass
    return pa.array([None if value is None else json.dumps(value, default=str) for value in values])


_KINDS = {str: "text", bytes: "bytes", bool: "truth", int: "number", float: "number"}


def _rounded(value: float) -> float:
    """Seven significant digits, the precision of float32."""
    return float(f"{value:.7g}")
