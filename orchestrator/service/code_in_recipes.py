"""What of a recipe would run code that its sender chose, or read this machine's secrets: refused without --allow-code.

Found by the form of a value and not by a list of keys, so that a key which is added tomorrow is covered:

    my.py:reward, package.module:name      a name of something in a file or an installed package
    trust_remote_code: true                Python in a model's folder
    ANYTHING_env: ...                      an environment variable, whose value the run would send to a URL
    engine_options: {NAME: text}           engines import classes by such texts; numbers and truth values pass

`example:NAME` is a model or data set of ours. What remains is a description: methods, rewards, tools and environments
that come with Troupe, models, data, URLs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from actors.errors import ConfigError

NAMED = re.compile(r"(?!example:)[^\s:]+\s*:\s*\w+|.*\.py(:.*)?", re.DOTALL)
ENGINE_OPTIONS = "engine_options"
MOST_VALUES, DEEPEST = 100_000, 50  # an alias in YAML can make a short text a tree without end


def code_in(tree: Any) -> list[str]:
    """`key: why` for each value that would run code. Raises ConfigError for a tree of unreasonable size."""
    return [f"{path}: {why}" for path, value in _values(tree) if (why := _why(path, value))]


def _values(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every value in the tree with its path, containers included."""
    pending, count = [("", tree, 0)], 0
    while pending:
        path, value, depth = pending.pop()
        count += 1
        if count > MOST_VALUES or depth > DEEPEST:
            raise ConfigError(f"the recipe has more than {MOST_VALUES} values, or is nested deeper than {DEEPEST}")
        yield path, value
        if isinstance(value, dict):
            pending += [(f"{path}.{key}".removeprefix("."), inner, depth + 1) for key, inner in value.items()]
        elif isinstance(value, list | tuple):
            pending += [(f"{path}.{index}", inner, depth + 1) for index, inner in enumerate(value)]


def _why(path: str, value: Any) -> str | None:
    keys = path.split(".")
    if keys[-1].endswith("trust_remote_code") and value not in (False, None):
        return "runs Python from the model's folder"
    if keys[-1].endswith("_env") and value:
        return "reads an environment variable of the run's machine"
    if isinstance(value, str) and ENGINE_OPTIONS in keys[:-1]:
        return "a text, by which an engine may import a class"
    if isinstance(value, str) and NAMED.fullmatch(value.strip()):
        return f"{value[:100]!r} names code"
    return None
