"""The rewards that come with Troupe, by the names that a recipe uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rewards import formats, functions
from rewards.unit_tests import UnitTests

REWARDS: dict[str, Callable[..., Any]] = {
    "exact_match": functions.exact_match,
    "accuracy_reward": functions.accuracy_reward,
    "reasoning_accuracy_reward": functions.reasoning_accuracy_reward,
    "think_format_reward": functions.think_format_reward,
    "soft_overlong_punishment": functions.soft_overlong_punishment,
    "repetition_penalty": functions.repetition_penalty,
    "cosine_scaled": functions.cosine_scaled,
    "completion_length": functions.completion_length,
    "regex": formats.regex,
    "json_schema": formats.json_schema,
    "unit_tests": UnitTests,
}
