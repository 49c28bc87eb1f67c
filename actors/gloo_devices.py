"""One network device for all gloo groups of a process.

Each of torch's gloo groups opens a device, whose thread wakes a hundred times a second for as long as the group exists.
vLLM makes a dozen groups even for an engine of one process: two idle engines woke 5,000 times a second on two cores,
and an update in another process, whose threads wait for one another, took a fifth longer for it.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch.distributed import distributed_c10d


@contextmanager
def shared_gloo_device() -> Generator[None]:
    """Gloo groups that are made meanwhile, by whoever, have one device in common. Not if `GLOO_SOCKET_IFNAME` chooses
    their devices."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        yield
        return
    plain: Any = distributed_c10d.ProcessGroupGloo
    device = plain.create_default_device()

    class OnSharedDevice(plain):
        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            options = plain._Options()
            options._devices, options._timeout = [device], timeout
            super().__init__(store, rank, size, options)

    setattr(distributed_c10d, plain.__name__, OnSharedDevice)
    try:
        yield
    finally:
        setattr(distributed_c10d, plain.__name__, plain)
