"""Every method by name. A method is a function from its options to a `Pipeline`; its docstring is its description."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.methods.grpo import grpo
from orchestrator.methods.sft import sft
from orchestrator.pipeline import Pipeline

METHODS: dict[str, Callable[..., Pipeline]] = {
    "sft": sft,
    "grpo": grpo,
}
