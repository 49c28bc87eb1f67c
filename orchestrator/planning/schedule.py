"""The number of steps of a phase, and of items per step. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """`steps` batches of `batch` items, of which the last one has `last`."""

    steps: int
    batch: int
    last: int

    @property
    def items(self) -> int:
        """Items drawn in the whole phase."""
        return (self.steps - 1) * self.batch + self.last

    @classmethod
    def of_steps(cls, steps: int, batch: int) -> Schedule:
        return cls(steps, batch, batch)

    @classmethod
    def of_items(cls, items: int, batch: int, *, least: int = 1) -> Schedule:
        """Exactly `items` items are drawn. A remainder that does not fill a batch is a smaller last batch, or joins the
        one before if it has fewer than `least` items."""
        full, rest = divmod(max(items, least), batch)
        if rest == 0:
            return cls.of_steps(full, batch)
        if rest < least and full:
            return cls(full, batch, batch + rest)
        return cls(full + 1, batch, rest)

    def describe(self, named: str, length: int | None) -> str:
        """`2 steps of 6 pairs, the last of 4: 1 pass over 10 pairs`. `length`: of the data set, if it is known."""
        said = f"{self.steps} step{'s' * (self.steps != 1)} of {self.last if self.steps == 1 else self.batch} {named}"
        if self.steps > 1 and self.last != self.batch:
            said += f", the last of {self.last}"
        if length is None:
            return said
        passes = f"{self.items / length:.3g}"
        return f"{said}: {passes} pass{'es' * (passes != '1')} over {length} {named}"
