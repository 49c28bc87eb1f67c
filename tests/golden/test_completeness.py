"""No case of `losses.json` and no key of its configurations is overlooked."""

from __future__ import annotations

from inspect import signature
from pathlib import Path

import pytest

from orchestrator.methods import METHODS
from tests.golden.cases import CASES, DEPARTURES, compared
from tests.golden.peer import ELSEWHERE, GRPO_NAMES, MAPPINGS, NOT_BUILT, NOT_COMPARABLE, Inexpressible, ours


def test_every_case_is_compared_or_listed_with_the_reason_why_it_is_not() -> None:
    computed = compared()
    listed = {*ELSEWHERE, *NOT_COMPARABLE, *DEPARTURES}
    families = {name for name in CASES if name.partition("/")[0] in NOT_BUILT}
    assert CASES.keys() - computed - listed - families == set(), "neither compared nor listed"
    assert not computed & (listed | families), "compared, and listed as not"
    assert listed <= CASES.keys() and {name.partition("/")[0] for name in families} == set(NOT_BUILT)
    root = Path(__file__).parents[2]
    assert all((root / file).is_file() for file in ELSEWHERE.values())


@pytest.mark.parametrize("family", MAPPINGS)
def test_a_key_or_a_family_of_the_peer_that_nobody_knows_is_an_error(family: str) -> None:
    of_family = (CASES[name] for name in compared() if name.startswith(f"{family}/"))
    case = max(of_family, key=lambda case: len(case["config"]))
    assert ours(case)[1]
    with pytest.raises(Inexpressible, match="'a_new_key'"):
        ours({**case, "config": {**case["config"], "a_new_key": 1}})
    with pytest.raises(Inexpressible, match="which method of ours"):
        ours({**case, "id": "newer/method"})


def test_every_key_of_the_peers_policy_gradient_has_a_name_of_ours() -> None:
    assert set(GRPO_NAMES.values()) <= signature(METHODS["grpo"]).parameters.keys()
