"""Types that options of several methods have. One that is out of its range is refused with the option's name."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Several = Annotated[int, Field(ge=2)]
Supervision = Literal["outcome", "process"]  # one reward per answer, or one per step of it
Smoothing = Annotated[float, Field(ge=0, lt=0.5)]  # of labels: the share of pairs that are the wrong way round
