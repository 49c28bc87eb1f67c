"""The simplest objective, for tests of trainers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from actors.columns import Head
from actors.objective import Counts, MicroBatch, Outputs, Stat, World


class MaskedNll:
    """Mean negative log-likelihood of the masked tokens."""

    needs: frozenset[str] = frozenset()
    columns: frozenset[str] = frozenset({"mask"})
    head = Head.VOCABULARY
    keep_groups = False
    coupled = False
    statistics_rows = None
    of_logits = None

    def counts(self, micro: MicroBatch) -> Counts:
        return {"tokens": float(micro["mask"].sum())}

    def statistics(
        self, micros: list[MicroBatch], outputs: list[Outputs], world: World, state: dict[str, Any]
    ) -> dict[str, Any]:
        return {}

    def loss(
        self, micro: MicroBatch, outputs: Outputs, counts: Counts, statistics: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Stat]]:
        loss = -(outputs.logps * micro["mask"]).sum() / counts["tokens"]
        return loss, {"loss": Stat(loss.detach(), combine="sum")}
