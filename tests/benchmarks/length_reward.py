"""A reward that costs nothing, the same for both sides of a comparison."""

from __future__ import annotations

from typing import Any


def length_reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [float(len(ids) % 7) for ids in completion_ids]
