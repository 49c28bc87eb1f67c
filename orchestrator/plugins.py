"""A user's own method, loss or engine, named as `path/to/file.py:name`; nothing of Troupe is changed for it.

    driver    load("my.py:my_method", ...) ──► run under a private name (`rewards.user_code`) ──► the object
                     │ its functions are pickled by that name
    workers   import_pin.worker_setup(carried()) ──► the same text under the same name, in every process of the run

A reward is loaded by `rewards.loading`, in the workers of its role only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from actors.errors import ConfigError
from orchestrator.config.error_messages import unknown
from rewards import user_code
from rewards.user_code import UserCode

FILE = r"\.py:\w+$"
Plugin = Annotated[str, Field(pattern=FILE)]  # beside the names of an option of ours

_carried: dict[str, UserCode] = {}  # by the private name of the module: what workers must have


def is_plugin(name: str) -> bool:
    """Whether a name is of a user's file: `path/to/file.py:name`, or such without a name, which is refused."""
    return name.partition(":")[0].endswith(".py")


def load(name: str, what: str) -> Any:
    """What a user's file calls so. `what`: what it is to be, for refusals: `method`, `roles.rollout.engine`. Raises
    ConfigError that names the file."""
    code, attribute = _loaded(name, what)
    return getattr(user_code.module(code), attribute)


def importable(name: str, what: str) -> str:
    """A name that a worker can import: `module:name` for one of a user's file, any other as it is."""
    if not is_plugin(name):
        return name
    code, attribute = _loaded(name, what)
    return f"{code.package}:{attribute}"


def carried() -> tuple[UserCode, ...]:
    """What was loaded in this process."""
    return tuple(_carried.values())


def _loaded(name: str, what: str) -> tuple[UserCode, str]:
    """A file that was run, and what is to be taken from it: that is there, and can be called."""
    place, _, attribute = name.partition(":")
    if not attribute:
        raise ConfigError(f"{what} {name!r} names a file but nothing in it: write {place}:NAME")
    path = Path(place).expanduser().resolve()
    try:
        code = user_code.read(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{what} {name}: cannot read {path}: {error}\nrelative paths start at {Path.cwd()}") from None
    try:
        module = user_code.module(code)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{what} {name}: running {path} failed: {type(error).__name__}: {error}") from None
    if not hasattr(module, attribute):
        there = [found for found, value in vars(module).items() if callable(value) and not found.startswith("_")]
        raise ConfigError(f"{what} {name}: {unknown('name', attribute, there)} in {path}")
    found = getattr(module, attribute)
    if not callable(found):
        raise ConfigError(f"{what} {name}: {attribute} in {path} cannot be called: it is a {type(found).__name__}")
    _carried[code.package] = code
    return code, attribute
