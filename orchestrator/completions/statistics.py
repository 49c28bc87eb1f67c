"""What rewards of several samples per prompt say of a model: pass@k, mean@n, standard errors. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts. `standard_error`: of the mean, with the prompts as the units that vary (samples of one
    prompt are no independent units); None for one prompt. `prompts`: over how many."""

    value: float
    standard_error: float | None
    prompts: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate | None:
        """None if there are none.

        Source: arXiv:2411.00640, section 2 (the clustered standard error where clusters have equal weight)."""
        if not values:
            return None
        count, mean = len(values), math.fsum(values) / len(values)
        if count == 1:
            return cls(mean, None, 1)
        variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        return cls(mean, math.sqrt(variance / count), count)

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "standard_error": self.standard_error, "prompts": self.prompts}


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The probability that at least one of `k` of a prompt's samples is right, estimated without bias from `samples`
    of which `right` are: 1 - C(n-c, k) / C(n, k).

    Source: arXiv:2107.03374, eq. 1."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def measured(
    rewards: Mapping[int, Sequence[float | None]], ks: Sequence[int], *, samples: int, threshold: float
) -> dict[str, Estimate]:
    """pass@k for each `k`, and mean@n, the mean reward of a prompt's `samples`. `rewards`: by prompt, None for a sample
    without one, which is left out of everything; a sample is right if its reward reaches `threshold`. A prompt with
    fewer than k samples is left out of pass@k; a measure without a prompt is missing."""
    known = [[reward for reward in of_prompt if reward is not None] for of_prompt in rewards.values()]
    known = [of_prompt for of_prompt in known if of_prompt]
    found: dict[str, Estimate | None] = {}
    for k in ks:
        passed = [
            pass_at_k(len(each), sum(reward >= threshold for reward in each), k) for each in known if len(each) >= k
        ]
        found[f"pass@{k}"] = Estimate.of(passed)
    found[f"mean@{samples}"] = Estimate.of([math.fsum(each) / len(each) for each in known])
    return {name: estimate for name, estimate in found.items() if estimate is not None}
