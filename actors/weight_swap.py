"""Other values in the place of a model's own: for a moment, while weights leave, or for good, mixed into them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from actors.errors import RunError
from actors.lora import Gather, buckets, entries
from actors.objective import World
from actors.weight_shares import Slices, own_slice

Partitioned = Callable[[Tensor], bool]  # whether each rank keeps a slice of that weight only
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
def mix_in(
    causal: Any, slices: Slices, share: float, bucket_bytes: int, gather: Gather, world: World, partitioned: Partitioned
) -> None:
    """Each weight becomes `share` of the one of its name and the rest of its own, computed in float32 and rounded once.

    `slices` are this rank's (`own_slice`) of the `merged_tensors` of a model like this one, in its order. `gather`
    makes parameters whole and keeps what a rank writes into its slice. Of a weight that is not `partitioned` the ranks
    then exchange their slices. Raises RunError for other weights, with those before it mixed."""
    for bucket in buckets(entries(causal), bucket_bytes):
        with gather([parameter for entry in bucket for parameter in entry.parameters]):
            for entry in bucket:
                own, given = entry.tensor, _named(slices, entry.name, entry.tensor.shape)
                if not own.is_floating_point():
                    continue
                part = own.view(-1)[own_slice(own.numel(), world.rank, world.size)]
                part.copy_(part.float().mul_(1 - share).add_(given.to(own.device, torch.float32), alpha=share))
                if world.size > 1 and not partitioned(own):
                    own.copy_(world.gather(part).view_as(own))
    for name, _, _ in slices:
        raise RunError(f"{name} is to be mixed into a model that has no such weight")


def _named(slices: Slices, name: str, shape: torch.Size) -> Tensor:
    found, whole, values = next(slices, ("nothing", torch.Size(), torch.empty(0)))
    if (found, whole) != (name, shape):
        raise RunError(f"{found} {tuple(whole)} is to be mixed into {name} {tuple(shape)} of another model")
    return values
