r"""A mathematical expression in LaTeX or plain notation: from text to a function of its letters.

    "\frac{1}{2}" ──spellings──► tokens ──recursive descent──► a function of its letters ──values──► 0.5

Text that a model wrote is never evaluated as Python, neither directly nor through a library that does: it is parsed by
a small grammar of numbers, letters, + - * / ^, fractions, roots, |x|, factorials, percent, the usual functions, lists,
intervals, sets, and the right-hand side of an equation.

A model may write anything, so the work is bounded: parsing is linear in the text, an expression has at most
`MAX_CHARACTERS`, and no intermediate value is larger than `MAX_BITS` allows. `rewards.verification` puts a time limit
on the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mpmath as _untyped

mpmath: Any = _untyped  # the library has no types

PRECISION_DIGITS = 30
MAX_CHARACTERS = 1_000  # of an answer; nothing longer is one
MAX_EXPONENT = 1e15  # towers of powers would compute for ever
MAX_BITS = 1_000_000  # of a value's binary exponent, either way: functions of larger values compute with all its digits
MAX_ARGUMENT = 1e15  # of periodic functions and exp: beyond it, PRECISION_DIGITS say little of the angle
MAX_FACTORIAL = 1e4
# Where letters are set: irrational, unrelated points, so that equal values mean equal expressions.
POINTS = tuple(mpmath.mpf(point) for point in ("0.739085133215161", "1.202056903159594", "2.240176739178235"))

Value = Any  # an mpmath number
Letters = Mapping[str, Value]
Node = Callable[[Letters], Value]


class NotMathematics(ValueError):
    """The text is outside the grammar, or its value is out of reach."""


@dataclass(frozen=True)
class Expression:
    """One value or several. `brackets`: what stood around them, e.g. `(]`, or nothing. `decimal`: a decimal point was
    written."""

    parts: tuple[Node, ...]
    brackets: str
    letters: frozenset[str]
    decimal: bool

    def values(self) -> list[list[Value]]:
        """The parts' values at each point. Raises NotMathematics where there are none (a division by zero, say)."""
        with mpmath.workdps(PRECISION_DIGITS):
            try:
                return [[part(letters) for part in self.parts] for letters in _assignments(self.letters)]
            except (ArithmeticError, ValueError, RecursionError) as error:
                raise NotMathematics(str(error)) from None


def parse(text: str) -> Expression:
    """The expression that a text is. Raises NotMathematics."""
    if len(text) > MAX_CHARACTERS:
        raise NotMathematics(f"{len(text)} characters")
    right_side = _plain(text).rsplit("=", 1)[-1].strip().rstrip(".,;")
    try:
        return _Parser(_tokens(right_side)).whole()
    except RecursionError:
        raise NotMathematics("nested too deeply") from None


def _assignments(letters: frozenset[str]) -> list[Letters]:
    """Values for the letters, several times over; once is enough for a number."""
    names = sorted(letters)
    rounds = len(POINTS) if names else 1
    return [
        {name: POINTS[(place + turn) % len(POINTS)] + place // len(POINTS) for place, name in enumerate(names)}
        for turn in range(rounds)
    ]


# Spellings of the same thing, brought to one: (pattern, replacement), applied in order.
_SPELLINGS: Sequence[tuple[str, str]] = (
    (r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}", " "),  # units
    (r"\\(?:left|right|displaystyle|[bB]ig[lr]?)(?![a-zA-Z])", ""),
    (r"\\[,;:! ]|~|\\?\$|°|\^\s*\{?\\circ\}?", " "),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\(?:cdot|times)(?![a-zA-Z])|×|·|\*\*\b", "*"),
    (r"\*\*", "^"),
    (r"\\div|÷", "/"),
    (r"\\%", "%"),
    (r"\\\{", "⟨"),
    (r"\\\}", "⟩"),
    (r"∞", r"\\infty "),
    (r"√", r"\\sqrt "),
    (r"π", r"\\pi "),
    (r"[−–]", "-"),
)
_FUNCTIONS: Mapping[str, Callable[[Value], Value]] = {
    "sqrt": mpmath.sqrt,
    "sin": mpmath.sin,
    "cos": mpmath.cos,
    "tan": mpmath.tan,
    "arcsin": mpmath.asin,
    "arccos": mpmath.acos,
    "arctan": mpmath.atan,
    "ln": mpmath.log,
    "log": mpmath.log10,
    "exp": mpmath.exp,
}
_OF_BOUNDED = ("sin", "cos", "tan", "exp")
_CONSTANTS: Mapping[str, Callable[[], Value]] = {
    "pi": lambda: +mpmath.pi,
    "e": lambda: +mpmath.e,
    "i": lambda: mpmath.mpc(0, 1),
    "infty": lambda: mpmath.inf,
}
_WORDS = "|".join(sorted([*_FUNCTIONS, "pi", "infty"], key=len, reverse=True))
# Three letters in a row that are no known name are prose, not a product.
_TOKEN = re.compile(
    rf"\s*(?:(?P<number>\d+(?:,\d{{3}}(?!\d))*(?:\.\d+)?|\.\d+)|(?P<command>\\[a-zA-Z]+)|(?P<word>{_WORDS})(?![a-zA-Z]{{2}})"
    r"|(?P<letter>[a-zA-Z])(?![a-zA-Z]{2})|(?P<symbol>[-+*/^(){}\[\]|,!%⟨⟩_]))"
)
_CLOSERS = {"(": ")]", "[": "])", "⟨": "⟩"}


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str


def _plain(text: str) -> str:
    for pattern, replacement in _SPELLINGS:
        text = re.sub(pattern, replacement, text)
    return text.strip()


def _tokens(text: str) -> list[_Token]:
    in_list = text[:1] in _CLOSERS  # there a comma parts values and not thousands
    tokens: list[_Token] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None:
            raise NotMathematics(f"cannot read {text[position : position + 10]!r}")
        kind, found = match.lastgroup, match[match.lastgroup]
        if in_list and kind == "number" and "," in found:
            found = found[: found.index(",")]
        tokens.append(_Token("word" if kind == "command" else kind, found.lstrip("\\")))
        position = match.start(match.lastgroup) + len(found)
    return tokens


class _Parser:
    """Recursive descent; each method consumes what it is named after and returns a function of the letters."""

    def __init__(self, tokens: list[_Token]) -> None:
        self._tokens, self._next = tokens, 0
        self._letters: set[str] = set()
        self._decimal = any(token.kind == "number" and "." in token.text for token in tokens)

    def whole(self) -> Expression:
        opener = self._peek()
        for attempt in (self._listed, self._alone):
            self._next = 0
            try:
                expression = attempt()
            except NotMathematics:
                if attempt == self._alone or opener not in _CLOSERS:
                    raise
                continue
            if self._next == len(self._tokens):
                return replace(expression, letters=frozenset(self._letters), decimal=self._decimal)
        raise NotMathematics(f"something follows the expression: {self._peek()!r}")

    def _listed(self) -> Expression:
        """`(1, 2)`, `[0, 1)`, `\\{1, 2\\}`, or `1, 2` without brackets."""
        opener = self._peek()
        if opener in _CLOSERS:
            self._take()
        parts = [self._sum()]
        while self._peek() == ",":
            self._take()
            parts.append(self._sum())
        if opener not in _CLOSERS:
            return self._expression(parts, "")
        closer = self._take()
        if closer not in _CLOSERS[opener]:
            raise NotMathematics(f"{opener!r} is closed by {closer!r}")
        if opener == "⟨":
            return self._expression(parts, "{}")
        return self._expression(parts, opener + closer if len(parts) > 1 else "")

    def _alone(self) -> Expression:
        """A single value, which may begin with a bracket: `(1 + 2) * 3`."""
        return self._expression([self._sum()], "")

    def _expression(self, parts: list[Node], brackets: str) -> Expression:
        return Expression(tuple(parts), brackets, frozenset(), decimal=False)

    def _sum(self) -> Node:
        total = self._product()
        while self._peek() in ("+", "-"):
            total = _binary(total, self._take(), self._product())
        return total

    def _product(self) -> Node:
        product = self._signed()
        while True:
            if self._peek() in ("*", "/"):
                product = _binary(product, self._take(), self._signed())
            elif self._starts_factor():
                product = _binary(product, "*", self._power())
            else:
                return product

    def _starts_factor(self) -> bool:
        """Whether a factor follows without a sign, as in `2x`. A bar does not count: it may be a closing one."""
        token = self._tokens[self._next] if self._next < len(self._tokens) else None
        return token is not None and (token.kind != "symbol" or token.text in "({")

    def _signed(self) -> Node:
        if self._peek() not in ("+", "-"):
            return self._power()
        sign, operand = self._take(), self._signed()
        return (lambda letters: -operand(letters)) if sign == "-" else operand

    def _power(self) -> Node:
        base = self._postfixed()
        if self._peek() != "^":
            return base
        self._take()
        return _binary(base, "^", self._signed())

    def _postfixed(self) -> Node:
        node = self._atom()
        while self._peek() in ("!", "%"):
            node = _factorial(node) if self._take() == "!" else _binary(node, "/", lambda _: mpmath.mpf(100))
        return node

    def _atom(self) -> Node:
        kind, text = self._tokens[self._next].kind if self._next < len(self._tokens) else "end", self._take()
        if kind == "number":
            return lambda _: _within_reach(mpmath.mpf(text.replace(",", "")))
        if text in _CONSTANTS:
            return lambda _: _CONSTANTS[text]()
        if kind == "letter":
            self._letters.add(text)
            return lambda letters: letters[text]
        if kind == "word":
            return self._applied(text)
        closer = {"(": ")", "{": "}", "[": "]", "|": "|"}.get(text)
        if closer is None:
            raise NotMathematics(f"unexpected {text!r}")
        inside = self._sum()
        self._expect(closer)
        return (lambda letters: abs(inside(letters))) if text == "|" else inside

    def _applied(self, name: str) -> Node:
        r"""What follows `\frac`, `\sqrt` or a function's name."""
        if name == "frac":
            return _binary(self._atom(), "/", self._atom())
        if name == "sqrt" and self._peek() == "[":
            degree, radicand = self._atom(), self._atom()
            return _binary(radicand, "^", _binary(lambda _: mpmath.mpf(1), "/", degree))
        if name not in _FUNCTIONS:
            raise NotMathematics(f"unknown name {name!r}")
        return _function(name, self._power())

    def _peek(self) -> str:
        return self._tokens[self._next].text if self._next < len(self._tokens) else ""

    def _take(self) -> str:
        if self._next == len(self._tokens):
            raise NotMathematics("the expression ends too early")
        self._next += 1
        return self._tokens[self._next - 1].text

    def _expect(self, text: str) -> None:
        found = self._take()
        if found != text:
            raise NotMathematics(f"expected {text!r}, found {found!r}")


_OPERATIONS: Mapping[str, Callable[[Value, Value], Value]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "^": lambda a, b: _bounded_power(a, b),
}


def _binary(left: Node, sign: str, right: Node) -> Node:
    operation = _OPERATIONS[sign]
    return lambda letters: _within_reach(operation(left(letters), right(letters)))


def _function(name: str, argument: Node) -> Node:
    function = _FUNCTIONS[name]

    def value(letters: Letters) -> Value:
        given = argument(letters)
        if name in _OF_BOUNDED and abs(given) > MAX_ARGUMENT:
            raise NotMathematics(f"the argument of {name} is out of reach")
        return _within_reach(function(given))

    return value


def _within_reach(value: Value) -> Value:
    for part in (value.real, value.imag):
        if part and not mpmath.isinf(part) and not mpmath.isnan(part) and abs(mpmath.mag(part)) > MAX_BITS:
            raise NotMathematics("the value is out of reach")
    return value


def _bounded_power(base: Value, exponent: Value) -> Value:
    if abs(exponent) > MAX_EXPONENT:
        raise NotMathematics("the exponent is out of reach")
    return base**exponent


def _factorial(node: Node) -> Node:
    def value(letters: Letters) -> Value:
        argument = node(letters)
        if abs(argument) > MAX_FACTORIAL:
            raise NotMathematics("the factorial is out of reach")
        return _within_reach(mpmath.factorial(argument))

    return value
