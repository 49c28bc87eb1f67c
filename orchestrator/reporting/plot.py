"""One picture of a run: evaluations, reward, loss, lengths, speed; phases shaded."""

# pyright: basic
# (matplotlib has incomplete types)

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

from orchestrator.reporting.metrics import METRICS_FILE, of_first_role, read

Line = dict[str, Any]
Points = list[tuple[int, float]]  # (step, value)
PICTURE = "curves.png"
INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
SHADES = ("#f1f5fb", "#fdf4ec", "#eff8f1", "#f8f0f8")  # behind phases, in turn
COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea")  # of phases, in turn
RAW_ALPHA = 0.25  # of the points behind a smoothed curve
SMOOTHED_FROM = 20  # points
AXIS_INCHES = 4.6  # the width of a panel
FIRST_ERROR = "eval_first_error"  # a process reward model's
LETTER_INCHES = 0.065  # of the name of a phase, which is left out where the phase is narrower


@dataclass(frozen=True)
class Panel:
    """One curve: a function from a line of metrics to a value (None: not on this line). `sparse`: few points, which are
    all marked. `goes_on`: the curve of a phase starts at the end of the previous one. `share`: the axis is from 0 to 1
    if all values are."""

    title: str
    value: Callable[[Line], float | None]
    sparse: bool = False
    goes_on: bool = False
    share: bool = False


def draw(
    folder: Path,
    file: Path | None = None,
    *,
    title: str | None = None,
    phases: Collection[str] | None = None,
    panels: Sequence[Panel] | None = None,
    dpi: int = 130,
) -> Path | None:
    """Draw `folder/curves.png` (or another file) from `folder/metrics.jsonl`; None if there are no metrics yet. With
    `phases`, only those, from the end of the one before; `panels`: by default, all that have values."""
    found = read(folder / METRICS_FILE)
    lines = [line for line in found if phases is None or line["phase"] in phases]
    before = list(takewhile(lambda line: phases is not None and line["phase"] not in phases, found))
    at_start = [line for line in before if line["step"] == before[-1]["step"]]
    panels = [panel for panel in panels or PANELS if any(panel.value(line) is not None for line in lines)]
    if not panels:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(AXIS_INCHES * columns, 2.9 * rows + 0.5), dpi=dpi, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title or folder.name, fontsize=11, color=INK, x=0.01, ha="left", fontweight="bold")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for index, (axis, panel) in enumerate(zip(axes, panels, strict=False)):
        _draw_panel(axis, panel, lines, at_start, named=index == 0)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    file = file or folder / PICTURE
    figure.savefig(file)
    return file


def _draw_panel(axis: Any, panel: Panel, lines: Sequence[Line], at_start: Sequence[Line], *, named: bool) -> None:
    """`at_start`: lines of an earlier phase, at the step where the first one of `lines` begins."""
    _style(axis, panel, share=panel.share and all(0 <= y <= 1 for _, y in _points(panel, lines)))
    previous = _points(panel, at_start)
    spans = _spans(lines, at_start)
    for index, (phase, first, last) in enumerate(spans):
        axis.axvspan(first, last, color=SHADES[index % len(SHADES)], lw=0)
        if named and len(phase) * LETTER_INCHES * (spans[-1][2] - spans[0][1]) <= (last - first) * AXIS_INCHES:
            axis.text((first + last) / 2, 0.97, phase, transform=axis.get_xaxis_transform(), **_LABEL)
        points = _points(panel, [line for line in lines if line["phase"] == phase])
        if not points:  # which does not interrupt a curve that goes on
            continue
        _draw_curve(axis, previous[-1:] + points if panel.goes_on else points, panel, COLOURS[index % len(COLOURS)])
        previous = points
    axis.set_xlim(spans[0][1], max(spans[-1][2], spans[0][1] + 1))


def _draw_curve(axis: Any, points: Points, panel: Panel, colour: str) -> None:
    steps, values = [list(column) for column in zip(*points, strict=True)]
    if panel.sparse:
        axis.plot(steps, values, color=colour, lw=1.8, marker="o", ms=4.5, clip_on=False)
        axis.annotate(f"{values[-1]:.2g}", (steps[-1], values[-1]), (0, 6), textcoords="offset points", **_VALUE)
    elif len(values) < SMOOTHED_FROM:
        axis.plot(steps, values, color=colour, lw=1.8)
    else:
        axis.plot(steps, values, color=colour, lw=0.8, alpha=RAW_ALPHA)
        axis.plot(steps, _smoothed(values), color=colour, lw=1.8)


def _points(panel: Panel, lines: Sequence[Line]) -> Points:
    return [(line["step"], y) for line in lines if (y := panel.value(line)) is not None]


def _style(axis: Any, panel: Panel, *, share: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_title(panel.title, fontsize=9.5, color=INK, loc="left")
    axis.grid(axis="y", color=GRID, lw=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8, colors=FAINT, length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(GRID)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axis.margins(y=0.12)
    if share:
        axis.set_ylim(0, 1.08)


def _spans(lines: Sequence[Line], at_start: Sequence[Line]) -> list[tuple[str, int, int]]:
    """(phase, first step, last step) in the order in which they ran; each begins where the one before ended."""
    spans: list[tuple[str, int, int]] = []
    for phase, group in groupby(lines, key=lambda line: line["phase"]):
        steps = [line["step"] for line in group]
        first = spans[-1][2] if spans else min(line["step"] for line in [*at_start, *lines])
        spans.append((phase, first, max(steps)))
    return spans


def _smoothed(values: Sequence[float]) -> list[float]:
    """Centred moving averages; the window is narrower at the ends, so that the curve is not shifted."""
    reach = max(2, len(values) // 20)
    windows = (values[max(0, at - reach) : at + reach + 1] for at in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _metric(name: str) -> Callable[[Line], float | None]:
    return lambda line: of_first_role(line, name)


def _likelier(line: Line) -> float | None:
    """Log-probability of chosen minus rejected held-out rows, in nats."""
    chosen, rejected = (line.get(f"eval_logps/{side}") for side in ("chosen", "rejected"))
    return None if chosen is None or rejected is None else chosen - rejected


def _ordered(line: Line) -> float | None:
    """The share of pairs that a reward model orders rightly."""
    return None if FIRST_ERROR in line else line.get("eval_accuracy")


def _steps_judged(line: Line) -> float | None:
    """The share of steps that a process reward model judges rightly: a metric of the same name, which has no pairs."""
    return line.get("eval_accuracy") if FIRST_ERROR in line else None


def _tokens_per_second(line: Line) -> float | None:
    tokens, seconds = of_first_role(line, "num_tokens"), line.get("step_time")
    return tokens / seconds if tokens and seconds else None


_LABEL: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 8, "color": FAINT}
_VALUE: dict[str, Any] = {"ha": "center", "fontsize": 8, "color": INK}
REWARD = Panel("reward", _metric("reward"))
EXPLAINED = Panel("critic: share of the returns' variance that it explains", _metric("val/explained_variance"))
# Of the policy's own samples the mean is the KL divergence; of rows that others sampled it is not, and may be below 0.
KL = Panel("log-ratio to the reference, nats a completion", _metric("objective/kl"))
PANELS = (
    Panel("evaluation: reward on held-out prompts", _metric("eval_reward"), sparse=True, goes_on=True, share=True),
    Panel("held-out rows: loss", _metric("eval_loss"), sparse=True),
    Panel("held-out rows: reward, chosen above rejected", _metric("eval_rewards/margins"), sparse=True),
    Panel("held-out rows: log-probability, chosen above rejected", _likelier, sparse=True),
    Panel("held-out rows: share with the right order", _metric("eval_rewards/accuracies"), sparse=True, share=True),
    Panel("held-out rows: score, chosen above rejected", _metric("eval_margin"), sparse=True),
    Panel("held-out rows: share scored in the right order", _ordered, sparse=True, share=True),
    Panel("held-out rows: share of steps judged rightly", _steps_judged, sparse=True, share=True),
    Panel("held-out answers: share whose first wrong step is found", _metric(FIRST_ERROR), sparse=True, share=True),
    REWARD,
    Panel("loss", _metric("loss")),
    EXPLAINED,
    KL,
    Panel("completion length, tokens", _metric("completions/mean_length")),
    Panel("tokens trained on, per second", _tokens_per_second),
    Panel("gradient norm", _metric("grad_norm")),
)
