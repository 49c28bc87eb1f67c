"""A reference that follows the policy, softly, or hard with a share of 1. Source: arXiv:2404.09656."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from orchestrator.pipeline import Stage, mix

Share = Annotated[float, Field(gt=0, le=1)]
Steps = Annotated[int, Field(ge=1)]

MIXUP_ALPHA = 0.6
SYNC_STEPS = 512


def reference_sync(sync: bool, alpha: float, steps: int) -> tuple[Stage, ...]:
    """The stage that moves the reference, to stand after the policy's update; none without `sync`."""
    return (mix("reference", "policy", share=alpha, every=steps),) if sync else ()
