r"""Whether the answer that a model wrote equals a solution.

    "it is \boxed{\frac{1}{2}}" ──marked──► \frac{1}{2} ──parse──► an expression ──equal──► yes, to 0.5

Two expressions are equal if their values agree to 25 digits at a few points; if either was written with a decimal
point, to six decimals.
"""

from __future__ import annotations

import re
from typing import Any

import mpmath as _untyped

from rewards.expressions import Expression, NotMathematics, Value, parse

mpmath: Any = _untyped  # the library has no types

EXACT_TOLERANCE = mpmath.mpf(10) ** -25  # relative
DECIMAL_TOLERANCE = mpmath.mpf(5) * mpmath.mpf(10) ** -7  # absolute


def accuracy(text: str, solution: str) -> float | None:
    """1 if the answer in `text` equals `solution`, else 0; None if the solution cannot be compared with anything."""
    expected = comparable(solution)
    return None if expected is None else agreement(text, expected)


def comparable(solution: str) -> Expression | None:
    """What a solution says, if it has a value."""
    try:
        expected = parse(marked(solution) or solution)
        expected.values()
    except NotMathematics:
        return None
    return expected


def agreement(text: str, expected: Expression) -> float:
    """1 if the answer in `text` equals `expected`, else 0."""
    try:
        return float(equal(answer(text), expected))
    except NotMathematics:
        return 0.0


def answer(text: str) -> Expression:
    """What a text says the answer is: what is marked as such, else the text as a whole, else the last number in it."""
    found = marked(text)
    if found is not None:
        return parse(found)
    try:
        return parse(text)
    except NotMathematics:
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?", text)
        return parse(numbers[-1] if numbers else "")


def marked(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, else the last formula between dollars, `\( \)` or `\[ \]`."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    return _last_formula(text)


def equal(left: Expression, right: Expression) -> bool:
    """The same kind of list with the same values in the same order (in any order, for sets)."""
    if left.letters != right.letters or left.brackets != right.brackets:
        return False
    decimal = left.decimal or right.decimal
    same = _same_set if left.brackets == "{}" else _same_list
    return all(same(ours, theirs, decimal) for ours, theirs in zip(left.values(), right.values(), strict=True))


def _same_list(left: list[Value], right: list[Value], decimal: bool) -> bool:
    return len(left) == len(right) and all(_close(a, b, decimal) for a, b in zip(left, right, strict=True))


def _same_set(left: list[Value], right: list[Value], decimal: bool) -> bool:
    def covers(outer: list[Value], inner: list[Value]) -> bool:
        return all(any(_close(a, b, decimal) for b in outer) for a in inner)

    return covers(left, right) and covers(right, left)


def _close(a: Value, b: Value, decimal: bool) -> bool:
    if mpmath.isinf(a) or mpmath.isinf(b):
        return bool(a == b)
    limit = DECIMAL_TOLERANCE if decimal else EXACT_TOLERANCE * max(1, abs(a), abs(b))
    return bool(abs(a - b) <= limit)


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    depth = 0
    for position in range(start + len("\\boxed"), len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : position]
    return None


_MARKS = re.compile(r"\$\$?|\\[()\[\]]")
_CLOSED_BY = {"$": "$", "$$": "$", "\\(": "\\)", "\\[": "\\]"}


def _last_formula(text: str) -> str | None:
    """In one pass: a search for the closing mark from every opening one would be quadratic."""
    last = {closer: text.rfind(closer) for closer in _CLOSED_BY.values()}
    found, closer, start = None, None, 0
    for mark in _MARKS.finditer(text):
        if closer is None:
            wanted = _CLOSED_BY.get(mark[0])
            if wanted is not None and last[wanted] >= mark.end():
                closer, start = wanted, mark.end()
        elif mark[0] in (closer, closer * 2):
            if mark.start() > start:
                found, closer = text[start : mark.start()], None
            else:  # nothing between the two: it began here
                start = mark.end()
    return found
