"""AdamW and its learning-rate schedule, the same for every backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actors.specs import OptimSpec


@dataclass(frozen=True)
class StepInfo:
    """The result of one optimizer step: global gradient norm before clipping, and the applied learning rate."""

    grad_norm: float
    learning_rate: float


def build_optimizer(named: Iterable[tuple[str, Tensor]], spec: OptimSpec) -> torch.optim.AdamW:
    """Fused AdamW over the given tensors. Weight decay only on matrices: never on biases and norms."""
    tensors = [tensor for _, tensor in named]
    # A partitioned parameter (DeepSpeed ZeRO-3) is flat; its true shape is in `ds_shape`.
    matrices = [tensor for tensor in tensors if len(getattr(tensor, "ds_shape", tensor.shape)) >= 2]
    chosen = {id(tensor) for tensor in matrices}
    vectors = [tensor for tensor in tensors if id(tensor) not in chosen]
    groups = [{"params": matrices, "weight_decay": spec.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=spec.learning_rate,
        betas=spec.adam_betas,
        eps=spec.adam_eps,
        fused=True,
    )


def build_schedule(
    optimizer: torch.optim.Optimizer, spec: OptimSpec, steps_done: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule after `steps_done` steps, which sets the optimizer's learning rates. It depends only on its
    arguments: a run that is resumed with another schedule continues as if that had always been its schedule."""
    for group in optimizer.param_groups:
        group["initial_lr"] = spec.learning_rate
    return torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(spec), last_epoch=steps_done - 1)


def set_hyperparameters(optimizer: torch.optim.Optimizer, fresh: torch.optim.Optimizer) -> None:
    """Give `optimizer` the settings of `fresh`, which `build_optimizer` made for the same weights; it keeps its own
    weights and moments. The schedule sets the learning rate."""
    for group, new in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        group.update({key: value for key, value in new.items() if key != "params"})


def learning_rate_factor(spec: OptimSpec) -> Callable[[int], float]:
    """Step (from 0) -> factor of the learning rate: rises to 1 over the warm-up, then falls to `min_lr_ratio`.

    The first step has a rate above zero: with w warm-up steps it is 1/w. Raises ValueError for a schedule that falls
    but has no end, and for an unknown one.
    """
    shape = _SHAPES.get(spec.scheduler)
    if shape is None:
        raise ValueError(f"scheduler {spec.scheduler!r} does not exist; there are {', '.join(_SHAPES)}")
    if spec.total_steps is None and spec.scheduler != "constant":
        raise ValueError(f"scheduler {spec.scheduler!r} needs total_steps; only 'constant' can do without")

    def factor(step: int) -> float:
        if step < spec.warmup_steps:
            return (step + 1) / spec.warmup_steps
        falling = max(1, (spec.total_steps or 0) - spec.warmup_steps)
        progress = min(1.0, (step - spec.warmup_steps) / falling)
        return spec.min_lr_ratio + (1 - spec.min_lr_ratio) * shape(progress)

    return factor


class Stepper:
    """Clipping, AdamW and the schedule, over float32 tensors with whole gradients."""

    def __init__(self, named: Iterable[tuple[str, Tensor]], spec: OptimSpec) -> None:
        self.named, self.spec = dict(named), spec
        self.max_grad_norm = spec.max_grad_norm
        self.optimizer = build_optimizer(self.named.items(), spec)
        self.schedule = build_schedule(self.optimizer, spec)

    def step(self) -> StepInfo:
        """Clears the gradients. The learning rate it reports is the one it applied."""
        tensors = list(self.named.values())
        norm = torch.nn.utils.get_total_norm([tensor.grad for tensor in tensors if tensor.grad is not None])
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(tensors, self.max_grad_norm, norm)
        learning_rate = float(self.schedule.get_last_lr()[0])
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return StepInfo(norm.item(), learning_rate)

    def state_dict(self) -> dict[str, Any]:
        """What training has made: weights, moments, steps. What was configured is not in it."""
        weights = {name: tensor.detach() for name, tensor in self.named.items()}
        moments = self.optimizer.state_dict()["state"]
        return {"weights": weights, "moments": moments, "steps": self.schedule.last_epoch}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, tensor in self.named.items():
            tensor.copy_(state["weights"][name])
        configured = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["moments"], "param_groups": configured})
        self.schedule = build_schedule(self.optimizer, self.spec, state["steps"])


_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}
