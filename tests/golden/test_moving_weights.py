"""Weights that move besides training, against the numbers of another implementation."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from actors.backends.single import SoloWorld
from actors.lora import resident
from actors.weight_averaging import Average, AverageSpec
from actors.weight_swap import mix_in
from tests.golden.cases import cases


@cases("callback/bema")
def test_an_average_of_weights_equals_the_peer(case: dict[str, Any]) -> None:
    spec = AverageSpec(update_freq=1, update_after=0, min_ema_multiplier=0.0, **case["config"])
    theta = torch.tensor(case["inputs"]["theta0"])
    average = Average(spec, SoloWorld())
    average.begin([("weight", theta)])
    for increment, expected in zip(case["inputs"]["increments"], case["outputs"]["running"], strict=True):
        theta = theta + increment
        average.after_step(partial(list, [("weight", theta)]))
        torch.testing.assert_close(average.whole("weight").view(1, -1), torch.tensor(expected), atol=1e-6, rtol=1e-6)


@cases("callback/sync_ref")
def test_a_reference_that_follows_equals_the_peer(case: dict[str, Any]) -> None:
    reference = nn.Linear(2, 1, bias=False).requires_grad_(False)
    reference.weight.copy_(torch.tensor(case["inputs"]["ref"]))
    policy = torch.tensor(case["inputs"]["policy"])
    slices = iter([("weight", policy.shape, policy.view(-1))])
    mix_in(reference, slices, case["config"]["alpha"], 1, resident, SoloWorld(), lambda _: False)
    torch.testing.assert_close(reference.weight.data, torch.tensor(case["outputs"]["ref"]), atol=1e-7, rtol=1e-6)
