"""A stage: one verb by one role, with the columns that it reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from actors.columns import COLUMNS, Axis, Head

DRIVER = "driver"  # the role of stages that run in the driver itself


class Verb(StrEnum):
    GENERATE = "generate"
    TAKE = "take"
    SCORE = "score"
    KEEP = "keep"
    REGROUP = "regroup"
    REPLAY = "replay"
    INFER = "infer"
    CREDIT = "credit"
    UPDATE = "update"
    WRITE = "write"
    MIX = "mix"


ROW_SOURCES = frozenset({Verb.GENERATE, Verb.TAKE})  # they bring rows into a prompt group
GROUPWISE = ROW_SOURCES | {Verb.SCORE, Verb.KEEP, Verb.REGROUP}  # they run for each prompt group separately


@dataclass(frozen=True)
class Stage:
    """One verb by one role. `call` is what is executed, with `options` as its keyword arguments. `share`: the part of
    [0, 1) for whose prompt groups the stage runs; where a group stands in it, its seed and position decide. `only`: a
    column per row, and the value of it that a row must have for the stage to run for it; None: it runs for all."""

    verb: Verb
    role: str
    reads: frozenset[str]
    writes: frozenset[str]
    call: Callable[..., Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    share: tuple[float, float] = (0.0, 1.0)
    only: tuple[str, int] | None = None

    def covers(self, place: float) -> bool:
        """Whether the stage runs for a prompt group that stands there."""
        return self.share[0] <= place < self.share[1]

    @property
    def name(self) -> str:
        return f"{self.role}.{self.verb}"

    @property
    def head(self) -> Head | None:
        """What the stage asks of its role's model; None if it asks nothing."""
        return self.options.get("head")

    @property
    def reads_tokens(self) -> bool:
        """It looks at values per token, which the driver does not have."""
        return any(COLUMNS[name].axis is Axis.TOKEN for name in self.reads)

    @property
    def top_k(self) -> int | None:
        """How many of its most likely tokens a model says at each position; None if the stage does not ask that."""
        return self.options.get("top_k")

    @property
    def other_prompts(self) -> bool:
        """Its role's model reads the completions behind other prompts than they were sampled for."""
        return bool(self.options.get("other_prompts"))

    @property
    def retokenised(self) -> bool:
        """Its role's model has another tokenizer, and reads the completions in its own tokens."""
        return bool(self.options.get("retokenised"))

    @property
    def episode(self) -> str | None:
        """The role of the environments that the samples talk to; None if they are of one turn."""
        return self.options.get("episode")

    @property
    def precomputed(self) -> bool:
        """It runs over the whole data set before the first step, once."""
        return bool(self.options.get("precomputed"))


def in_conflict(one: Stage, other: Stage) -> bool:
    """Whether two stages must keep their order: they share a role, or one writes what the other reads or writes."""
    roles = {one.role, one.options.get("source")} & {other.role, other.options.get("source")} - {None, DRIVER}
    overwrites = one.writes & other.writes and not _of_other_rows(one, other)
    return bool(roles or overwrites or one.writes & other.reads or one.reads & other.writes)


def _of_other_rows(one: Stage, other: Stage) -> bool:
    """Whether no row is one for which both stages run."""
    if one.only is None or other.only is None:
        return False
    return one.only[0] == other.only[0] and one.only[1] != other.only[1]


def roles_of(verb: Verb, stages: Iterable[Stage]) -> tuple[str, ...]:
    """The roles that have a stage with this verb, in order of appearance."""
    return tuple(dict.fromkeys(stage.role for stage in stages if stage.verb is verb))


def rows_by_share(stages: Sequence[Stage]) -> list[int]:
    """Rows that the stages bring into a prompt group, for each part of [0, 1) in which the same ones of them run."""
    places = sorted({0.0, *(edge for stage in stages for edge in stage.share)} - {1.0})
    return [sum(int(stage.options["n"]) for stage in stages if stage.covers(place)) for place in places]
