"""The contract of a trainer backend. `tests/contract/test_backend*.py` run on every one, and on a user's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from actors.backends.optimizer import StepInfo
from actors.background_save import StateFile
from actors.objective import World
from actors.specs import OptimSpec, WeightsForm
from actors.weight_shares import Slices
from actors.weight_swap import Instead


class Backend(Protocol):
    """Owns the model, the optimizer and the learning-rate schedule of one rank of a trained or frozen role.

    Every method is collective: all ranks call it, in the same order."""

    @property
    def model(self) -> nn.Module:
        """A `LanguageModel` or a wrapper: call it for a forward pass; outside of one it may be partitioned."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def world(self) -> World: ...

    @property
    def partitioned(self) -> bool:
        """Whether `full_weights` gathers weights from all ranks, which only the thread that trains may do."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of `loss`. Gradients add up over micro-batches and *over ranks* (a sum, not a mean);
        `last` marks the final micro-batch of the step."""
        ...

    def step(self) -> StepInfo:
        """Clip, step the optimizer and the schedule, clear the gradients."""
        ...

    def reset_optimizer(self, optim: OptimSpec) -> None:
        """A new phase of a run: fresh moments and schedule on the same weights."""
        ...

    def full_weights(
        self, bucket_bytes: int, form: WeightsForm = "merged", instead: Instead | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """(name, full tensor) in a fixed order, on every rank, in that form. Collective. Never holds more than
        `bucket_bytes` (or one tensor) beyond the rank's own share. A tensor is valid until the next. With `instead`, a
        function from names of `trained_weights` to tensors, these replace the trained weights."""
        ...

    def adapter_weights(self, instead: Instead | None = None) -> dict[str, Tensor]:
        """Copies of the LoRA adapters on the host, by the names of a PEFT folder; `instead` as in `full_weights`."""
        ...

    def trained_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, full tensor) of the optimizer's weights, one at a time, in a fixed order, on every rank: for a
        half-precision parameter, its float32 master. Collective. Must not be modified."""
        ...

    def own_weights(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's share of `trained_weights`, of any shape. Not collective."""
        ...

    def mix(self, slices: Slices, share: float, bucket_bytes: int) -> None:
        """For a frozen role: each weight becomes `share` times the given one plus `1 - share` times its own. `slices`
        are this rank's (`actors/weight_shares.py`) of the `full_weights` in the form `in_memory` of a model with the
        same architecture. Raises RunError if names or shapes differ."""
        ...

    def adapters_off(self) -> AbstractContextManager[None]:
        """The base model without its LoRA adapters. Raises RuntimeError if the model has none."""
        ...

    def state(self, folder: Path) -> Sequence[StateFile]:
        """This rank's share of what exact resumption needs (weights, moments, steps), as files below `folder`. The
        tensors are the live ones, which the caller copies before the next step. Small files that do not change with
        training may be written here."""
        ...

    def load_state(self, folder: Path) -> None:
        """Continue from the files of `state` with the current optimizer settings: learning rate, schedule, betas, decay
        and clipping are those of the last `reset_optimizer`, not the saved ones. Only data is read, never code: raises
        RunError for a file that contains anything else."""
        ...

    def sleep(self) -> None:
        """Release the accelerator's memory and keep the state; no effect on a CPU."""
        ...

    def wake(self) -> None:
        """Undo `sleep`; no effect on a backend that is awake: where a role fell asleep in part, all of it is woken."""
        ...
