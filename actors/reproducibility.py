"""What the same bits need of torch: random numbers that follow from a key, operations that sum in a fixed order."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator

import numpy as np
import torch
import torch.utils.deterministic

# Torch has one random state per process: of two roles that draw in one process at once (`--local`), each would go on
# with the other's numbers.
DRAWING = threading.RLock()
# cuBLAS gives the same bits only if its work space has a fixed size.
CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextlib.contextmanager
def deterministic(wanted: bool) -> Generator[None]:
    """Inside this context the same inputs give the same bits on a GPU, too; an operation that cannot raises an error.
    Torch has one setting for the whole process."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010  (its stubs lack it; else NaN is written first)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def random_stream(*key: int) -> Generator[None]:
    """Inside this context torch's random numbers are a function of `key`; the generator's state is restored
    afterwards."""
    with DRAWING, torch.random.fork_rng():
        torch.manual_seed(
            int(np.random.SeedSequence([part % 2**63 for part in key]).generate_state(1, np.uint64)[0] >> 1)
        )
        yield
