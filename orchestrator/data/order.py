"""The order in which items are drawn: a pure function of the seed, so that a resumed run needs only a position."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Order:
    """Every epoch visits each of `length` items once; with `shuffle`, each epoch in a permutation of its own."""

    seed: int
    length: int
    shuffle: bool

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, index of the item) of the draw number `position`, which counts from 0 over all epochs."""
        epoch, rank = divmod(position, self.length)
        return epoch, int(_permutation(self.seed, epoch, self.length)[rank]) if self.shuffle else rank


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(length)
