"""How users' code is found: a name that comes with Troupe, `package.module:name` or `path/to/file.py:name`.

driver   located(fn, kind) ──► (fn, code): of a file, its text (`rewards.user_code`), for a worker on any node
worker   found(fn, code, kind) ──► the object
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from actors.errors import ConfigError, InfraFailure
from rewards import user_code
from rewards.options import hint
from rewards.user_code import UserCode


@dataclass(frozen=True)
class Kind:
    """What is looked for. `word`: what messages call it; `shipped`: those that come with Troupe, each the object or
    where it is (`package.module:name`); `table`: what to call these."""

    word: str
    shipped: Mapping[str, Any]
    table: str

    @property
    def forms(self) -> str:
        return f"write a name of {self.table}, package.module:function or path/to/file.py:function"


def split(fn: str, kind: Kind) -> tuple[str | None, str]:
    """`place:function` -> both; a name without a place is one of ours."""
    place, colon, function = fn.rpartition(":")
    if colon and not (place and function):
        raise ConfigError(f"{kind.word} {fn!r} names no {'function' if place else 'module'}; {kind.forms}")
    if not colon and (fn.endswith(".py") or "/" in fn):
        raise ConfigError(f"{kind.word} {fn!r} names a file but no function in it: write {fn}:FUNCTION")
    return (place if colon else None), function


def located(fn: str, kind: Kind) -> tuple[str, UserCode | None]:
    """The name with its file's whole path, and the text of the file. Raises ConfigError."""
    place, function = split(fn, kind)
    if place is None or not place.endswith(".py"):
        return fn, None
    path = Path(place).expanduser().resolve()
    try:
        return f"{path}:{function}", user_code.read(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{kind.word} {fn}: cannot read {path}: {error}\nrelative paths start at {Path.cwd()}"
        ) from None


def found(fn: str, code: UserCode | None, kind: Kind) -> Any:
    """The object. Raises ConfigError: what was looked for, where, and what is there."""
    place, function = split(fn, kind)
    if place is None:
        return _shipped(function, kind)
    module = _run(code, fn, kind) if code is not None else _import(place, fn, kind)
    there: Any = module
    for attribute in function.split("."):
        if not hasattr(there, attribute):
            names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
            raise ConfigError(f"{kind.word} {fn}: no {function!r} in {place}{hint(function, names)}")
        there = getattr(there, attribute)
    return there


def constructed(target: type, options: Mapping[str, Any], fn: str, kind: Kind) -> Any:
    """A class is given its options once. Raises ConfigError, or the InfraFailure that it raises: it says that the
    machinery failed, and another start may succeed."""
    try:
        return target(**options)
    except InfraFailure:
        raise
    except (Exception, SystemExit) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise ConfigError(
            f"{kind.word} {fn}: {target.__name__}({given}) failed: {type(error).__name__}: {error}"
        ) from None


def _shipped(name: str, kind: Kind) -> Any:
    if name not in kind.shipped:
        raise ConfigError(f"no {kind.word} is called {name!r}{hint(name, list(kind.shipped))}\n{kind.forms}")
    ours = kind.shipped[name]
    if not isinstance(ours, str):
        return ours
    module, _, attribute = ours.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _import(name: str, fn: str, kind: Kind) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{kind.word} {fn}: importing {name} failed: {type(error).__name__}: {error}\n"
            "the module must be importable on every node; a file can be given as path/to/file.py:function instead"
        ) from None


def _run(code: UserCode, fn: str, kind: Kind) -> ModuleType:
    try:
        return user_code.module(code)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{kind.word} {fn}: running {code.path} failed: {type(error).__name__}: {error}") from None
