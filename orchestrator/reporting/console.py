"""The console of a run: placement, a line per step, samples with their rewards, and the result.

The lines are the same on a terminal (coloured) and in a file (plain); nothing is redrawn, so a log looks like the
screen."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from shlex import quote
from typing import Any, Protocol, cast

from rich.console import Console as Terminal
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from orchestrator.reporting.metrics import of_first_role
from orchestrator.reporting.terminal_tables import Rows
from orchestrator.result import Gain

BAR_WIDTH = 16
PLAIN_WIDTH = 140  # columns if the output is not a terminal
BAR_FROM_WIDTH = 100  # columns of a terminal; a narrower one shows numbers instead
RECENT_STEPS = 20  # from which the remaining time is estimated
ASKED = "12+34="  # example prompt for the trained model
CELL_LIMIT = 240  # characters of a prompt or completion


@dataclass(frozen=True)
class Shown:
    """A number on a step's line."""

    label: str
    value: Callable[[Mapping[str, float]], float | None]
    form: str


def _metric(name: str) -> Callable[[Mapping[str, float]], float | None]:
    return lambda metrics: of_first_role(metrics, name)


def _tokens_per_second(metrics: Mapping[str, float]) -> float | None:
    tokens, seconds = of_first_role(metrics, "num_tokens"), metrics.get("step_time")
    return tokens / seconds if tokens and seconds else None


STEP_LINE = (
    Shown("reward", _metric("reward"), "6.3f"),
    Shown("loss", _metric("loss"), "7.4f"),
    Shown("kl", _metric("kl"), "6.4f"),
    Shown("kl/row", _metric("objective/kl"), "6.3f"),  # summed over the tokens of a completion
    Shown("explained", _metric("val/explained_variance"), "6.3f"),  # of the returns' variance, by the critic
    Shown("entropy", _metric("entropy"), "5.3f"),
    Shown("length", _metric("completions/mean_length"), "5.1f"),
    Shown("stale", _metric("staleness/mean"), "3.1f"),
    Shown("tok/s", _tokens_per_second, "6.0f"),
    Shown("s/step", _metric("step_time"), "5.2f"),
)
LEFT_OUT_FIRST = ("entropy", "stale", "kl", "kl/row", "length", "tok/s", "loss", "s/step", "explained", "reward")
HELD_OUT_LINE = (
    Shown("loss", _metric("eval_loss"), ".4f"),
    Shown("margin", _metric("eval_rewards/margins"), ".4f"),
    Shown("accuracy", _metric("eval_rewards/accuracies"), ".1%"),
    Shown("margin", _metric("eval_margin"), ".4f"),  # of a reward model's scores
    Shown("accuracy", _metric("eval_accuracy"), ".1%"),
)


class Finished(Protocol):
    """The result of a run that has ended; `scores`: evaluation label -> score, in order."""

    @property
    def folder(self) -> Path: ...
    @property
    def scores(self) -> Mapping[str, float]: ...
    @property
    def checkpoint(self) -> Path | None: ...
    @property
    def model(self) -> Path | None: ...
    @property
    def averaged(self) -> Path | None: ...
    @property
    def picture(self) -> Path | None: ...
    @property
    def output(self) -> Path | None: ...
    @property
    def gains(self) -> Sequence[Gain]: ...
    @property
    def seconds(self) -> Mapping[str, float]: ...


@dataclass
class Pace:
    """The speed of a phase in elapsed time, including evaluations and checkpoints between its steps."""

    clock: Callable[[], float] = time.monotonic
    _ends: deque[tuple[int, float]] = field(default_factory=lambda: deque[tuple[int, float]](maxlen=RECENT_STEPS))

    def seconds_left(self, step: int, steps: int) -> float | None:
        """Estimated seconds after this step; None until two steps were seen."""
        self._ends.append((step, self.clock()))
        (first, began), (last, ended) = self._ends[0], self._ends[-1]
        return (ended - began) / (last - first) * (steps - step) if last > first else None


class Console:
    """`phases`: name -> its steps. `closed` is called once, when standard output is closed; later output is
    discarded."""

    def __init__(
        self, phases: Mapping[str, int], terminal: Terminal | None = None, closed: Callable[[], None] = lambda: None
    ) -> None:
        self._terminal = terminal or _terminal(closed)
        self._pace = {phase: Pace() for phase in phases}
        self._name_width = max((len(phase) for phase in phases), default=0)
        self._twentieths: dict[tuple[str, str], int] = {}
        self._began = time.monotonic()

    def placed(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Prints the placement: one row per actor, whose keys are the columns."""
        if not rows:
            return
        table = _table("placement")
        for name in rows[0]:
            table.add_column(name, justify="right" if isinstance(rows[0][name], int | float) else "left")
        for row in rows:
            table.add_row(*map(_plain, row.values()))
        self._terminal.print(table)

    def at(self, folder: Path, dashboard: str | None) -> None:
        """Prints the run's folder, which `troupe status`, `scale` and `resume` take, and the dashboard."""
        for name, place in (("run", str(folder)), ("dashboard", dashboard)):
            if place is not None:
                self._terminal.print(Text(f"{name:<10} ", "dim"), Text(place, overflow="fold"), sep="", soft_wrap=True)

    def data(self, phase: str, lines: Sequence[str]) -> None:
        """How many rows of a phase's data set are used."""
        for line in lines:
            self._terminal.print(Text().append(f"{phase:<{self._name_width}} ", "bold").append(line, "dim"))

    def step(self, phase: str, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        """One line: progress, metrics, remaining time."""
        left = self._pace[phase].seconds_left(step, steps)
        line = Text().append(f"{phase:<{self._name_width}} ", "bold")
        if self._terminal.width >= BAR_FROM_WIDTH:
            line.append(f"{self._bar(step / steps)} ", "green")
        line.append(f"{step:>{len(str(steps))}}/{steps}", "bold")
        line.append(f" {'' if left is None or step == steps else duration(left) + ' left':>12}", "cyan")
        for label, value in self._fitting(metrics, self._terminal.width - len(line)):
            line.append(f"  {label} ", "dim").append(value)
        self._terminal.print(line, no_wrap=True, overflow="ellipsis", crop=True)

    def _fitting(self, metrics: Mapping[str, float], room: int) -> list[tuple[str, str]]:
        """The numbers of a step that fit: the least important ones are left out, none is truncated."""
        found = [(shown, value) for shown in STEP_LINE if (value := shown.value(metrics)) is not None]
        cells = {shown.label: format(value, shown.form) for shown, value in found}
        for label in LEFT_OUT_FIRST:
            if sum(len(f"  {name} {value}") for name, value in cells.items()) > room:
                cells.pop(label, None)
        return list(cells.items())

    def progress(self, phase: str, column: str, share: float) -> None:
        """Progress of a column that is computed before the first step: one line per twentieth."""
        twentieth = int(20 * share)
        if self._twentieths.get((phase, column)) == twentieth:
            return
        self._twentieths[phase, column] = twentieth
        line = Text().append(f"{phase:<{self._name_width}} ", "bold").append(self._bar(share), "green")
        self._terminal.print(line.append(f" {column} {share:.0%}"))

    def precomputed(self, phase: str, column: str, detail: Mapping[str, Any]) -> None:
        """Whether a column of the whole data set was computed or read from the cache."""
        where = (
            "from the cache" if detail["from"] == "cache" else f"by {detail['from']} in {duration(detail['seconds'])}"
        )
        line = Text().append(f"{phase:<{self._name_width}} ", "bold").append(f"{column} of every row {where}, kept in ")
        self._terminal.print(line.append(str(detail["folder"]), "dim"), soft_wrap=True)

    def completions(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Samples with their rewards and the versions of the weights that generated them."""
        table = _table("samples")
        table.add_column("prompt", ratio=3, overflow="fold")
        table.add_column("completion", ratio=4, overflow="fold")
        table.add_column("reward", justify="right")
        table.add_column("version", justify="right")
        for row in rows:
            texts = (Text(_cell(text)) for text in (_conversation(str(row["prompt"])), str(row["completion"])))
            table.add_row(*texts, f"{row['reward']:.3f}", str(row["version"]))
        self._terminal.print(table)

    def evaluation(self, label: str, score: float) -> None:
        self._terminal.print(Text().append(f"evaluation {label}: ", "bold").append(f"{score:.4f}", "bold magenta"))

    def held_out(self, label: str, metrics: Mapping[str, float]) -> None:
        """One line with the most informative metrics of held-out rows."""
        line = Text().append(f"held-out rows {label}:", "bold")
        for shown in HELD_OUT_LINE:
            value = shown.value(metrics)
            if value is not None:
                line.append(f"  {shown.label} ", "dim").append(format(value, shown.form), "magenta")
        self._terminal.print(line)

    def warn(self, message: str) -> None:
        self._terminal.print(Text().append("! ", "bold yellow").append(message, "yellow"))

    def note(self, line: str) -> None:
        """A note that is not a warning."""
        self._terminal.print(Text(line, "dim", overflow="fold"), soft_wrap=True)

    def nothing_to_do(self, folder: Path, phase: str) -> None:
        """The run to be resumed has already finished all of its steps."""
        more = f"troupe resume {folder} phases.{phase}.train.steps=N"
        line = Text("nothing to do: the run has made all of its steps. To train on: ").append(more, "cyan")
        self._terminal.print(line, soft_wrap=True)

    def done(self, result: Finished) -> None:
        """Scores before and after each phase, the paths of the results, and commands to continue with."""
        self._terminal.print(Rule(f"done in {duration(time.monotonic() - self._began)}", style="green"))
        if result.gains:
            self._terminal.print(_gains(result.gains))
        if result.seconds:
            spent = [f"{on} {duration(seconds)}" for on, seconds in result.seconds.items() if seconds >= 0.5]
            self._terminal.print(Text("time  ", "dim").append(", ".join(spent) or "less than a second"))
        where = _table(None)
        places = {
            "model": result.model,
            "averaged": result.averaged,
            "data set": result.output,
            "curves": result.picture,
            "checkpoint": result.checkpoint,
            "run": result.folder,
        }
        for name, place in places.items():
            if place is not None:
                where.add_row(name, Text(str(place), overflow="fold"))
        self._terminal.print(where)
        self._terminal.print(Text("next", style="bold"))
        for command, purpose in _next_commands(result):
            self._terminal.print(Text(f"  {command}", "cyan"), Text(f"    {purpose}", "dim"), sep="\n", soft_wrap=True)

    def _bar(self, share: float) -> str:
        full, empty = ("#", ".") if self._terminal.options.ascii_only else ("━", "─")
        filled = round(BAR_WIDTH * share)
        return full * filled + empty * (BAR_WIDTH - filled)


def duration(seconds: float) -> str:
    """`7 s`, `2:05`, `1:02:03`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes = f"{rest // 60:02d}" if hours else str(rest // 60)
    return f"{f'{hours}:' if hours else ''}{minutes}:{rest % 60:02d}"


class _Output(Terminal):
    """Standard output, which may close at any time: a pipe to `head`, a terminal that is gone."""

    def __init__(self, closed: Callable[[], None], width: int | None = None) -> None:
        super().__init__(highlight=False, width=width)
        self._closed = closed

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Rich's own implementation would end the process."""
        if not self.quiet:
            self.quiet = True
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
            )  # so that flushing buffered output at exit does not fail
            self._closed()


def _terminal(closed: Callable[[], None]) -> Terminal:
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sampled character that the terminal cannot show must not end a run
    terminal = _Output(closed)
    return terminal if terminal.is_terminal else _Output(closed, PLAIN_WIDTH)


def _table(title: str | None) -> Table:
    named = title is not None
    return Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, show_header=named)


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _conversation(prompt: str) -> str:
    """The turns of a prompt that is a conversation (JSON in the table of completions); other prompts unchanged."""
    try:
        turns = json.loads(prompt)
    except ValueError:
        return prompt
    if not isinstance(turns, list) or not turns:
        return prompt
    said = [cast(dict[str, Any], turn) for turn in cast(list[Any], turns) if isinstance(turn, dict)]
    if len(said) < len(cast(list[Any], turns)) or not all("role" in turn and "content" in turn for turn in said):
        return prompt
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in said)


def _cell(text: str) -> str:
    """A text on one line: line breaks are made visible, the middle of a long text is left out, and escape sequences,
    which a model may write, are removed."""
    text = "".join(mark if mark.isprintable() else "·" for mark in text.replace("\n", "↵ "))
    half = CELL_LIMIT // 2
    return text if len(text) <= CELL_LIMIT else f"{text[:half]} … {text[-half:]}"


def _gains(phases: Sequence[Gain]) -> Rows:
    """One row per phase; scores in per cent if all of them are fractions."""
    values = [each for phase in phases if "score" in phase.measure for each in (phase.before, phase.after) if each]
    shares = all(0 <= value <= 1 for value in values)
    rows = Rows("phase", "steps", "tokens", "", "before", "after", "gain", numbers=("steps", "tokens"))
    for phase in phases:
        share = shares and "score" in phase.measure
        before, after = (_measured(each, share) for each in (phase.before, phase.after))
        gain = ""
        if phase.before is not None and phase.after is not None:
            by = phase.after - phase.before
            gain = f"{100 * by:+.1f} points" if share else f"{by:+.4f}"
        rows.add(phase.phase, str(phase.steps), f"{phase.tokens:,}", phase.measure, before, after, gain)
    return rows


def _measured(value: float | None, share: bool) -> str:
    return "" if value is None else f"{value:.1%}" if share else f"{value:.4f}"


def _gives_scores(model: Path) -> bool:
    """Whether the model in a folder is a reward model."""
    config = model / "config.json"
    architectures = json.loads(config.read_text()).get("architectures") if config.is_file() else None
    return any("ForSequenceClassification" in name for name in architectures or ())


def _next_commands(result: Finished) -> list[tuple[str, str]]:
    """Commands that can be copied into a shell."""
    board, model = result.folder.absolute() / "tensorboard", result.model
    commands = [(f"tensorboard --logdir {quote(str(board))}", "every curve of this run")] if board.is_dir() else []
    if model is not None and _gives_scores(model):
        ask = quote(
            "from transformers import pipeline\n"
            f"score = pipeline('text-classification', {str(model.absolute())!r}, function_to_apply='none')\n"
            f"print(score({ASKED!r} + score.tokenizer.eos_token)[0]['score'])"
        )
        commands.append((f"python -c {ask}", "score a text; the model is a Hugging Face folder"))
    elif model is not None:
        ask = quote(
            "from transformers import pipeline\n"
            f"generate = pipeline('text-generation', {str(model.absolute())!r})\n"
            f"print(generate({ASKED!r}, max_new_tokens=32)[0]['generated_text'])"
        )
        commands.append((f"python -c {ask}", "ask the model; it is a Hugging Face folder"))
        changed = f"model.path={quote(str(model.absolute()))}"
        commands.append(
            (f"troupe run {quote(str(result.folder.absolute() / 'config.json'))} {changed}", "train it further")
        )
    return commands
