"""What makes the start of a process short: most of it is imports of torch, transformers and vLLM."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from types import ModuleType

MODELS = "transformers.models.auto.modeling_auto"


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
