"""Labels of nodes, and conditions on them in Ray's syntax. Pure.

role: rollout        has the label with that value        role: "!rollout"       does not have it
zone: in(a, b)       has it with one of the values        zone: "!in(a, b)"      with none of them
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

Labels = Mapping[str, str]
Selector = Mapping[str, str]  # label -> condition; a node must meet all of them, so an empty one matches every node

_NAME = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_CONDITION = re.compile(rf"(!?)(?:({_NAME})|in\(({_NAME}(?:, ?{_NAME})*)\))")
_KEY = re.compile(rf"(?:{_NAME}/)?{_NAME}")


def check(selector: dict[str, str]) -> dict[str, str]:
    """The selector; raises ValueError for one that Ray would refuse."""
    for label, condition in selector.items():
        if not _KEY.fullmatch(label):
            raise ValueError(
                f"{label!r} is no label: letters, digits, and - _ . between them, e.g. role or my.org/role"
            )
        if not _CONDITION.fullmatch(condition):
            raise ValueError(f"{label}={condition!r} is no condition; write VALUE, !VALUE, in(A, B) or !in(A, B)")
    return selector


def meets(labels: Labels, selector: Selector) -> bool:
    return not unmet(labels, selector)


def unmet(labels: Labels, selector: Selector) -> list[str]:
    """The conditions that a node with these labels does not meet."""
    return [f"{label}={condition}" for label, condition in selector.items() if not _holds(condition, labels.get(label))]


def describe(selector: Selector) -> str:
    """`role=rollout and zone=in(a, b)`."""
    return " and ".join(f"{label}={condition}" for label, condition in selector.items()) or "any node"


def lacking(nodes: Iterable[Labels], selector: Selector) -> list[str]:
    """Conditions that no node meets, with the existing values of their labels."""
    known = list(nodes)
    reasons: list[str] = []
    for label, condition in selector.items():
        values = sorted({labels[label] for labels in known if label in labels})
        if not any(_holds(condition, labels.get(label)) for labels in known):
            seen = f"the values there are: {', '.join(values)}" if values else f"no node has a label {label!r} at all"
            reasons.append(f"no node meets {label}={condition} ({seen})")
    return reasons


def _holds(condition: str, value: str | None) -> bool:
    parsed = _CONDITION.fullmatch(condition)
    assert parsed is not None, "checked when the configuration was read"
    negated, single, several = parsed.groups()
    wanted = {single} if single is not None else {name.strip() for name in several.split(",")}
    return (value in wanted) != bool(negated)
