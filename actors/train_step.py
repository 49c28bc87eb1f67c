"""Passes of a rank's share of a batch through its model, under an objective that knows what they are for.

    learn     [outputs without gradient -> statistics]    if rows are coupled: of all rows, or of those that are there
                                                          for it alone
              per micro-batch: forward, loss, backward
    measure   the same, without gradient, dropout and noise

Collective: all ranks run the same number of micro-batches, some of which may be empty.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.backends.protocol import Backend
from actors.batch import Batch
from actors.columns import COLUMNS, Head
from actors.distributions import TOP_K, TopK
from actors.errors import RunError
from actors.forward import forward
from actors.metrics import combine, sum_counts
from actors.model import LanguageModel
from actors.objective import Counts, MicroBatch, Objective, Outputs, Stat
from actors.padded_passes import padded_passes
from actors.sharding import MicroBatches, Shard

Stats = dict[str, Stat]
Drawing = Callable[
    [], AbstractContextManager[None]
]  # a context in which random numbers start from the beginning of the update's stream


class Clock:
    """Seconds by part of an update. What a GPU does is not done when a call returns: there a part lasts from when the
    GPU begins its work to when it ends it. The process does not wait for that before `seconds` are asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = {"forward": 0.0, "backward": 0.0, "step": 0.0}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def measure(self, part: str) -> Generator[None]:
        if self._device.type == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            yield
            after.record()
            self._events.append((part, before, after))
        else:
            start = time.perf_counter()
            yield
            self._add(part, time.perf_counter() - start)

    @property
    def seconds(self) -> dict[str, float]:
        if self._events:
            torch.cuda.synchronize(self._device)
        for part, before, after in self._events:
            self._add(part, before.elapsed_time(after) / 1000)
        self._events.clear()
        return dict(self._seconds)

    def _add(self, part: str, seconds: float) -> None:
        self._seconds[part] = self._seconds.get(part, 0.0) + seconds


class Pass:
    """One batch under one objective. `counts` and `tokens` are summed over micro-batches and ranks; `state` is the
    objective's state between batches; `companion` a frozen model with which it compares."""

    def __init__(
        self,
        backend: Backend,
        shard: Shard,
        objective: Objective,
        temperature: float,
        state: dict[str, Any],
        companion: LanguageModel | None = None,
    ) -> None:
        self._backend, self._objective, self._temperature, self._state = backend, objective, temperature, state
        self._companion = companion
        self._micros = micro_batches(shard.batch, shard.micro_batches, backend)
        self._statistics_rows = micro_batches(shard.batch, shard.statistics_rows, backend)
        sizes = [*map(_sizes, self._micros), *(_sizes(micro) | {"learned": 0.0} for micro in self._statistics_rows)]
        self.counts = self._summed([objective.counts(micro) for micro in self._micros])
        self.tokens = self._summed(sizes)
        if not self.tokens.get("learned"):
            raise RunError("an empty batch: there is nothing to compute a loss from")
        self._statistics: dict[str, Any] = {}
        self.clock = Clock(backend.device)
        self._stats: list[Stats] = []

    def learn(self, drawing: Drawing) -> None:
        """Adds the gradient of the batch's loss to the model's. To be called inside `drawing()`."""
        ready: list[Outputs] = []  # outputs with gradient that the statistics needed
        if self._objective.coupled and self._objective.statistics_rows is None and len(self._micros) == 1:
            ready = [self._forward(self._micros[0])]  # one pass serves both statistics and loss
            self._couple(self._micros, ready)
        elif self._objective.coupled:
            seen = self._micros if self._objective.statistics_rows is None else self._statistics_rows
            with torch.no_grad(), drawing():  # the same dropout and noise as in the pass with gradient
                self._couple(seen, [self._forward(micro, "statistics") for micro in seen])
        for micro in self._micros:  # one graph exists at a time
            outputs = ready.pop() if ready else self._forward(micro)
            with self.clock.measure("forward"):
                loss, stats = self._loss(micro, outputs)
            with self.clock.measure("backward"):
                self._backend.backward(loss, last=micro is self._micros[-1])
            self._stats.append(_measured(micro, outputs, loss, stats))

    def metrics(self) -> dict[str, float]:
        """Of what was learned. Reading their values waits for a GPU: ask after the optimizer's step, or the GPU is idle
        until that is launched."""
        return self._combined(self._stats)

    def measure(self) -> dict[str, float]:
        """The metrics that there would be after `learn`, including the loss."""
        outputs = self._without_noise(self._micros)
        if self._objective.coupled and self._objective.statistics_rows is None:
            self._couple(self._micros, outputs)
        elif self._objective.coupled:
            self._couple(self._statistics_rows, self._without_noise(self._statistics_rows))
        pairs = zip(self._micros, outputs, strict=True)
        return self._combined([_measured(micro, found, *self._loss(micro, found)) for micro, found in pairs])

    def _forward(self, micro: MicroBatch, part: str = "forward") -> Outputs:
        with self.clock.measure(part):
            return forward(
                self._backend.model,
                filled(micro),
                head=self._objective.head,
                temperature=self._temperature,
                needs=self._objective.needs,
                of_logits=self._objective.of_logits,
                companion=self._companion,
            )

    def _without_noise(self, micros: list[MicroBatch]) -> list[Outputs]:
        asked = {"of_logits": self._objective.of_logits, "companion": self._companion}
        found = self._objective.needs, self._objective.head
        with _in_evaluation(self._backend):
            return list(_outputs(self._backend, micros, self._temperature, *found, **asked))

    def _couple(self, micros: list[MicroBatch], outputs: list[Outputs]) -> None:
        full = [(micro, found.detached()) for micro, found in zip(micros, outputs, strict=True) if len(micro)]
        seen, found = [micro for micro, _ in full], [outputs for _, outputs in full]
        self._statistics = self._objective.statistics(seen, found, self._backend.world, self._state)

    def _loss(self, micro: MicroBatch, outputs: Outputs) -> tuple[Tensor, Stats]:
        """The objective's loss, plus the experts' balancing loss weighted by this micro-batch's share of tokens."""
        if not len(micro):
            return outputs.main.sum() * 0, {}
        loss, stats = self._objective.loss(micro, outputs, self.counts, self._statistics)
        if outputs.aux_loss is None:
            return loss, stats
        size = _sizes(micro)["real"]
        balancing = Stat(outputs.aux_loss.detach() * size, size)
        return loss + outputs.aux_loss * (size / self.tokens["learned"]), {**stats, "aux_loss": balancing}

    def _summed(self, counts: list[Counts]) -> Counts:
        return sum_counts(counts, self._backend.world, self._backend.device)

    def _combined(self, stats: list[Stats]) -> dict[str, float]:
        return combine(stats, self._backend.world, self._backend.device)


def infer(
    backend: Backend,
    shard: Shard,
    into: tuple[str, ...],
    head: Head,
    temperature: float,
    top_k: TopK | None = None,
) -> Batch:
    """The columns `into` of the shard's rows: the one that takes what the head says; or those that take the most likely
    tokens of each distribution, their log-probabilities and that of all others, and, if there is a fourth, that of the
    row's own token."""
    batch = shard.batch
    per_row = head is Head.ROW_SCALAR
    names = dict(zip(into, ("main",) if top_k is None else TOP_K[: len(into)], strict=True))
    size = len(batch) if per_row else batch.num_tokens
    widths = {"topk_ids": top_k.k, "topk_logps": top_k.k, "tail_logps": 1} if top_k is not None else {}
    shapes = {name: (size, *([widths[found]] if found in widths else [])) for name, found in names.items()}
    columns = {name: np.zeros(shape, COLUMNS[name].dtype) for name, shape in shapes.items()}
    micros = micro_batches(batch, shard.micro_batches, backend)
    with _in_evaluation(backend):
        passes = _outputs(backend, micros, temperature, head=head, top_k=top_k)
        for rows, outputs in zip(shard.micro_batches, passes, strict=True):
            if rows:
                chosen = np.asarray(rows, np.int64)
                at = chosen if per_row else batch.token_index(chosen)
                for name, found in names.items():
                    columns[name][at] = (outputs.main if found == "main" else outputs.extra[found]).cpu().numpy()
        if shard.padded:
            for row, said in padded_passes(backend, batch, shard.padded, head):
                _put_into(columns[into[0]], batch, row, said)
    return Batch.build(batch.lengths, **columns)


def _put_into(column: np.ndarray, batch: Batch, row: int, said: np.ndarray) -> None:
    """What the head says of a row, or of each token of it that is learned from but the first."""
    if said.ndim == 0:
        column[row] = said
        return
    wanted = batch.row("mask", row).astype(np.bool_)
    wanted[0] = False
    column[batch.offsets[row] : batch.offsets[row + 1]] = np.where(wanted, said, 0.0)


def micro_batches(batch: Batch, members: MicroBatches, backend: Backend) -> list[MicroBatch]:
    """The micro-batches of a shard on the backend's device."""
    return [MicroBatch.of(batch.select(rows), backend.device) for rows in members]


def _outputs(
    backend: Backend,
    micros: list[MicroBatch],
    temperature: float,
    needs: frozenset[str] = frozenset(),
    head: Head = Head.VOCABULARY,
    **asked: Any,
) -> Iterator[Outputs]:
    """Outputs per micro-batch. `asked` are further arguments of `forward`. To be called in `_in_evaluation`, and not to
    enter it: a generator that nobody exhausts leaves a context when it is collected, in whatever thread that is, and
    whether there are gradients is said for each thread."""
    for micro in micros:
        yield forward(backend.model, filled(micro), head=head, temperature=temperature, needs=needs, **asked)


@contextlib.contextmanager
def _in_evaluation(backend: Backend) -> Generator[None]:
    """Without gradient and dropout."""
    training = backend.model.training
    backend.model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        backend.model.train(training)


def filled(micro: MicroBatch) -> MicroBatch:
    """The micro-batch, or a one-token dummy if it is empty, so that an empty rank joins the collectives."""
    return micro if len(micro) else MicroBatch.of(Batch.build([1], tokens=[0]), micro.lengths.device)


def _measured(micro: MicroBatch, outputs: Outputs, loss: Tensor, stats: Stats) -> Stats:
    """A micro-batch's metrics, its part of the loss, and the share of its tokens that a shared prefix saved."""
    size = sum(micro.row_lengths)
    shared = Stat(size - outputs.rows, size) if size else Stat(0.0, 0.0)
    return {**stats, "loss": Stat(loss.detach(), combine="sum"), "shared_share": shared}


def _sizes(micro: MicroBatch) -> Counts:
    """Tokens of a micro-batch: all, those that count as trained on, and those that the model computes."""
    real = float(sum(micro.row_lengths))
    return {"real": real, "learned": real, "computed": max(real, 1.0)}
