"""Whether an answer has the value of the solution, also where one of them is hostile."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.mathematics import accuracy


@pytest.mark.parametrize(
    ("text", "solution", "expected"),
    [
        (r"so it is \boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"$\frac12$", "1/2", 1.0),
        ("The answer is 42.", "$42$", 1.0),
        ("1,000", "1000", 1.0),
        ("x=5", "5", 1.0),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
        (r"\boxed{(x+1)^2}", "y^2+2y+1", 0.0),
        (r"\boxed{\{1,2\}}", r"\{2,1\}", 1.0),
        (r"\boxed{(1,2)}", "(2,1)", 0.0),
        ("$(1,2]$", "(1,2]", 1.0),
        ("$(1,2)$", "(1,2]", 0.0),
        (r"\boxed{\sqrt{8}}", r"2\sqrt2", 1.0),
        (r"$50\%$", "0.5", 1.0),
        ("0.333333", "1/3", 1.0),
        ("0.3333", "1/3", 0.0),
        ("1000001", "1000000", 0.0),
        (r"\boxed{12\text{ cm}}", "12", 1.0),
        (r"2\sin(\pi/6)", "1", 1.0),
        ("$|x-1|$", "|1-x|", 1.0),
        (r"\boxed{\sqrt[3]{8}}", "2", 1.0),
        (r"\boxed{\sqrt[n]{x}}", "x^{1/n}", 1.0),
        (r"\boxed{\sqrt[2.5]{8}}", r"\sqrt{8}", 0.0),
        (r"\boxed{2^{1000}}", r"4^{500}", 1.0),
        (r"\boxed{1000!}", r"1000 \cdot 999!", 1.0),
        (r"either $4$ or \(5\)", "5", 1.0),
        (r"\( never closed, but $5$", "5", 1.0),
        (r"first \[4\] then \[5", "4", 1.0),
        ("$$5$$", "5", 1.0),
        ("1/0", "1", 0.0),
        ("3", "no idea", None),
        ("no idea", "3", 0.0),
    ],
)
def test_accuracy_compares_values_and_not_spellings(text: str, solution: str, expected: float | None) -> None:
    assert accuracy(text, solution) == expected


HOSTILE = [
    r"\boxed{\cos{9^{9^{9}}}}",
    r"\boxed{\sin(10^{10^{7}})}",
    r"\boxed{\tan(10^{10^{7}})}",
    r"\boxed{\exp(10^{10^{8}})}",
    r"\boxed{\sqrt[10^{10^{9}}]{2}}",
    r"\boxed{\sqrt[i]{2}}",
    r"\boxed{(((10^{10^{15}})^{10^{15}})^{10^{15}})^{10^{15}}}",
    r"\boxed{\arcsin(10^{-10^{9}}) + 1.5}",
    r"\boxed{" + "1+" * 480 + "1}",
    r"\boxed{9999" + "!" * 900 + "}",
    "\\(" * 100_000,
    "\\[" * 100_000,
    "$" * 100_001,
    "\\boxed{" * 30_000,
    "9" * 100_000,
    "1/" * 50_000,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_would_compute_for_ever_is_a_wrong_answer(text: str) -> None:
    assert accuracy(text, "2") == 0.0


@pytest.mark.parametrize("solution", [text for text in HOSTILE if "exp" in text or "sqrt[10" in text])
def test_a_solution_out_of_reach_is_no_solution(solution: str) -> None:
    assert accuracy("2", solution) is None


@pytest.mark.parametrize("text", ["9^9^9^9^9", "(" * 900, "__import__('os').abort()", "99999999!", "^", "\\frac", ""])
def test_hostile_answers_are_wrong_and_cost_nothing(text: str) -> None:
    assert accuracy(text, "1") == 0.0


@given(st.text(max_size=60))
def test_no_text_makes_accuracy_raise(text: str) -> None:
    assert accuracy(text, "7") in (0.0, 1.0)
    assert accuracy("7", text) in (0.0, 1.0, None)
