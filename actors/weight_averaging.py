"""A bias-corrected moving average of the trained weights.

    step      ..  update_after   .. + update_freq        .. + 2 update_freq ..
    theta     ──────┬───────────────────┬───────────────────────┬──────────────
                    └► start, ema       └► ema, average         └► ema, average

Source: arXiv:2508.00180. The average is taken of the optimizer's float32 weights. Each rank keeps an equal part of
every weight in the host's memory; whole weights are assembled only to be read or saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actors.errors import ConfigError, RunError
from actors.objective import World

Weights = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class AverageSpec:
    """When the average is taken, and its weights; steps are optimizer steps of the phase.

    At step t `ema <- (1 - beta) ema + beta theta` and the average is `ema + alpha (theta - start)`, with
    `beta = max((lag + multiplier t)^-ema_power, min_ema_multiplier)` and `alpha = (lag + multiplier t)^-bias_power`.
    """

    update_freq: int
    ema_power: float
    bias_power: float
    lag: float
    multiplier: float
    update_after: int
    min_ema_multiplier: float

    def beta(self, step: int) -> float:
        return max((self.lag + self.multiplier * step) ** -self.ema_power, self.min_ema_multiplier)

    def alpha(self, step: int) -> float:
        return (self.lag + self.multiplier * step) ** -self.bias_power


@dataclass
class _Share:
    """This rank's part of one weight, flat, float32, on the host."""

    start: Tensor
    ema: Tensor
    average: Tensor


class Average:
    """The average of one rank's share. Every method is collective, as far as the weights that it is given are."""

    def __init__(self, spec: AverageSpec, world: World) -> None:
        self.spec, self._world = spec, world
        self._step = 0
        self._shares: dict[str, _Share] = {}

    def begin(self, weights: Weights) -> None:
        """These are the weights of step 0; until the average is first taken it is what it starts from."""
        self._step = 0
        self._start(weights)

    @torch.no_grad()
    def after_step(self, weights: Callable[[], Weights]) -> None:
        """An optimizer step was done; `weights` are asked for only if it is one at which something is taken."""
        self._step += 1
        since = self._step - self.spec.update_after
        if since == 0:
            self._start(weights())
        elif since > 0 and since % self.spec.update_freq == 0:
            beta, alpha = self.spec.beta(self._step), self.spec.alpha(self._step)
            for name, weight in weights():
                share, theta = self._shares[name], self._own(weight)
                share.ema.mul_(1 - beta).add_(theta, alpha=beta)
                share.average = share.ema.add(theta - share.start, alpha=alpha)

    def whole(self, name: str) -> Tensor:
        """The average of a weight, flat, from all ranks. Collective."""
        return self._world.gather(self._shares[name].average)

    def state(self) -> dict[str, Any]:
        shares = {name: (share.start, share.ema, share.average) for name, share in self._shares.items()}
        return {"step": self._step, "shares": shares}

    def load(self, state: dict[str, Any] | None) -> None:
        """Go on from a `state`. Raises ConfigError if there is none, or if it is of other weights."""
        if state is None:
            raise ConfigError("the checkpoint holds no average: its run took none; resume without train.bema")
        if state["shares"].keys() != self._shares.keys():
            raise ConfigError("the checkpoint holds an average of other weights than the ones that are trained")
        self._step = state["step"]
        self._shares = {name: _Share(*tensors) for name, tensors in state["shares"].items()}

    @torch.no_grad()
    def _start(self, weights: Weights) -> None:
        for name, weight in weights:
            own = self._own(weight)
            self._shares[name] = _Share(own, own.clone(), own.clone())
        if not self._shares:
            raise RunError("an average was asked for of a role that trains no weights")

    def _own(self, weight: Tensor) -> Tensor:
        """A copy of this rank's part."""
        return (
            weight.detach()
            .flatten()
            .tensor_split(self._world.size)[self._world.rank]
            .to("cpu", torch.float32, copy=True)
        )
