"""`a.b=c` on the command line: a path into the configuration and a YAML value.

YAML files are read here too, because a value must mean the same in a file and in an override: numbers are those of YAML
1.2 (YAML 1.1 reads `1e-3` as a string and `1:30` as 90), and a duplicate key is an error; PyYAML would silently take
the last one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import yaml

from actors.errors import ConfigError, first_lines

Number = TypeVar("Number", int, float)
Keys = tuple[str | int, ...]  # of keys; an int is a position in a list

# Tag, form and first characters. YAML 1.2's core schema for numbers; of YAML 1.1 the booleans, nothing and `<<`.
PLAIN_SCALARS = (
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("bool", r"(y|Y)es|YES|(n|N)o|NO|(t|T)rue|TRUE|(f|F)alse|FALSE|(o|O)n|ON|(o|O)ff|OFF", "yYnNtTfFoO"),
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("merge", r"<<", "<"),
)


class Loader(yaml.SafeLoader):
    """Safe YAML with the numbers of YAML 1.2: `1e-3` and `.5` are numbers, and `010` is ten. `1:30`, a date, `1_000`
    and `=` are texts."""


def _integer(loader: Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return _number(node, lambda: int(text, 0) if text.startswith(("0o", "0x")) else int(text))


def _float(loader: Loader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node)).lower()
    return _number(node, lambda: float(re.sub(r"\.(inf|nan)", r"\1", text)))


def _number(node: yaml.ScalarNode, read: Callable[[], Number]) -> Number:
    """Raises ConstructorError for what Python cannot read: thousands of digits, or a word marked as a number."""
    try:
        return read()
    except ValueError as error:
        raise yaml.constructor.ConstructorError(None, None, f"no number: {error}", node.start_mark) from None


Loader.yaml_implicit_resolvers = {}
for _tag, _form, _first in PLAIN_SCALARS:  # "": a value that is not there has no first character
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_form})$"), [*_first, ""])
Loader.add_constructor("tag:yaml.org,2002:int", _integer)
Loader.add_constructor("tag:yaml.org,2002:float", _float)


@dataclass(frozen=True)
class Override:
    """One `a.b=c`; `text` is the argument as it was typed."""

    path: Keys
    value: Any
    text: str

    def __str__(self) -> str:
        return f"override {self.text!r}"


def parse(text: str) -> Override:
    """Raises ConfigError if `text` is not `key.key=value` with a YAML value."""
    key, equals, value = text.partition("=")
    parts = key.strip().removeprefix("--").split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {text!r} is not of the form key.key=value, for example train.learning_rate=1e-4")
    try:
        parsed = yaml.load(value, Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not YAML ({first_lines(error)})") from None
    return Override(tuple(int(part) if part.isdecimal() else part for part in parts), parsed, text)


def apply(tree: dict[str, Any], override: Override) -> None:
    """Set the value in `tree`, creating mappings where they are missing. Raises ConfigError if a plain value is in the
    way."""
    node: Any = tree
    for depth, key in enumerate(override.path[:-1]):
        node = _child(node, _key_in(node, key, override), override, depth)
    node[_key_in(node, override.path[-1], override)] = override.value


def load_yaml(text: str, name: str) -> tuple[Any, dict[Keys, int]]:
    """The value of a YAML document and, for each path in it, the line where it stands.

    Raises ConfigError (naming `name` and the line) for broken YAML and for a key given twice."""
    try:
        loader = Loader(text)
        root = loader.get_single_node()
        places = list(_walk(root, ()))  # before there are values: what `<<` names is then among a mapping's own nodes
        value = None if root is None else loader.construct_document(root)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not YAML: {error}") from None
    lines: dict[Keys, int] = {}
    for path, line in places:
        if path in lines:
            raise ConfigError(f"{name}: {dotted(path)} is given twice, in lines {lines[path]} and {line}")
        lines[path] = line
    return value, lines


def dotted(path: Sequence[str | int]) -> str:
    return ".".join(map(str, path))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in a configuration that is no mapping, and of mappings that are empty."""
    if not isinstance(value, Mapping) or not value:
        yield path, value
        return
    for key, inner in cast(Mapping[str, Any], value).items():
        yield from leaves(inner, f"{path}.{key}" if path else str(key))


def _child(node: Any, key: Any, override: Override, depth: int) -> Any:
    if isinstance(node, dict) and node.get(key) is None:
        node[key] = {}
    child = node[key]
    if not isinstance(child, dict | list):
        given = dotted(override.path[: depth + 1])
        raise ConfigError(f"{override}: {given} is {child!r}, which has no keys of its own")
    return child


def _key_in(node: Any, key: str | int, override: Override) -> Any:
    """`key` as an index of its container: a string in a mapping, an int in a list."""
    if isinstance(node, dict):
        return str(key)
    if not isinstance(key, int) or key >= len(node):
        raise ConfigError(f"{override}: {key!r} is not a position in a list of {len(node)} (counted from 0)")
    return key


def _walk(node: yaml.Node | None, path: Keys) -> Iterator[tuple[Keys, int]]:
    """Every path below a node with its line, duplicates included (which a loaded mapping no longer shows)."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor`: its keys are meant to be overridden
                continue
            below = (*path, key.value)
            yield below, key.start_mark.line + 1
            yield from _walk(value, below)
    elif isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            yield (*path, position), item.start_mark.line + 1
            yield from _walk(item, (*path, position))
