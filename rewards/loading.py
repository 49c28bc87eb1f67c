"""How a reward is found: a name in `REWARDS`, `package.module:function` or `path/to/file.py:function`.

    driver   RewardSpec("rewards.py:score", ...).located() ──► is it there, does it take these options? else ConfigError
                      │ of a file it carries the text (`rewards.user_code`), so that a worker on any node has it
    worker   spec.load() ──► Reward

The driver also runs a function's file, to inspect it. A class is built only in the workers: it may load a model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from actors.errors import ConfigError
from rewards.finding import Kind, constructed, found, located, split
from rewards.options import OFFERED, accepted, fitted, required, signature_of
from rewards.reward import Handling, Reward
from rewards.shipped import REWARDS
from rewards.user_code import UserCode

REWARD = Kind("reward", REWARDS, "rewards.shipped.REWARDS")


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
        """The name of the reward in metrics."""
        return self.name or split(self.fn, REWARD)[1]

    def located(self) -> RewardSpec:
        """The same reward, loadable in every worker. Raises ConfigError if it cannot be found or called like this."""
        fn, code = located(self.fn, REWARD)
        spec = self if code is None else replace(self, fn=fn, code=code)
        there = spec._found()
        return replace(spec, needs=required(there.signature) - set(OFFERED) - set(there.options))

    def load(self) -> Reward:
        """The function with its options bound; a class is built with them. Raises ConfigError."""
        there = self._found()
        call = there.target
        if there.is_class:
            call = constructed(there.target, there.built_with, self.fn, REWARD)
        bound = _bound(call, there.options) if there.options else call
        return Reward(self.label, self.weight, bound, accepted(there.signature), there.is_async, handling=self.handling)

    def _found(self) -> _Found:
        target, options = found(self.fn, self.code, REWARD), dict(self.options)
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
    """A reward before it is built. `options` are passed with every call, `built_with` to the constructor of a class."""

    target: Any
    signature: inspect.Signature  # of the call
    options: Mapping[str, Any]
    built_with: Mapping[str, Any]
    is_async: bool

    @property
    def is_class(self) -> bool:
        return inspect.isclass(self.target)


def _bound(target: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """Options take precedence over columns of the same name, because the user set them explicitly."""

    def call(**given: Any) -> Any:
        return target(**{**given, **options})

    return call


def _is_async(target: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(type(target).__call__)
