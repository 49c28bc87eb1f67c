"""Tables of what completions are worth: the rewards of a data set, the evaluation of a model."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import RenderableType
from rich.text import Text

from orchestrator.completions.evaluate import Evaluation
from orchestrator.completions.score import Spread
from orchestrator.reporting.terminal_tables import Rows


def reward_table(rewards: Mapping[str, Spread]) -> Rows:
    columns = ("mean", "std", "min", "max", "completions", "no opinion")
    table = Rows("", *columns, numbers=columns)
    for name, spread in rewards.items():
        numbers = (spread.mean, spread.standard_deviation, spread.least, spread.most)
        table.add(name, *map(_number, numbers), str(spread.count), str(spread.silent or ""))
    return table


def evaluation_lines(found: Evaluation) -> list[RenderableType]:
    """What was asked, then the measures with their standard errors, then the rewards."""
    asked = f"{found.prompts} prompts, {found.samples} sample{'s' * (found.samples > 1)} each"
    how = "greedy" if found.temperature == 0 else f"temperature {found.temperature:g}"
    said = f"{asked}, {how}; right: reward >= {found.threshold:g}"
    measures = Rows("", "value", "standard error", "prompts", numbers=("value", "standard error", "prompts"))
    for name, estimate in found.measures.items():
        measures.add(name, _number(estimate.value), _number(estimate.standard_error), str(estimate.prompts))
    lines: list[RenderableType] = [Text(said, "bold"), measures]
    if found.unanswered:
        lines.append(Text(f"! {found.unanswered} prompts without a scored sample are in no measure", style="yellow"))
    return [*lines, Text(""), reward_table(found.rewards)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
