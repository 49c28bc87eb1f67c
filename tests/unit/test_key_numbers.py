"""Keys that are numbers: which values they refuse."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from orchestrator.config.roles import EngineRole
from orchestrator.config.schema import BemaConfig, PhaseConfig, RewardConfig, RunConfig, SamplingConfig, TrainConfig
from orchestrator.config.section import types_in
from tests.unit.run_configs import SFT, at


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ("seed", -1),
        ("seed", 2**32),
        ("phases.NAME.train.learning_rate", True),
        ("phases.NAME.train.learning_rate", float("inf")),
        ("phases.NAME.train.steps", True),
        ("phases.NAME.train.adam_betas", [0.9, 1.0]),
        ("phases.NAME.sampling.stop_token_ids", [True]),
        ("phases.NAME.sampling.stop_token_ids", [-1]),
        ("phases.NAME.sampling.stop", [""]),
        ("phases.NAME.sampling.top_k", 0),
    ],
    ids=str,
)
def test_nan_and_numbers_out_of_range_are_refused(keys: str, value: Any) -> None:
    RunConfig.model_validate(SFT)
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate(at(keys.split("."), value, SFT))
    assert keys.split(".")[-1] in str(caught.value)


def numbers(schema: type[BaseModel]) -> list[str]:
    return [
        name
        for name, field in schema.model_fields.items()
        if {int, float} & set(types_in(field.annotation)) and not {bool, Any} & set(types_in(field.annotation))
    ]


@pytest.mark.parametrize("section", [TrainConfig, SamplingConfig, RewardConfig, PhaseConfig, EngineRole, BemaConfig])
def test_true_is_refused_where_a_number_is_needed(section: type[BaseModel]) -> None:
    for name in numbers(section):
        with pytest.raises(ValidationError, match=f"(?s){name}.*a number; true, yes and on are not numbers"):
            section.model_validate({name: True})
