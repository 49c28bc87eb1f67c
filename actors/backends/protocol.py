"""The contract of a trainer backend. `tests/contract/test_backends.py` runs on every one, and on a user's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from actors.backends.optimizer import StepInfo
from actors.objective import World
from actors.specs import OptimSpec, WeightsForm
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

    def full_weights(self, bucket_bytes: int, form: WeightsForm = "merged") -> Iterator[tuple[str, Tensor]]:
        """(name, full tensor) in a fixed order, on every rank, in that form. Collective. Never holds more than
        `bucket_bytes` (or one tensor) beyond the rank's own share. A tensor is valid until the next."""
        ...

    def trained_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, full tensor) of the optimizer's weights, one at a time, in a fixed order, on every rank: for a
        half-precision parameter, its float32 master. Collective. Must not be modified."""
        ...

    def mix(self, weights: Iterator[tuple[str, Tensor]], share: float, bucket_bytes: int) -> None:
        """For a frozen role: each weight becomes `share` times the given one plus `1 - share` times its own. `weights`
        are `full_weights` in the form `in_memory` of a model with the same architecture, whole on every rank. Raises
        RunError if names or shapes differ."""
        ...

    def adapters_off(self) -> AbstractContextManager[None]:
        """The base model without its LoRA adapters. Raises RuntimeError if the model has none."""
        ...

    def save_state(self, folder: Path) -> None:
        """The training state that exact resumption needs: weights, moments, steps. Each rank writes its share."""
        ...

    def load_state(self, folder: Path) -> None:
        """Continue from a saved state with the current optimizer settings: learning rate, schedule, betas, decay and
        clipping are those of the last `reset_optimizer`, not the saved ones. Only data is read, never code: raises
        RunError for a file that contains anything else."""
        ...

    def save_model(self, folder: Path, instead: Instead | None = None) -> None:
        """A Hugging Face folder (weights and config; adapters merged), written by rank 0. With `instead`, a function
        from names of `trained_weights` to tensors, these replace the trained weights."""
        ...

    def save_adapter(self, folder: Path, instead: Instead | None = None) -> None:
        """The LoRA adapters alone as a PEFT folder, written by rank 0; `instead` as in `save_model`."""
        ...

    def sleep(self) -> None:
        """Release the accelerator's memory and keep the state; no effect on a CPU."""
        ...

    def wake(self) -> None: ...
