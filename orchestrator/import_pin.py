"""`actors`, `rollout`, `rewards` and `orchestrator` are ours, in the driver and in every worker.

The names are ordinary words. A user's folder may well hold a `rewards.py`, and Python prefers what lies in the working
directory or on PYTHONPATH: the driver would import ours while Ray's workers silently import the user's. So the four
names are resolved before `sys.path` is searched, from the folder that this file came from and nowhere else.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from actors.errors import UserError

if TYPE_CHECKING:
    from rewards.user_code import UserCode

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("actors", "rollout", "rewards", "orchestrator")


class Pinned:
    """A finder that answers for our four packages from `root`, before any other finder is asked."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(self.root)]) if name in PACKAGES else None


def pin() -> None:
    """From here on the four names mean our packages in this process. Calling it twice is fine.

    Raises UserError if one of them was imported from somewhere else already: what was built on it cannot be undone."""
    for name in PACKAGES:
        _refuse_foreign(name)
    if not any(isinstance(finder, Pinned) for finder in sys.meta_path):
        sys.meta_path.insert(0, Pinned(ROOT))


def worker_setup(carried: Sequence[UserCode] = (), *, log_warnings: bool = False) -> Callable[[], None]:
    """What Ray calls first in every worker (`worker_process_setup_hook`): `pin`, found without asking `sys.path`, and
    what makes its imports short. What is `carried` can be imported there under its private names: pickled functions of
    a user's file are found by them. `log_warnings`: Python's warnings are log records there, in the form of those.

    A nested function, because Ray then ships its code; a function of a module would be shipped as its name, and looking
    up `orchestrator` by name in the worker is the very thing that may find the user's folder."""
    root = str(ROOT)
    texts = [[astuple(file) for file in code.files] for code in carried]  # our classes cannot be unpickled before `pin`

    def pin_this_worker() -> None:
        sys.path.insert(0, root)
        try:
            importlib.import_module("orchestrator.import_pin").pin()
            importlib.import_module("actors.imports").collect_less_often()  # before the actor's class is imported
            if log_warnings:
                importlib.import_module("logging").captureWarnings(True)
            if texts:
                importlib.import_module("rewards.user_code").carry(texts)
        finally:
            sys.path.remove(root)

    return pin_this_worker


def _refuse_foreign(name: str) -> None:
    module = sys.modules.get(name)
    if module is None:
        return
    places = [Path(place).resolve() for place in getattr(module, "__path__", [])] or [Path(module.__file__ or "?")]
    if places[0] != ROOT / name:
        raise UserError(
            f"the module `{name}` was imported from {places[0]}, but Troupe's own is {ROOT / name}.\n"
            f"Keep the folder of a module with that name off sys.path: give Troupe your code as path/to/file.py:name"
        )
