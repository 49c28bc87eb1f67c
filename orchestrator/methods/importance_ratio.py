"""What methods with an importance ratio share: options that act on it, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actors.errors import ConfigError
from orchestrator.losses.policy_gradient import Correction, Old

EPSILON = 0.2


def old_of(several_updates: bool) -> Old:
    """What the ratio is taken against: with one update per batch it is 1, and no pass is spent on `old_logps`."""
    return "recorded" if several_updates else "current"


def correction_options(correction: Correction, lowest: float | None, highest: float) -> dict[str, Any]:
    """Of `policy_gradient`: none without a correction, so that bounds alone are refused as idle. Raises ConfigError for
    bounds between which nothing is."""
    if lowest is not None and lowest > highest:
        raise ConfigError(
            f"options.correction_min={lowest:g} is above options.correction_max={highest:g}: no weight is "
            "between them; lower the one, or raise the other"
        )
    if correction == "none":
        return {}
    return {"correction": correction, "correction_min": lowest, "correction_max": highest}


def clips_nothing(old: Old, set_options: Mapping[str, bool]) -> tuple[str, ...]:
    """A warning for options of a clip that are set although the ratio is 1."""
    idle = [name for name, is_set in set_options.items() if is_set]
    if old != "current" or not idle:
        return ()
    return (
        f"options.{', options.'.join(idle)}: with one update per batch the ratio is 1, and nothing is clipped; set "
        "options.updates_per_batch or options.minibatches to more than 1 if that is not meant",
    )
