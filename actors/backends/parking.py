"""Memory of an accelerator that is given back for a while, and taken again with what was in it.

    sleep ──► each storage: copied to the host, then shrunk to nothing      wake ──► grown again, copied back

In place: parameters, views of flat buffers, moments, and whoever else holds a tensor of that memory, go on holding the
same tensor. So nothing needs to be known of how a backend partitions, and it works for every one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

OWNERS = (
    "actors",
    "deepspeed",
    "peft",
    "torch.nn",
    "torch.optim",
    "transformers",
)  # packages whose objects are entered


class Parked:
    """What was in the memory that the tensors below `roots` had on one kind of device. If the host has no room for all
    of it, everything is where it was, and the error is raised."""

    def __init__(self, device: torch.device, *roots: Any) -> None:
        storages: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors_below(*roots):
            if tensor.device.type == device.type and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                storages.setdefault(storage._cdata, storage)
        self._kept: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []
        try:
            for storage in storages.values():
                host = torch.UntypedStorage(storage.nbytes())
                host.copy_(storage)
                storage.resize_(0)
                self._kept.append((storage, host))
        except BaseException:
            self.take_back()
            raise

    @property
    def nbytes(self) -> int:
        return sum(host.nbytes() for _, host in self._kept)

    def take_back(self) -> None:
        """Everything as it was, to the bit. Afterwards nothing is kept here. If the device has no room, what is not
        back is still kept, and this may be called again."""
        while self._kept:
            storage, host = self._kept[-1]
            storage.resize_(host.nbytes())
            storage.copy_(host)
            self._kept.pop()


class Sleeper:
    """Sleep and wake of what a backend holds; nothing to do on a CPU. Either may be called twice."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._parked: Parked | None = None

    def sleep(self, *roots: Any) -> None:
        if self._device.type != "cpu" and self._parked is None:
            self._parked = Parked(self._device, *roots)
            torch.cuda.empty_cache()  # or the allocator keeps it for this process

    def wake(self) -> None:
        if self._parked is not None:
            self._parked.take_back()
            self._parked = None


def tensors_below(*roots: Any) -> list[Tensor]:
    """Every tensor that is reached from `roots` by containers, attributes of tensors, and objects of `OWNERS`."""
    seen: dict[int, Any] = {}  # the objects themselves, too: a number is that of one object while it lives
    found: list[Tensor] = []
    ahead: deque[Any] = deque(roots)
    while ahead:
        item = ahead.popleft()
        if id(item) in seen or isinstance(item, type):
            continue
        seen[id(item)] = item
        if isinstance(item, Tensor):
            found.append(item)
            ahead.extend([item.grad] if item.is_leaf else [])
            ahead.extend(vars(item).values())
        elif isinstance(item, Mapping):
            ahead.extend([*item.keys(), *item.values()])
        elif isinstance(item, list | tuple | set | frozenset | deque):
            ahead.extend(item)
        elif type(item).__module__.startswith(OWNERS) and hasattr(item, "__dict__"):
            ahead.extend(vars(item).values())
    return found
