"""How a reward is found: a name in `REWARDS`, `package.module:function` or `path/to/file.py:function`.

    driver   RewardSpec("rewards.py:score", ...).located() ──► is it there, does it take these options? else ConfigError
                      │ of a file it carries the text (`rewards.user_code`), so that a worker on any node has it
    worker   spec.load() ──► Reward

A function's file is run in the driver, too, to look at it; a class is built in the workers only: it may load a model.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from actors.errors import ConfigError, InfraFailure
from rewards import user_code
from rewards.functions import REWARDS
from rewards.options import OFFERED, accepted, fitted, hint, required, signature_of
from rewards.reward import Handling, Reward
from rewards.user_code import UserCode


@dataclass(frozen=True)
class RewardSpec:
    """Which function, with which weight and options. Once `located`, `code` is the text of its file and `needs` the
    columns that the data set must have for it. Picklable."""

    fn: str
    weight: float = 1.0
    name: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    handling: Handling = field(default_factory=Handling)
    code: UserCode | None = None
    needs: frozenset[str] | None = None

    @property
    def label(self) -> str:
        """What it is called in metrics."""
        return self.name or _split(self.fn)[1]

    def located(self) -> RewardSpec:
        """The same reward, loadable in every worker. Raises ConfigError if it cannot be found or called like this."""
        place, function = _split(self.fn)
        spec = self
        if place is not None and place.endswith(".py"):
            path = Path(place).expanduser().resolve()
            spec = replace(self, fn=f"{path}:{function}", code=_read(path, self.fn))
        found = spec._found()
        return replace(spec, needs=required(found.signature) - set(OFFERED) - set(found.options))

    def load(self) -> Reward:
        """The function with its options bound; a class is built with them. Raises ConfigError."""
        found = self._found()
        call = found.target
        if found.is_class:
            call = _construct(found.target, found.built_with, self.fn)
        bound = _bound(call, found.options) if found.options else call
        return Reward(self.label, self.weight, bound, accepted(found.signature), found.is_async, handling=self.handling)

    def _found(self) -> _Found:
        target, options = _find(self.fn, self.code), dict(self.options)
        if not inspect.isclass(target):
            if not callable(target):
                raise ConfigError(
                    f"reward {self.fn} is not callable, but a {type(target).__name__}; name a function in it"
                )
            signature = signature_of(target, self.fn)
            return _Found(target, signature, fitted(options, target, signature, self.fn), {}, _is_async(target))
        made = signature_of(target, self.fn)
        options = fitted(options, target, made, self.fn)
        missing = sorted(required(made) - set(options))
        if missing:
            raise ConfigError(f"reward {self.fn}: {target.__name__} needs the option {missing[0]!r}")
        if not any("__call__" in vars(base) for base in target.__mro__):
            raise ConfigError(f"reward {self.fn}: instances of {target.__name__} cannot be called; give it `__call__`")
        parameters = list(signature_of(target.__call__, self.fn).parameters.values())
        called = inspect.Signature(parameters[1:])  # without `self`
        return _Found(target, called, {}, options, inspect.iscoroutinefunction(target.__call__))


@dataclass(frozen=True)
class _Found:
    """What is known of a reward before it is built. `options` are passed with every call, `built_with` to a class."""

    target: Any
    signature: inspect.Signature  # of the call
    options: Mapping[str, Any]
    built_with: Mapping[str, Any]
    is_async: bool

    @property
    def is_class(self) -> bool:
        return inspect.isclass(self.target)


def load_reward(fn: str, options: Mapping[str, Any] | None = None) -> Reward:
    """Find a reward and bind its options. Raises ConfigError: what was looked for, where, and what is there."""
    return RewardSpec(fn, options=options or {}).located().load()


def _split(fn: str) -> tuple[str | None, str]:
    """`place:function` -> both; a name without a place is one of ours."""
    place, colon, function = fn.rpartition(":")
    if colon and not (place and function):
        raise ConfigError(f"reward {fn!r} names no {'function' if place else 'module'}; {_FORMS}")
    if not colon and (fn.endswith(".py") or "/" in fn):
        raise ConfigError(f"reward {fn!r} names a file but no function in it: write {fn}:FUNCTION")
    return (place if colon else None), function


_FORMS = "write a name of rewards.functions.REWARDS, package.module:function or path/to/file.py:function"


def _find(fn: str, code: UserCode | None) -> Any:
    place, function = _split(fn)
    if place is None:
        return _shipped(function)
    module = _run(code, fn) if code is not None else _import(place, fn)
    found: Any = module
    for attribute in function.split("."):
        if not hasattr(found, attribute):
            there = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
            raise ConfigError(f"reward {fn}: no {function!r} in {place}{hint(function, there)}")
        found = getattr(found, attribute)
    return found


def _shipped(name: str) -> Callable[..., Any]:
    if name not in REWARDS:
        raise ConfigError(f"no reward is called {name!r}{hint(name, list(REWARDS))}\n{_FORMS}")
    return REWARDS[name]


def _import(name: str, fn: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"reward {fn}: importing {name} failed: {type(error).__name__}: {error}\n"
            "the module must be importable on every node; a file can be given as path/to/file.py:function instead"
        ) from None


def _read(path: Path, fn: str) -> UserCode:
    try:
        return user_code.read(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"reward {fn}: cannot read {path}: {error}\nrelative paths start at {Path.cwd()}") from None


def _run(code: UserCode, fn: str) -> ModuleType:
    try:
        return user_code.module(code)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"reward {fn}: running {code.path} failed: {type(error).__name__}: {error}") from None


def _construct(target: type, options: Mapping[str, Any], fn: str) -> Any:
    """A class is given its options once; its instances are the reward."""
    try:
        return target(**options)
    except InfraFailure:  # it says that the machinery failed: another start may succeed
        raise
    except (Exception, SystemExit) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise ConfigError(f"reward {fn}: {target.__name__}({given}) failed: {type(error).__name__}: {error}") from None


def _bound(target: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """Options win over columns of the same name: they were written on purpose."""

    def call(**given: Any) -> Any:
        return target(**{**given, **options})

    return call


def _is_async(target: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(type(target).__call__)
