"""The interface between actors and methods: a trainer executes an objective without knowing its method.

The driver passes an `Objective` to the ranks of a trained role. The rank runs the forward passes, lets the objective
turn each micro-batch into a scalar, and steps its optimizer. Normalisation uses counts that are summed over all
micro-batches and ranks first, so a result depends neither on micro-batching nor on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from actors.batch import Batch
from actors.columns import Head
from actors.imports import torch
from actors.transfers import on_device

if TYPE_CHECKING:
    from torch import Tensor

Counts = dict[str, float]
DIVERGENCE = "divergence"  # in `Outputs.extra`: what an objective's `of_logits` makes of each token's distribution
EXTRAS = ("entropy", "mean_logps", "log_sum_sq_probs", "mean_logits", "is_top1")  # of a vocabulary head, beside `logps`


@dataclass(frozen=True)
class MicroBatch:
    """Rows of a batch as tensors on the trainer's device, flat over `T` tokens; rows of `offsets` [B+1]."""

    lengths: Tensor  # [B] int64
    columns: Mapping[str, Tensor]  # per-token [T] or per-row [B]; `tokens` is int64
    host: Batch | None = None  # the same rows on the host: what is read there need not wait for the device

    @classmethod
    def of(cls, batch: Batch, device: torch.device | str = "cpu") -> MicroBatch:
        columns = {name: on_device(values, device) for name, values in batch.columns.items()}
        if "tokens" in columns:
            columns["tokens"] = columns["tokens"].long()
        return cls(on_device(batch.lengths, device), columns, batch)

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Tokens of each row, as numbers."""
        return tuple((self.lengths if self.host is None else self.host.lengths).tolist())

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    @property
    def offsets(self) -> Tensor:
        zero = torch.zeros(1, dtype=torch.int64, device=self.lengths.device)
        return torch.cat([zero, self.lengths.cumsum(0)])

    @property
    def row_of_token(self) -> Tensor:
        rows = torch.arange(len(self), device=self.lengths.device)
        return rows.repeat_interleave(self.lengths)

    def sum_by_row(self, values: Tensor) -> Tensor:
        """[T] -> [B], differentiable."""
        zeros = torch.zeros(len(self), dtype=values.dtype, device=values.device)
        return zeros.index_add(0, self.row_of_token, values)

    def per_token(self, values: Tensor) -> Tensor:
        """[B] -> [T]: each row's value at each of its tokens."""
        return values.repeat_interleave(self.lengths)


@dataclass(frozen=True)
class Outputs:
    """The results of one forward pass, in float32. `main` is the output of the model's head, with gradient in an
    update: log-probabilities [T] flat over the tokens, 0 at each row's first; a number per token [T], likewise; or one
    per row [B].

    `extra` [T] holds what the objective asked for in `needs`: `entropy` (nats), `log_sum_sq_probs`, `mean_logits`,
    `is_top1`, each without gradient unless `needs` says `entropy_grad`; and as `divergence` ([T], or [T, width]), with
    gradient, what its `of_logits` is. Of a pass that is asked for the most likely tokens, it holds those instead:
    `topk_ids` and `topk_logps` [T, k], `tail_logps` [T, 1].
    """

    main: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    aux_loss: Tensor | None = None  # scalar, weighted balancing loss of experts; the trainer adds it
    rows: int = 0  # that went through the model: fewer than tokens, where rows of the batch begin alike

    @property
    def logps(self) -> Tensor:
        """`main` of a vocabulary head."""
        return self.main

    def detached(self) -> Outputs:
        """The same values without gradient."""
        return Outputs(self.main.detach(), {name: values.detach() for name, values in self.extra.items()})


@dataclass(frozen=True)
class OfLogits:
    """What an objective makes of the whole distribution that a token is predicted by, one chunk of tokens at a time:
    `call(logits [n, V], *given, **options) -> [n]`, or [n, width] where it makes several numbers of each. `given` is,
    with `companion`, that model's logits [n, V] of the same tokens; then the entries of `columns`. Must pickle."""

    call: Callable[..., Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    companion: bool = False
    width: int = 1

    def at(self, temperature: float) -> Callable[..., Tensor]:
        """The call with its options, of which a `temperature` of None is the one of the pass."""
        follows = "temperature" in self.options and self.options["temperature"] is None
        return partial(self.call, **{**self.options, **({"temperature": temperature} if follows else {})})


@dataclass(frozen=True)
class Stat:
    """A metric of one micro-batch, which is combined over micro-batches and ranks."""

    total: float | Tensor
    weight: float | Tensor = 1.0
    combine: str = "mean"  # mean: sum(total)/sum(weight); sum; min; max


class World(Protocol):
    """Statistics over all ranks of a trained role. Collective: every rank must call, in the same order."""

    rank: int
    size: int

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over ranks."""
        ...

    def gather(self, values: Tensor) -> Tensor:
        """[n_r] on each rank -> [sum n_r] in rank order, on every rank. Sizes may differ."""
        ...


class Objective(Protocol):
    """A loss with its reduction, ready to run on any rank. Must pickle."""

    head: Head  # of the models that it is for
    needs: frozenset[str]  # names of `Outputs.extra` that the forward pass must compute
    of_logits: OfLogits | None  # what it makes of whole distributions
    columns: frozenset[str]  # batch columns that it reads, besides tokens and lengths
    keep_groups: bool  # rows of one `group` must share a micro-batch
    coupled: bool  # it needs `statistics` over the whole batch before any gradient
    statistics_rows: (
        str | None
    )  # a boolean column of rows that only `statistics` sees, all others being for the loss alone

    def counts(self, micro: MicroBatch) -> Counts:
        """Local counts to be summed over micro-batches and ranks: the denominators of the reduction."""
        ...

    def statistics(
        self, micros: list[MicroBatch], outputs: list[Outputs], world: World, state: dict[str, Any]
    ) -> dict[str, Any]:
        """Only if `coupled`: values that couple rows across micro-batches and ranks. It is given every row, or the rows
        that `statistics_rows` marks; `outputs` are what the loss would see of them, without gradient.

        `state` belongs to this objective's update stage, is kept by the trainer between steps and is checkpointed."""
        ...

    def loss(
        self, micro: MicroBatch, outputs: Outputs, counts: Counts, statistics: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Stat]]:
        """The scalar whose *sum* over all micro-batches and ranks is the batch's loss, and metrics."""
        ...
