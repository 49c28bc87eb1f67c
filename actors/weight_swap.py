"""Other values in the place of a model's own: for a moment, while weights leave, or for good, mixed into them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from actors.errors import RunError
from actors.lora import Gather, buckets, entries

Instead = Callable[[str], Tensor]  # a trained weight's name -> its values, flat


def replaced(gather: Gather, causal: nn.Module, instead: Instead | None) -> Gather:
    """`gather`, with trained weights replaced by the values of `instead` inside its context; unchanged for None. All
    ranks call `instead` in the same order. Afterwards the weights have their own values again, bit for bit."""
    if instead is None:
        return gather
    names = {id(weight): name for name, weight in causal.named_parameters() if weight.requires_grad}

    @contextmanager
    def gathered(parameters: list[nn.Parameter]) -> Generator[None]:
        trained = list({id(weight): weight for weight in parameters if id(weight) in names}.values())
        with gather(parameters):
            own = [weight.data for weight in trained]
            try:
                for weight in trained:
                    values = instead(names[id(weight)])
                    weight.data = values.to(weight.device, weight.dtype).view(weight.shape)
                yield
            finally:
                for weight, data in zip(trained, own, strict=True):
                    weight.data = data

    return gathered


@torch.no_grad()
def mix_in(causal: Any, weights: Iterator[tuple[str, Tensor]], share: float, bucket_bytes: int, gather: Gather) -> None:
    """Each weight becomes `share` of the one of its name and the rest of its own, computed in float32 and rounded once.

    `weights` are those of `merged_tensors` of a model like this one, in its order. `gather` makes parameters whole and
    keeps what is written into them. Raises RunError for other weights, with those before it mixed."""
    for bucket in buckets(entries(causal), bucket_bytes):
        with gather([parameter for entry in bucket for parameter in entry.parameters]):
            for entry in bucket:
                own, given = entry.tensor, _named(weights, entry.name, entry.tensor.shape)
                if own.is_floating_point():
                    own.copy_(own.float().mul_(1 - share).add_(given.to(own.device, torch.float32), alpha=share))
    for name, _ in weights:
        raise RunError(f"{name} is to be mixed into a model that has no such weight")


def _named(weights: Iterator[tuple[str, Tensor]], name: str, shape: torch.Size) -> Tensor:
    found, tensor = next(weights, ("nothing", torch.empty(0)))
    if (found, tensor.shape) != (name, shape):
        raise RunError(f"{found} {tuple(tensor.shape)} is to be mixed into {name} {tuple(shape)} of another model")
    return tensor
