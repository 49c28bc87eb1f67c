"""How a reward is found: a name in `REWARDS`, `package.module:function` or `path/to/file.py:function`.

    driver   RewardSpec("rewards.py:score", ...).located() ──► is it there, does it take these options? else ConfigError
                      │ of a file it carries the text, so that a worker on any node, in any directory, has it
    worker   spec.load() ──► Reward

A file runs under a private module name and its folder never enters `sys.path`: it may be called anything, `rewards.py`
included.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import linecache
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from actors.errors import ConfigError
from rewards.functions import REWARDS

# What every reward may ask for; other parameters are columns of the data set or options.
OFFERED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


@dataclass(frozen=True)
class Reward:
    """A function ready to be called. `parameters`: the names it takes, None if it takes any; `needs`: columns that the
    data set must have for it."""

    name: str
    weight: float
    call: Callable[..., Any]
    parameters: frozenset[str] | None
    needs: frozenset[str]
    is_async: bool

    def wants(self, name: str) -> bool:
        return self.parameters is None or name in self.parameters


@dataclass(frozen=True)
class RewardSpec:
    """Which function, with which weight and options. `source`: the text of its file, once `located`. Picklable."""

    fn: str
    weight: float = 1.0
    name: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    source: str | None = None

    def located(self) -> RewardSpec:
        """The same reward, loadable in every worker. Raises ConfigError if it cannot be found or called like this."""
        place, function = _split(self.fn)
        located = self
        if place is not None and place.endswith(".py"):
            path = Path(place).expanduser().resolve()
            located = replace(self, fn=f"{path}:{function}", source=_read(path, self.fn))
        located.load()
        return located

    def load(self) -> Reward:
        """The function with its options bound. Raises ConfigError."""
        target, options = _find(self.fn, self.source), dict(self.options)
        if inspect.isclass(target):
            target, options = _construct(target, options, self.fn), {}
        if not callable(target):
            raise ConfigError(f"reward {self.fn} is not callable, but a {type(target).__name__}; name a function in it")
        signature = _signature(target, self.fn)
        _check_options(options, signature, self.fn)
        needs = _required(signature) - set(OFFERED) - set(options)
        name = self.name or _split(self.fn)[1]
        call = _bound(target, options)
        return Reward(name, self.weight, call, _accepted(signature), needs, _is_async(target))


class Settings(Protocol):
    """What a configuration says about one reward."""

    @property
    def fn(self) -> str: ...

    @property
    def weight(self) -> float: ...

    @property
    def name(self) -> str | None: ...

    @property
    def options(self) -> Mapping[str, Any]: ...


def check_reward(settings: Settings) -> RewardSpec:
    """The reward that a configuration names, found and ready to travel. Raises ConfigError: call it before a launch."""
    return RewardSpec(settings.fn, settings.weight, settings.name, dict(settings.options)).located()


def load_reward(fn: str, options: Mapping[str, Any] | None = None) -> Reward:
    """Find a reward and bind its options. Raises ConfigError: what was looked for, where, and what is there."""
    return RewardSpec(fn, options=options or {}).located().load()


def check_columns(rewards: Iterable[RewardSpec], columns: Collection[str], where: str) -> None:
    """Raises ConfigError if a reward needs a column that the data does not have. `where`: what to call that data."""
    for spec in rewards:
        missing = sorted(spec.load().needs - set(columns))
        if missing:
            raise ConfigError(
                f"reward {spec.fn} needs the column {missing[0]!r}, which {where} does not have; it has "
                f"{', '.join(sorted(columns)) or 'none'}\n"
                f"rename one with data.columns.{missing[0]}=NAME, or give the reward an option of that name"
            )


def _split(fn: str) -> tuple[str | None, str]:
    """`place:function` -> both; a name without a place is one of ours."""
    place, colon, function = fn.rpartition(":")
    if colon and not (place and function):
        raise ConfigError(f"reward {fn!r} names no {'function' if place else 'module'}; {_FORMS}")
    if not colon and (fn.endswith(".py") or "/" in fn):
        raise ConfigError(f"reward {fn!r} names a file but no function in it: write {fn}:FUNCTION")
    return (place if colon else None), function


_FORMS = "write a name of rewards.functions.REWARDS, package.module:function or path/to/file.py:function"


def _find(fn: str, source: str | None) -> Any:
    place, function = _split(fn)
    if place is None:
        return _shipped(function)
    module = _run(Path(place), source, fn) if source is not None else _import(place, fn)
    found: Any = module
    for attribute in function.split("."):
        if not hasattr(found, attribute):
            there = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
            raise ConfigError(f"reward {fn}: no {function!r} in {place}{_nearest(function, there)}")
        found = getattr(found, attribute)
    return found


def _shipped(name: str) -> Callable[..., Any]:
    if name not in REWARDS:
        raise ConfigError(f"no reward is called {name!r}{_nearest(name, list(REWARDS))}\n{_FORMS}")
    return REWARDS[name]


def _nearest(given: str, there: list[str]) -> str:
    meant = difflib.get_close_matches(given, there, n=1)
    return f"; did you mean {meant[0]}?" if meant else f". There are: {', '.join(sorted(there)) or 'none'}"


def _import(name: str, fn: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ConfigError(
            f"reward {fn}: importing {name} failed: {type(error).__name__}: {error}\n"
            "the module must be importable on every node; a file can be given as path/to/file.py:function instead"
        ) from None


def _read(path: Path, fn: str) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"reward {fn}: cannot read {path}: {error}\nrelative paths start at {Path.cwd()}") from None


def _run(path: Path, source: str, fn: str) -> ModuleType:
    """The module that a file's text makes. Loaded once per process and text."""
    digest = blake2b(f"{path}\n{source}".encode(), digest_size=8).hexdigest()
    name = f"_troupe_user_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(path)
    linecache.cache[str(path)] = (len(source), None, source.splitlines(keepends=True), str(path))  # lines in tracebacks
    sys.modules[name] = module  # before it runs: dataclasses and pickle look their module up by name
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"reward {fn}: running {path} failed: {type(error).__name__}: {error}") from None
    return module


def _construct(target: type, options: Mapping[str, Any], fn: str) -> Any:
    """A class is given its options once; its instances are the reward."""
    try:
        return target(**options)
    except Exception as error:
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise ConfigError(f"reward {fn}: {target.__name__}({given}) failed: {type(error).__name__}: {error}") from None


def _signature(target: Callable[..., Any], fn: str) -> inspect.Signature:
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        raise ConfigError(f"reward {fn}: its signature cannot be read; wrap it in a Python function") from None
    if any(p.kind is p.POSITIONAL_ONLY for p in signature.parameters.values()):
        raise ConfigError(f"reward {fn} takes positional-only parameters; everything is passed by name")
    return signature


def _accepted(signature: inspect.Signature) -> frozenset[str] | None:
    """The names that may be passed; None for any."""
    parameters = signature.parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind is not p.VAR_POSITIONAL)


def _required(signature: inspect.Signature) -> frozenset[str]:
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = signature.parameters.values()
    return frozenset(p.name for p in parameters if p.default is p.empty and p.kind not in variadic)


def _check_options(options: Mapping[str, Any], signature: inspect.Signature, fn: str) -> None:
    clash = sorted(set(options) & set(OFFERED))
    if clash:
        raise ConfigError(f"reward {fn}: {clash[0]!r} is passed with every call and cannot be an option")
    accepted = _accepted(signature)
    unknown = sorted(set(options) - accepted) if accepted is not None else []
    if unknown:
        there = sorted(set(signature.parameters) - set(OFFERED))
        raise ConfigError(f"reward {fn} has no option {unknown[0]!r}{_nearest(unknown[0], there)}")


def _bound(target: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """Options win over columns of the same name: they were written on purpose."""

    def call(**given: Any) -> Any:
        return target(**{**given, **options})

    return call


def _is_async(target: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(type(target).__call__)
