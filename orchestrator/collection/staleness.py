"""The staleness contract: how far a token may lag behind the weights that it trains. Pure.

A *version* counts published weights: version v is what the policy is after v training steps. A batch trained at version
v may hold no token older than `v - max_staleness`. The contract is kept in three places, in this order: what is
admitted, what is cancelled before new weights are published, and a hard check when a batch is shipped to the trainer.
Versions are counted over the whole run. `max_staleness = 0` is synchronous training: nothing is admitted for a batch
before the weights it trains are published.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from actors.errors import StalenessError


@dataclass(frozen=True)
class Contract:
    """`batch`: prompt groups per training step; `last`: in the last one, if that has other than that. `first_version`:
    the policy's when the phase began."""

    max_staleness: int
    batch: int
    first_version: int = 0
    batches: int | None = None  # of the whole phase: nothing is admitted that no step would train
    last: int | None = None

    def may_admit(self, *, accepted: int, running: int, version: int) -> bool:
        """Whether one more group may start. `accepted`: groups taken into batches or waiting for one since the phase
        began; `running`: groups being generated or scored. Source: arXiv:2505.24298 (AReaL), eq. 3."""
        ahead = self.max_staleness + version - self.first_version + 1
        if self.batches is None or ahead < self.batches:
            return accepted + running < ahead * self.batch
        return accepted + running < (self.batches - 1) * self.batch + (self.last or self.batch)

    def size(self, version: int) -> int:
        """Groups in the batch that is trained at `version`."""
        return self.last or self.batch if version - self.first_version + 1 == self.batches else self.batch

    def oldest_allowed(self, version: int) -> int:
        """The oldest token version in a batch that is trained at `version`."""
        return version - self.max_staleness

    def too_old(self, oldest: int | None, *, next_version: int) -> bool:
        """Whether a group whose oldest token has version `oldest` can no longer be trained once `next_version` is out.
        None: all of its tokens are of weights that do not change."""
        return oldest is not None and oldest < self.oldest_allowed(next_version)

    def check(self, oldest: Iterable[int | None], *, version: int) -> None:
        """Raise StalenessError if a group of a batch about to be trained at `version` is too old."""
        late = [value for value in oldest if value is not None and self.too_old(value, next_version=version)]
        if late:
            raise StalenessError(
                f"a batch for version {version} holds {len(late)} group(s) with tokens of version {min(late)}; "
                f"max_staleness={self.max_staleness} allows {self.oldest_allowed(version)} and newer"
            )
