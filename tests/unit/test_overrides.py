"""What a value is: the same in a file and in an override, with the numbers of YAML 1.2."""

from __future__ import annotations

import math
from typing import Any

import pytest

from actors.errors import ConfigError
from orchestrator.overrides import load_yaml, parse

VALUES: dict[str, Any] = {
    "1": 1,
    "-7": -7,
    "+3": 3,
    "010": 10,
    "0o17": 15,
    "0x1F": 31,
    "9" * 30: int("9" * 30),
    ".5": 0.5,
    "-.5": -0.5,
    "+.5": 0.5,
    ".5e3": 500.0,
    "-.5e-3": -0.0005,
    "1e-3": 0.001,
    "1E5": 100000.0,
    "-2e+4": -20000.0,
    "1.": 1.0,
    "1.5": 1.5,
    "010.5": 10.5,
    "1.5e3": 1500.0,
    ".inf": math.inf,
    "-.Inf": -math.inf,
    # Texts, though YAML 1.1 makes numbers, dates or an error of them.
    "1:30": "1:30",
    "1:30.5": "1:30.5",
    "2024-01-02": "2024-01-02",
    "2024-01-02 03:04:05": "2024-01-02 03:04:05",
    "0b11": "0b11",
    "1_000": "1_000",
    "1_0.5": "1_0.5",
    "-0x1F": "-0x1F",
    "=": "=",
    ".": ".",
    "e5": "e5",
    "1e": "1e",
    "inf": "inf",
    "'10'": "10",
    # As before.
    "true": True,
    "off": False,
    "null": None,
    "~": None,
    "": None,
}


@pytest.mark.parametrize("written", VALUES)
def test_a_value_is_what_yaml_1_2_says_in_a_file_and_in_an_override(written: str) -> None:
    expected = (type(VALUES[written]), VALUES[written])
    in_a_file, _ = load_yaml(f"key: {written}\n", "x.yaml")
    overridden = parse(f"key={written}").value
    assert (type(in_a_file["key"]), in_a_file["key"]) == expected
    assert (type(overridden), overridden) == expected


@pytest.mark.parametrize("written", [".nan", ".NaN"])
def test_what_is_not_a_number_is_a_float_in_a_file_and_in_an_override(written: str) -> None:
    in_a_file, _ = load_yaml(f"key: [{written}]\n", "x.yaml")
    assert math.isnan(in_a_file["key"][0])
    assert math.isnan(parse(f"key={written}").value)


@pytest.mark.parametrize("written", ["1" * 5000, "!!int many", "!!float many"])
def test_a_number_that_cannot_be_read_is_refused_in_a_file_and_in_an_override(written: str) -> None:
    with pytest.raises(ConfigError, match=r"x\.yaml is not YAML.*no number"):
        load_yaml(f"key: {written}\n", "x.yaml")
    with pytest.raises(ConfigError, match=r"the value is not YAML .*no number"):
        parse(f"key={written}")


def test_an_anchor_is_merged_into_a_mapping() -> None:
    value, _ = load_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n", "x.yaml")
    assert value["b"] == {"x": 1, "y": 3}


def test_a_path_may_hold_digits_that_are_no_position() -> None:
    assert parse("a.\N{SUPERSCRIPT TWO}=1").path == ("a", "\N{SUPERSCRIPT TWO}")
