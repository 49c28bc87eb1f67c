"""Data that an earlier phase of the run makes. Before that phase has ended, its columns are known, and a bound of its
lengths; the rows are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from actors.batch import Batch
from actors.errors import ConfigError, DataError
from orchestrator.config.schema import DataConfig
from orchestrator.data.formats import choose, renamed
from orchestrator.data.items import Item, Longest, Prompt
from orchestrator.data.order import Order
from orchestrator.data.report import DataReport
from orchestrator.pipeline import DataKind


@dataclass(frozen=True)
class Made:
    """What is known of a data set before it is made. Lengths in tokens."""

    phase: str
    columns: tuple[str, ...]
    longest_prompt: int
    longest_row: int


class AwaitedReport(DataReport):
    """Of data without rows so far."""

    def lines(self) -> list[str]:
        return [f"{self.source}: {', '.join(self.columns)}; read as {self.format}"]


class AwaitedSource:
    """Stands for the data until it can be read. Raises DataError if its columns cannot be read as this kind of data."""

    def __init__(self, data: DataConfig, kind: DataKind, made: Sequence[Made], *, model_max_length: int) -> None:
        self._phases = " and ".join(each.phase for each in made)
        source = f"what phase {self._phases} writes"
        found = [tuple(renamed(each.columns, data.columns, source).values()) for each in made]
        forms = [choose(kind, columns, data, source) for columns in found]
        self.report = AwaitedReport(source, str(forms[0]), tuple(dict.fromkeys(sum(found, ()))), rows=0, items=0)
        bound = min(data.max_length or model_max_length, model_max_length)
        prompt = min(bound, max(each.longest_prompt for each in made))
        row = prompt if kind.prompts_only else min(bound, max(each.longest_row for each in made))
        self.longest = Longest(row, row * kind.rows_per_item, prompt)

    @property
    def order(self) -> Order:
        self._not_there()

    @property
    def rows_fingerprint(self) -> str:
        """Raises ConfigError: a run that is resumed in the phase that learns from it has made it."""
        raise ConfigError(
            f"the data set that phase {self._phases} made is no longer in the run's folder; put it back, or resume "
            "from a step before that phase (--step)"
        )

    def __len__(self) -> int:
        self._not_there()

    def item(self, index: int) -> Item | Prompt:
        self._not_there()

    def batch(self, positions: Sequence[int]) -> Batch:
        self._not_there()

    def preview(self, index: int = 0) -> str:
        return f"({self.report.source} is there when that phase has ended)"

    def _not_there(self) -> NoReturn:
        raise DataError(f"{self.report.source} is read when that phase has ended")
