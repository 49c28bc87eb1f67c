from __future__ import annotations

import math

import pytest
import torch

from actors.backends.optimizer import OptimSpec, build_optimizer, build_schedule, learning_rate_factor


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
def test_a_schedule_that_cannot_be_is_refused(spec: OptimSpec, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learning_rate_factor(spec)


def test_weight_decay_pulls_on_matrices_only() -> None:
    matrix, bias = torch.ones(2, 2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = build_optimizer(
        [("weight", matrix), ("bias", bias)], OptimSpec(0.1, weight_decay=0.5, scheduler="constant")
    )
    matrix.grad, bias.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert matrix.detach().unique().item() == pytest.approx(0.95)
    assert bias.detach().unique().item() == 1.0


def test_a_schedule_resumes_where_it_was_saved() -> None:
    spec = OptimSpec(0.1, total_steps=10, scheduler="cosine", warmup_steps=2)

    def fresh() -> torch.optim.lr_scheduler.LambdaLR:
        weight = torch.ones(1, requires_grad=True)
        return build_schedule(build_optimizer([("weight", weight)], spec), spec)

    straight, first, second = fresh(), fresh(), fresh()
    for schedule in (straight, first):
        for _ in range(5):
            schedule.optimizer.step()
            schedule.step()
    second.load_state_dict(first.state_dict())
    straight.step()
    second.step()
    assert second.get_last_lr() == straight.get_last_lr()
