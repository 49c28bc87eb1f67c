"""`autoscale:` of an elastic role: bounds and targets of `orchestrator/cluster/autoscaling.py`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from orchestrator.config.section import Positive, Seconds, Section


class AutoscaleConfig(Section):
    """The number of a pool's workers follows what is asked of it, within bounds."""

    min: Annotated[int, Field(ge=0)] = 1
    """Fewest workers. 0: none while nothing is asked of the pool."""
    max: Positive
    """Most workers."""
    target_wait: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of a step that training may wait for its batch; workers are added above it, removed well below it."""
    target_load: Annotated[float, Field(gt=0)] = 1.0
    """Calls at the peak of a step, for each that the workers can work on at a time; only above it are workers added."""
    steps: Positive = 5
    """Training steps that a decision looks back on."""
    cooldown_s: Annotated[float, Field(ge=0)] = 60.0
    """Seconds from one change to the next. Workers that were removed for want of work come back without delay."""
    idle_s: Seconds = 300.0
    """With no call for this long, the pool has `min` workers."""
