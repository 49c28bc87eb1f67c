"""What makes the start of a process short: most of it is imports of torch, transformers and vLLM."""

from __future__ import annotations

import gc
import importlib
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

MODELS = "transformers.models.auto.modeling_auto"


class OnUse(ModuleType):
    """Stands for a module that is imported when something of it is first used: where most processes that import the
    code never run it."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self.__name__), name)
        setattr(self, name, value)  # from now on it is found without this
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, (self.__name__,)


if TYPE_CHECKING:
    import torch as torch
    from torch.nn import functional as F  # pyright: ignore[reportUnusedImport]
else:  # for what only declares: of losses, a command that lists methods calls none
    torch, F = OnUse("torch"), OnUse("torch.nn.functional")


def collect_less_often() -> None:
    """For a process of our own. What imports make stays, a million objects with vLLM; by default the garbage collector
    begins a round for every 700 new ones, and takes a quarter of the processor time of such an import."""
    gc.set_threshold(20_000, 20, 20)


@contextmanager
def without_model_code() -> Generator[None]:
    """Configurations import no model meanwhile, in this thread.

    transformers writes the docstring of a configuration's class when the class is imported, and for the name of its
    model it imports the code of models and torch's compiler: two to four seconds of processor time for nothing that a
    driver uses. It leaves the name out where that code cannot be imported."""
    refusal = _Refusal(threading.get_ident())
    sys.meta_path.insert(0, refusal)
    try:
        yield
    finally:
        sys.meta_path.remove(refusal)


class _Refusal(MetaPathFinder):
    def __init__(self, thread: int) -> None:
        self.thread = thread

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if fullname == MODELS and threading.get_ident() == self.thread:
            raise ModuleNotFoundError(f"{fullname} is not needed for a configuration")
