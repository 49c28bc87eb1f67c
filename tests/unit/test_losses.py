"""What every loss guarantees, whichever method it serves: its gradient is that of its value, and neither the order of
the rows nor the way they are split into micro-batches and ranks changes either. Values come from `tests/golden`."""

from __future__ import annotations

import inspect
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.columns import COLUMNS, Axis
from actors.objective import MicroBatch, Outputs
from orchestrator.losses.objective import LossObjective
from orchestrator.methods import METHODS, build
from tests.unit.loss_rows import (
    METHOD_OPTIONS,
    VOCABULARY,
    every_method,
    name_of,
    names_in,
    objective_of,
    random_rows,
    random_split,
)
from tests.unit.trainer_stub import Rows, learned_from, optimise, seen_by_statistics, statistics_of

# A stop-gradient makes the gradient another thing than the slope of the value; the golden cases hold those gradients.
STOPS_GRADIENT = ("dft", "use_weighting", "cispo", "vespo", "dppo", "current", "sequence_token")
SAMPLED_DISTILLATION = ("iw_opd", "minillm")  # as above; and test_the_reverse_kl_of_a_sequence...


def test_every_method_and_every_loss_type_is_among_those_that_are_tried() -> None:
    for name, method in METHODS.items():
        if not build(name, {}).updates:
            continue
        tried = [options for method_tried, options in METHOD_OPTIONS if method_tried == name]
        assert tried, name
        parameter = inspect.signature(method).parameters.get("loss_type")
        if parameter is not None:
            given = [options.get("loss_type", parameter.default) for options in tried]
            found = {each for names in given for each in ([names] if isinstance(names, str) else names)}
            assert found == set(names_in(get_type_hints(method)["loss_type"])), name


@every_method
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_order_micro_batches_and_ranks_change_neither_value_nor_gradient(
    method: str, options: dict[str, Any], seed: int
) -> None:
    objective, rows = objective_of(method, options), random_rows(method, options, seed)
    whole = optimise(objective, rows)
    split = optimise(objective, rows, random_split(rows, objective.keep_groups, seed))
    assert split.value == pytest.approx(whole.value, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(split.gradient, whole.gradient, rtol=1e-9, atol=1e-12)
    for name, gradient in whole.extra_gradients.items():
        torch.testing.assert_close(split.extra_gradients[name], gradient, rtol=1e-9, atol=1e-12)
    assert split.metrics == pytest.approx(whole.metrics, rel=1e-9, abs=1e-12)
    assert split.metrics["loss"] == pytest.approx(whole.value, rel=1e-9, abs=1e-12)


HOLES = (True, True, False, False, True, False)  # of an episode: the model, what it was answered, the model


def with_holes(rows: Rows, seed: int) -> Rows:
    """Rows whose mask is 1 1 0 0 1 0 after the prompt, as often as that fits."""
    places = torch.cat([torch.arange(int(length)) for length in rows.micro.lengths])
    first = torch.randint(1, 3, (len(rows),), generator=torch.Generator().manual_seed(seed))
    since = places - first.repeat_interleave(rows.micro.lengths)
    mask = (since >= 0) & torch.tensor(HOLES)[since.clamp(min=0) % len(HOLES)]
    return replace(rows, micro=MicroBatch(rows.micro.lengths, {**rows.micro.columns, "mask": mask}))


def spoiled(rows: Rows, value: float) -> Rows:
    """The rows with that value in every number that the batch has of tokens that are not learned from, and with 0 where
    a forward pass computes nothing."""
    out = ~rows.micro["mask"]

    def where_out(values: Tensor, instead: float) -> Tensor:
        if not values.is_floating_point():
            return values
        return values.masked_fill(out.view(-1, *[1] * (values.dim() - 1)), instead)

    columns = {
        name: where_out(values, value) if COLUMNS[name].axis is Axis.TOKEN else values
        for name, values in rows.micro.columns.items()
    }
    said = rows.logps if rows.per_row else where_out(rows.logps, 0.0)
    extra = {name: where_out(values, 0.0) for name, values in rows.extra.items()}
    return Rows(MicroBatch(rows.micro.lengths, columns), said, extra, rows.per_row)


MASKED = [each for each in METHOD_OPTIONS if "mask" in objective_of(*each).columns]


@pytest.mark.parametrize(("method", "options"), MASKED, ids=[name_of(*each) for each in MASKED])
def test_what_a_batch_says_of_tokens_that_are_not_learned_from_never_matters_and_they_get_no_gradient(
    method: str, options: dict[str, Any]
) -> None:
    objective = objective_of(method, options)
    rows = with_holes(random_rows(method, options, seed=8), seed=9)
    clean = optimise(objective, spoiled(rows, 0.0))
    for value in (math.nan, 1e9, -1e9):
        found = optimise(objective, spoiled(rows, value))
        assert found.value == clean.value and math.isfinite(found.value) and found.metrics == clean.metrics
        torch.testing.assert_close(found.gradient, clean.gradient, rtol=0, atol=0)
        gradients = {**found.extra_gradients, "head": found.gradient}
        assert any(gradient.any() for gradient in gradients.values())
        for name, gradient in gradients.items():
            if not rows.per_row and "all_tokens" not in objective.needs:  # which asks for those as well
                assert not gradient[~rows.micro["mask"]].any(), name


def _gradient_is_the_slope(method: str, options: dict[str, Any]) -> bool:
    has_ratio = "updates_per_batch" in inspect.signature(METHODS[method]).parameters
    if method in (*SAMPLED_DISTILLATION, "nash_md"):  # whose log-ratio is a part of the reward, not of the loss
        return False
    if method in ("sdft", "sdpo") and options.get("importance_clip", 2.0):  # a ratio without gradient
        return False
    if has_ratio and options.get("updates_per_batch", 1) * options.get("minibatches", 1) == 1:
        return False  # it is 1 by a stop-gradient
    return not any(name in (*options.values(), *options) for name in STOPS_GRADIENT)


@pytest.mark.parametrize(
    ("method", "options"),
    [each for each in METHOD_OPTIONS if _gradient_is_the_slope(*each)],
    ids=[name_of(*each) for each in METHOD_OPTIONS if _gradient_is_the_slope(*each)],
)
def test_the_gradient_is_the_slope_of_the_value(method: str, options: dict[str, Any]) -> None:
    objective, rows = objective_of(method, options), random_rows(method, options, seed=11, groups=2)
    result = optimise(objective, rows)
    value = value_of(objective, rows, frozen=method in ("kto", "bco"))
    row_of = torch.arange(len(rows))
    row_of = row_of if rows.per_row else row_of.repeat_interleave(rows.micro.lengths)
    weights = torch.randn(len(rows.logps), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for row in range(len(rows)):  # all of a row's tokens at once, each by another amount: none can hide
        direction = weights * (row_of == row)
        slope = (value(rows.logps + 1e-6 * direction) - value(rows.logps - 1e-6 * direction)) / 2e-6
        assert slope == pytest.approx(float(result.gradient @ direction), rel=1e-4, abs=1e-7), f"row {row}"


DISTIL = [
    (name, options)
    for name, options in METHOD_OPTIONS
    if name in ("gkd", "on_policy_distillation", "gold") or (name in ("sdft", "sdpo") and options["teacher_top_k"])
]


@pytest.mark.parametrize(("method", "options"), DISTIL, ids=[name_of(*each) for each in DISTIL])
def test_the_gradient_of_logits_is_the_slope_of_the_value(method: str, options: dict[str, Any]) -> None:
    objective, rows = objective_of(method, options), random_rows(method, options, seed=11, groups=2)
    gradient = optimise(objective, rows).extra_gradients["logits"]
    assert gradient[rows.micro["mask"]].all() and not gradient[~rows.micro["mask"]].any()

    def value(logits: Tensor) -> float:
        return optimise(objective, replace(rows, extra={**rows.extra, "logits": logits})).value

    for token, entry in np.ndindex(*gradient.shape):
        nudge = torch.zeros_like(gradient)
        nudge[token, entry] = 1e-6
        slope = (value(rows.extra["logits"] + nudge) - value(rows.extra["logits"] - nudge)) / 2e-6
        assert slope == pytest.approx(float(gradient[token, entry]), rel=1e-4, abs=1e-7), f"token {token} {entry}"


def test_the_first_error_is_found_if_no_step_before_it_is_judged_wrong() -> None:
    """Rows of two steps, at their tokens 1 and 3; the last row has no label."""
    said = [[2.0, -1.0], [-3.0, -1.0], [1.0, 2.0], [1.0, -1.0], [5.0, 5.0]]
    label = [[1, 0], [1, 0], [1, 0], [1, 1], [-1, -1]]
    scalars, labels = (torch.tensor([[0.0, one, 0.0, two] for one, two in each]) for each in (said, label))
    labels = torch.where(torch.tensor([False, True, False, True]), labels, -1).to(torch.int8).flatten()
    micro = MicroBatch(torch.full((5,), 4), {"mask": torch.ones(20).bool(), "step_label": labels})
    found = optimise(objective_of("process_reward_model", {}), Rows(micro, scalars.flatten().double()))
    assert found.metrics["first_error"] == pytest.approx(1 / 4)  # only the first row's
    assert found.metrics["accuracy"] == pytest.approx(5 / 8)
    of_right, of_wrong = (torch.tensor(each).sigmoid().mean() for each in ([2.0, -3, 1, 1, -1], [-1.0, -1, 2]))
    assert found.metrics["mean_right"] == pytest.approx(float(of_right))
    assert found.metrics["mean_wrong"] == pytest.approx(float(of_wrong))
    assert not found.gradient.view(5, 4)[4].any() and found.gradient.view(5, 4)[:4, 1::2].all()


@pytest.mark.parametrize("gamma", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("normalized", [False, True])
def test_the_reverse_kl_of_a_sequence_has_the_returns_and_the_gradient_of_their_definition(
    gamma: float, normalized: bool
) -> None:
    """`-(R_t ∇ log π_t + ∇R_t)`, R the discounted sum over the rest of the row, in a loop."""
    options = {
        "single_step_decomposition": False,
        "gamma": gamma,
        **({"length_normalization": normalized} if gamma else {}),
    }
    rows = random_rows("minillm", options, seed=6)
    result, expected, value = optimise(objective_of("minillm", options), rows), torch.zeros_like(rows.logps), 0.0
    mask, gain = rows.micro["mask"], rows.micro["teacher_logps"] - rows.logps
    for start, stop in pairwise(rows.micro.offsets.tolist()):
        for token in filter(lambda token: mask[token], range(start, stop)):
            powers = {k: gamma ** (k - token) for k in range(token, stop) if mask[k]}
            whole = sum(powers.values()) if normalized else 1.0
            returned = sum(power * float(gain[k]) for k, power in powers.items()) / whole
            value -= returned
            expected[token] -= returned
            for k, power in powers.items():
                expected[k] += power / whole
    assert result.value == pytest.approx(value / int(mask.sum()))
    torch.testing.assert_close(result.gradient, expected / mask.sum())


def test_with_the_teachers_whole_distribution_over_the_wire_minillm_is_that_of_a_companion() -> None:
    """And it is not without the exact divergence of each step."""
    rows, options = random_rows("minillm", {}, seed=8), {"teacher_top_k": VOCABULARY}
    teacher = rows.extra["companion_logits"].log_softmax(-1)
    logps, ids = teacher.topk(VOCABULARY)
    said = {
        "teacher_topk_ids": ids,
        "teacher_topk_logps": logps,
        "teacher_tail_logps": torch.full_like(rows.logps[:, None], -torch.inf),
    }
    said["teacher_logps"] = teacher.gather(-1, rows.micro["tokens"][:, None]).squeeze(-1)
    apart = replace(rows, micro=MicroBatch(rows.micro.lengths, {**rows.micro.columns, **said}))
    beside, wire = optimise(objective_of("minillm", {}), rows), optimise(objective_of("minillm", options), apart)
    alone = optimise(objective_of("minillm", {"single_step_decomposition": False}), apart)
    assert beside.value == pytest.approx(wire.value) and alone.value < beside.value - 0.01
    torch.testing.assert_close(beside.gradient, wire.gradient)
    torch.testing.assert_close(beside.extra_gradients["logits"], wire.extra_gradients["logits"])


def value_of(objective: LossObjective, rows: Rows, *, frozen: bool) -> Callable[[Tensor], float]:
    """The loss as a function of log-probabilities. `frozen`: statistics stay what they are at `rows`, as they carry no
    gradient."""
    if not frozen:
        return lambda logps: optimise(objective, replace(rows, logps=logps)).value
    split = [[range(len(rows))]]
    (statistics,) = statistics_of(objective, seen_by_statistics(objective, rows, split), [{}])

    def value(logps: Tensor) -> float:
        (((learned,),)) = learned_from(objective, replace(rows, logps=logps), split)
        outputs, counts = Outputs(learned.logps, learned.extra), objective.counts(learned.micro)
        return float(objective.loss(learned.micro, outputs, counts, statistics)[0])

    return value


@every_method
def test_a_loss_reads_every_column_that_it_declares(method: str, options: dict[str, Any]) -> None:
    objective, rows = objective_of(method, options), random_rows(method, options, seed=3)
    for name in objective.columns - {"group"} if not objective.keep_groups else objective.columns:
        columns = {key: values for key, values in rows.micro.columns.items() if key != name}
        with pytest.raises(KeyError):
            optimise(objective, replace(rows, micro=MicroBatch(rows.micro.lengths, columns)))


@every_method
def test_an_objective_survives_pickling(method: str, options: dict[str, Any]) -> None:
    objective, rows = objective_of(method, options), random_rows(method, options, seed=5)
    copy = pickle.loads(pickle.dumps(objective))
    for name in ("columns", "needs", "keep_groups", "coupled", "statistics_rows"):
        assert getattr(copy, name) == getattr(objective, name)
    assert optimise(copy, rows).value == optimise(objective, rows).value


@every_method
def test_values_stay_in_float32_when_the_model_is_in_float32(method: str, options: dict[str, Any]) -> None:
    objective, rows = objective_of(method, options), random_rows(method, options, seed=7)

    def single(values: Tensor) -> Tensor:
        return values.float() if values.is_floating_point() else values

    columns = {name: single(values) for name, values in rows.micro.columns.items()}
    extra = {name: single(values) for name, values in rows.extra.items()}
    micro = MicroBatch(rows.micro.lengths, columns)
    found = optimise(objective, Rows(micro, single(rows.logps), extra, rows.per_row))
    assert found.gradient.dtype is torch.float32
    assert found.value == pytest.approx(optimise(objective, rows).value, rel=1e-4, abs=1e-5)
