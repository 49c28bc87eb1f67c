from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from actors.backends.optimizer import Stepper, build_optimizer, learning_rate_factor
from actors.specs import OptimSpec


def rates(spec: OptimSpec, steps: int) -> list[float]:
    factor = learning_rate_factor(spec)
    return [factor(step) for step in range(steps)]


def test_a_linear_schedule_falls_to_its_floor_at_the_end() -> None:
    spec = OptimSpec(1.0, total_steps=4, scheduler="linear", min_lr_ratio=0.2)
    assert rates(spec, 6) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2])


def test_a_cosine_schedule_is_half_way_down_in_the_middle() -> None:
    spec = OptimSpec(1.0, total_steps=4, scheduler="cosine", min_lr_ratio=0.0)
    expected = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(5)]
    assert rates(spec, 5) == pytest.approx(expected)
    assert rates(spec, 5)[2] == pytest.approx(0.5)


def test_warm_up_rises_to_the_full_rate_and_its_first_step_learns() -> None:
    spec = OptimSpec(1.0, scheduler="constant", warmup_steps=4)
    assert rates(spec, 6) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_the_fall_begins_where_the_warm_up_ends() -> None:
    spec = OptimSpec(1.0, total_steps=4, scheduler="linear", warmup_steps=2)
    assert rates(spec, 5) == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (OptimSpec(1.0, total_steps=3, scheduler="step"), "'step' does not exist; there are constant, linear, cosine"),
        (OptimSpec(1.0, scheduler="linear"), "'linear' needs total_steps"),
    ],
)
def test_an_invalid_schedule_is_refused(spec: OptimSpec, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learning_rate_factor(spec)


def test_weight_decay_applies_to_matrices_only() -> None:
    matrix, bias = torch.ones(2, 2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = build_optimizer(
        [("weight", matrix), ("bias", bias)], OptimSpec(0.1, weight_decay=0.5, scheduler="constant")
    )
    matrix.grad, bias.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert matrix.detach().unique().item() == pytest.approx(0.95)
    assert bias.detach().unique().item() == 1.0


def grads(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"matrix": torch.randn(2, 3, generator=generator), "bias": torch.randn(3, generator=generator)}


def stepper(spec: OptimSpec) -> Stepper:
    return Stepper(
        {"matrix": torch.ones(2, 3, requires_grad=True), "bias": torch.ones(3, requires_grad=True)}.items(), spec
    )


def step(target: Stepper, number: int) -> float:
    """The learning rate of that step."""
    for name, grad in grads(number).items():
        target.named[name].grad = grad
    return target.step().learning_rate


def weights(target: Stepper) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in target.named.items()}


BEFORE = OptimSpec(0.1, total_steps=4, weight_decay=0.2, max_grad_norm=None)
CHANGED = {
    "nothing": {},
    "learning_rate": {"learning_rate": 0.03},
    "total_steps": {"total_steps": 8},
    "scheduler": {"scheduler": "cosine", "total_steps": 10},
    "warmup_steps": {"warmup_steps": 3},
    "weight_decay": {"weight_decay": 0.7},
    "adam_betas": {"adam_betas": (0.5, 0.9)},
    "adam_eps": {"adam_eps": 0.3},
    "max_grad_norm": {"max_grad_norm": 0.01},
}


@pytest.mark.parametrize("changed", CHANGED)
def test_a_resumed_optimizer_steps_as_it_is_configured_now_from_the_moments_that_were_saved(changed: str) -> None:
    saving = stepper(BEFORE)
    for number in range(3):
        step(saving, number)
    saved = deepcopy(saving.state_dict())
    now = replace(BEFORE, **CHANGED[changed])
    resumed = stepper(now)
    resumed.load_state_dict(deepcopy(saved))  # it keeps what it is given
    rate = step(resumed, 3)
    assert rate == pytest.approx(now.learning_rate * learning_rate_factor(now)(3)) and rate > 0
    grad, norm = grads(3), math.hypot(*(g.norm().item() for g in grads(3).values()))
    clipping = min(1.0, now.max_grad_norm / norm) if now.max_grad_norm else 1.0
    beta1, beta2 = now.adam_betas
    for index, name in enumerate(("matrix", "bias")):
        moments, g = saved["moments"][index], grad[name] * clipping
        m = beta1 * moments["exp_avg"] + (1 - beta1) * g
        v = beta2 * moments["exp_avg_sq"] + (1 - beta2) * g**2
        decayed = saved["weights"][name] * (1 - rate * (now.weight_decay if name == "matrix" else 0.0))
        expected = decayed - rate * (m / (1 - beta1**4)) / ((v / (1 - beta2**4)).sqrt() + now.adam_eps)
        torch.testing.assert_close(resumed.named[name].detach(), expected, rtol=1e-4, atol=1e-6)
        assert not torch.equal(expected, saved["weights"][name])


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
def test_a_resumed_optimizer_equals_one_that_went_on_bit_for_bit(scheduler: str) -> None:
    spec = OptimSpec(0.1, total_steps=10, scheduler=scheduler, warmup_steps=4, weight_decay=0.1)
    straight, first, second = stepper(spec), stepper(spec), stepper(spec)
    for number in range(3):
        step(straight, number)
        step(first, number)
    at_save = weights(first)
    second.load_state_dict(deepcopy(first.state_dict()))
    for number in range(3, 9):
        assert step(second, number) == step(straight, number)
    for name, tensor in weights(straight).items():
        assert torch.equal(second.named[name], tensor) and not torch.equal(at_save[name], tensor)


def test_a_finished_linear_schedule_that_is_made_longer_goes_on_from_where_the_longer_one_would_be() -> None:
    short, long = stepper(replace(BEFORE, total_steps=2)), stepper(replace(BEFORE, total_steps=4))
    assert [step(short, number) for number in range(2)] == pytest.approx([0.1, 0.05])
    long.load_state_dict(deepcopy(short.state_dict()))
    assert [step(long, number) for number in range(2, 4)] == pytest.approx([0.05, 0.025])
