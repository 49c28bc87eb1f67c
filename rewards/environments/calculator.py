"""A calculator that a model may call as a tool."""

from __future__ import annotations

from typing import Any

from rewards.expressions import PRECISION_DIGITS, NotMathematics, parse

SHOWN_DIGITS = 12  # of a number that is not whole


def calculator(expression: str) -> str:
    """Work out an arithmetic expression.

    Args:
        expression: The expression, for example (12.5 + 3) * 4 or sqrt(2)^3.

    Returns:
        Its value.
    """
    try:
        if "=" in expression:
            raise NotMathematics("an equation has no value; give one side of it")
        parsed = parse(expression)
        if parsed.letters or len(parsed.parts) != 1:
            raise NotMathematics("give one expression of numbers")
        [[value]] = parsed.values()
    except NotMathematics as error:
        raise ValueError(f"cannot work out {expression[:100]!r}: {error}") from None
    return _shown(value)


def _shown(value: Any) -> str:
    """As a pocket calculator shows it: whole numbers without a point, others with `SHOWN_DIGITS` digits."""
    import mpmath as _untyped

    mpmath: Any = _untyped  # the library has no types
    if value.imag or not mpmath.isfinite(value):
        raise ValueError("the value is not a real number")
    with mpmath.workdps(PRECISION_DIGITS):
        rounded = mpmath.nint(value.real)
        # A root that is whole may miss it by the last digits.
        if abs(rounded - value.real) < mpmath.mpf(10) ** (3 - PRECISION_DIGITS) and abs(rounded) < 10**PRECISION_DIGITS:
            return str(int(rounded))
        return str(mpmath.nstr(value.real, SHOWN_DIGITS))
