"""Which items of the data have been trained on: the cursor that a checkpoint stores. Pure.

The cursor stands at the *training* frontier, not at the drawing one: items that were drawn, generated or scored but not
yet trained on are drawn again after a resume, unless the checkpoint has their finished group (`saved_groups.py`). So
none is lost and none is trained on twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Cursor:
    """Every position below `frontier` is settled (trained on, or dropped for good), and so are those in `beyond`."""

    frontier: int = 0
    beyond: set[int] = field(default_factory=set)

    def settle(self, positions: Iterable[int]) -> None:
        self.beyond.update(positions)
        while self.frontier in self.beyond:
            self.beyond.remove(self.frontier)
            self.frontier += 1

    def unsettled(self) -> Iterator[int]:
        """Positions in order, without end, beginning with the first that is not settled."""
        position = self.frontier
        settled = frozenset(self.beyond)
        while True:
            if position not in settled:
                yield position
            position += 1

    def to_json(self) -> dict[str, Any]:
        return {"frontier": self.frontier, "beyond": sorted(self.beyond)}

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> Cursor:
        return cls(int(state["frontier"]), set(state["beyond"]))
