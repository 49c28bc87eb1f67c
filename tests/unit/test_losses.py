"""What every loss guarantees, whichever method it serves: its gradient is that of its value, and neither the order of
the rows nor the way they are split into micro-batches and ranks changes either. Values come from `tests/golden`."""

from __future__ import annotations

import inspect
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.columns import COLUMNS, Axis, Head
from actors.errors import ConfigError
from actors.objective import MicroBatch, Outputs
from orchestrator.losses.declare import Loss, Sum, Term, columns_of, is_on, reads
from orchestrator.losses.likelihood import nll
from orchestrator.losses.objective import LossObjective
from orchestrator.losses.policy_gradient import kl_of_samples, policy_gradient
from orchestrator.losses.reduce import item_mean, row_mean_of_token_means, token_mean, token_sum_over
from orchestrator.losses.surrogates import clipped
from orchestrator.losses.views import PolicyTokens, Tokens
from orchestrator.losses.views import require as field
from orchestrator.methods import METHODS, build
from orchestrator.pipeline import Pipeline
from tests.unit.trainer_stub import Result, Rows, Split, learned_from, optimise, seen_by_statistics, statistics_of

WEIGHTED = {"correction": "token_truncate", "top_entropy_quantile": 0.5, "off_policy_mask_threshold": 0.1, "beta": 0.1}

VOCABULARY = 5  # of logits that are made up

METHOD_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("sft", {}),
    ("sft", {"label_smoothing": 0.1, "token_metrics": True}),
    ("sft", {"loss_type": "dft"}),
    *[("dpo", {"loss_type": name}) for name in ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot")],
    *[("dpo", {"loss_type": name}) for name in ("apo_zero", "apo_down", "discopop", "sigmoid_norm", "aot_unpaired")],
    *[
        ("dpo", {"loss_type": name, "label_smoothing": 0.1})
        for name in ("sigmoid", "robust", "exo_pair", "aot_unpaired")
    ],
    *[("dpo", {"f_divergence_type": name}) for name in ("forward_kl", "js_divergence", "alpha_divergence")],
    ("dpo", {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "token_metrics": True}),
    ("dpo", {"use_weighting": True}),
    ("dpo", {"ld_alpha": 0.3}),
    ("dpo", {"loss_type": "sft"}),
    ("cpo", {}),
    ("cpo", {"loss_type": "sigmoid", "label_smoothing": 0.1}),
    ("cpo", {"loss_type": "ipo"}),
    ("cpo", {"loss_type": "hinge", "cpo_alpha": 0.0}),
    ("simpo", {"label_smoothing": 0.1}),
    ("alphapo", {}),
    ("orpo", {}),
    ("tpo", {}),
    *[("tpo", {"loss_type": name}) for name in ("hinge", "ipo", "tpo-l")],
    ("kto", {"undesirable_weight": 1.5}),
    ("kto", {"loss_type": "apo_zero_unpaired"}),
    ("bco", {}),
    ("bco", {"density_ratio": True}),
    ("reward_model", {}),
    ("reward_model", {"use_margin": True, "center_rewards_coefficient": 0.1}),
    ("process_reward_model", {}),
    *[("online_dpo", {"loss_type": name, "token_metrics": name == "ipo"}) for name in ("sigmoid", "ipo")],
    ("gkd", {}),
    ("gkd", {"lmbda": 0.0, "beta": 0.0, "temperature": 2.0}),
    *[("gkd", {"teacher_top_k": 3, "beta": beta, "temperature": 0.7}) for beta in (0.0, 0.4, 1.0)],
    ("on_policy_distillation", {"token_metrics": True}),
    ("on_policy_distillation", {"teacher_top_k": 3, "beta": 0.4}),
    ("iw_opd", {}),
    ("minillm", {}),
    ("minillm", {"gamma": 0.9, "teacher_top_k": 3}),
    ("minillm", {"gamma": 0.5, "length_normalization": False, "single_step_decomposition": False}),
    ("gold", {"teacher_top_k": 3}),
    ("gold", {"teacher_top_k": 3, "shared_weight": 0.4}),
    ("gold", {"teacher_top_k": 3, "shared_weight": 1.0, "beta": 0.0}),
    ("sdft", {"teacher_top_k": 3}),
    ("sdft", {"teacher_top_k": 3, "beta": 1.0, "importance_clip": None}),
    ("sdft", {"teacher_top_k": None}),
    ("sdpo", {"teacher_top_k": 3}),
    *[("grpo", {"loss_type": name}) for name in ("grpo", "dapo", "luspo", "sapo", "vespo", "dppo")],
    *[("grpo", {"loss_type": name, "updates_per_batch": 2, **WEIGHTED}) for name in ("grpo", "bnpo", "gmpo")],
    ("grpo", {"loss_type": "cispo", "epsilon_high": 1.2, "updates_per_batch": 2}),
    ("grpo", {"loss_type": "dr_grpo", "max_completion_length": 16, "delta": 1.3, "minibatches": 2}),
    ("grpo", {"importance_sampling_level": "sequence", "updates_per_batch": 2, "correction": "sequence_mask"}),
    ("grpo", {"importance_sampling_level": "sequence_token", "updates_per_batch": 2, "entropy_coef": 0.1}),
    *[("grpo", {"updates_per_batch": 2, "beta": 0.1, "kl_estimator": name}) for name in ("k1", "k2")],
    ("grpo", {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 2.0, "updates_per_batch": 2}),
    ("grpo", {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 2.0, "top_entropy_quantile": 0.5}),
    *[("gfpo", {"loss_type": name, "updates_per_batch": 2}) for name in ("grpo", "bnpo", "dapo")],
    ("gfpo", {"loss_type": "dr_grpo", "max_completion_length": 16, "minibatches": 2}),
    *[("xpo", {"loss_type": name, "alpha": 0.3, "token_metrics": name == "ipo"}) for name in ("sigmoid", "ipo")],
    ("a2po", {"beta2": 0.2, "token_metrics": True}),
    ("sppo", {"beta": 0.2, "token_metrics": True}),
    ("nash_md", {"beta": 0.2, "token_metrics": True}),
    ("rloo", {}),
    ("rloo", {"updates_per_batch": 2, "epsilon": 0.9, "correction": "sequence_truncate", "token_metrics": True}),
    ("reinforce_pp", {"updates_per_batch": 2}),
    ("reinforce_pp_baseline", {"minibatches": 2, "beta": 0.3}),
    ("ppo", {"token_metrics": True}),  # of the policy; the value's: tests/unit/test_returns.py
]

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
            assert found == set(_names_in(get_type_hints(method)["loss_type"])), name


def _names_in(annotation: Any) -> Iterator[str]:
    """The names of all `Literal`s in an annotation."""
    for part in get_args(annotation):
        if isinstance(part, str):
            yield part
        else:
            yield from _names_in(part)


def name_of(method: str, options: dict[str, Any]) -> str:
    return " ".join([method, *(f"{key}={value}" for key, value in options.items())])


def objective_of(method: str, options: dict[str, Any]) -> LossObjective:
    stage = build(method, options).updates[0]
    assert stage.call is not None
    return LossObjective(stage.call, stage.options["reduce"], stage.options["loss_options"])


every_method = pytest.mark.parametrize(
    ("method", "options"), METHOD_OPTIONS, ids=[name_of(*each) for each in METHOD_OPTIONS]
)


def random_rows(method: str, options: dict[str, Any], seed: int, groups: int = 5) -> Rows:
    """Rows of the kind of data that the method takes, with the columns and extras that its loss declares, and no
    other."""
    objective, size = objective_of(method, options), rows_per_group(build(method, options))
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 8, (groups * size,), generator=rng)
    everything = _columns(lengths, size, rng)
    per_row = objective.head is Head.ROW_SCALAR
    said = torch.randn(len(lengths), generator=rng, dtype=torch.float64)
    logps = said if per_row else _masked_rows_start(lengths, -_positive(lengths, rng))
    extras = {name: _positive(lengths, rng) for name in objective.needs - {"all_tokens", "entropy_grad"}}
    if objective.of_logits is not None:
        extras["logits"] = _logits(lengths, rng)
        if objective.of_logits.companion:
            extras["companion_logits"] = _logits(lengths, rng)
    return Rows(MicroBatch(lengths, {name: everything[name] for name in objective.columns}), logps, extras, per_row)


def rows_per_group(pipeline: Pipeline) -> int:
    """As many as the pipeline makes of an item; of samples, four do."""
    return min(pipeline.rows_per_item, 4)


def _columns(lengths: Tensor, size: int, rng: torch.Generator) -> dict[str, Tensor]:
    rows = torch.arange(len(lengths))
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)[:-1]])
    position = torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths)
    prompt = torch.randint(1, 3, (len(lengths),), generator=rng)
    member = rows % size
    advantages = torch.randn(len(lengths), generator=rng, dtype=torch.float64)
    names = ("old_logps", "sample_logps", "ref_logps", "teacher_logps")
    columns = {name: -_positive(lengths, rng) for name in names}
    return columns | {
        "tokens": torch.randint(0, VOCABULARY, (int(lengths.sum()),), generator=rng),
        "mask": position >= prompt.repeat_interleave(lengths),
        "group": 7 * (rows // size) + 3,  # numbers need not be dense
        "advantages": advantages.repeat_interleave(lengths),
        "values": -columns["old_logps"],
        "returns": -columns["ref_logps"],
        "preferred": member == 0,
        "step_label": (torch.randint(0, 3, (int(lengths.sum()),), generator=rng) - 1).to(torch.int8),
        "sampler": (member > 0).to(torch.int8),
        "optimal_value": torch.rand(len(lengths), generator=rng, dtype=torch.float64),
        "preference": torch.rand(len(lengths), generator=rng, dtype=torch.float64),
        "imitated": member == 2,
        "mismatched": member == 1,
        "label": (rows // size) % 2 == 0,
        "margin": (rows // size % 3).double() / 3,
        "reward": torch.where(member == 0, 1.0, -0.5).double() + rows,
        "truncated": rows % 3 == 0,
        "weight": 0.5 + torch.rand(len(lengths), generator=rng, dtype=torch.float64),
        **_top_k(_logits(lengths, rng).log_softmax(-1)),
    }


def _logits(lengths: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(int(lengths.sum()), VOCABULARY, generator=rng, dtype=torch.float64)


def _top_k(log_probs: Tensor) -> dict[str, Tensor]:
    """What a teacher would say of its three most likely tokens."""
    logps, ids = log_probs.topk(3)
    tail = torch.log1p(-logps.exp().sum(-1, keepdim=True))
    return {"teacher_topk_ids": ids.int(), "teacher_topk_logps": logps, "teacher_tail_logps": tail}


def _positive(lengths: Tensor, rng: torch.Generator) -> Tensor:
    return 0.05 + 1.5 * torch.rand(int(lengths.sum()), generator=rng, dtype=torch.float64)


def _masked_rows_start(lengths: Tensor, values: Tensor) -> Tensor:
    values[torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)[:-1]])] = 0.0
    return values


def random_split(rows: Rows, keep_groups: bool, seed: int) -> Split:
    """Items in random order to one to three ranks of one to three micro-batches; some of them may be empty."""
    rng = np.random.default_rng(seed)
    items = [[row] for row in range(len(rows))]
    if keep_groups:
        groups = rows.micro["group"].tolist()
        items = [[row for row in range(len(rows)) if groups[row] == group] for group in dict.fromkeys(groups)]
    ranks, micros = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    split: list[list[list[int]]] = [[[] for _ in range(micros)] for _ in range(ranks)]
    for item in rng.permutation(len(items)):
        split[rng.integers(ranks)][rng.integers(micros)].extend(rng.permutation(items[item]).tolist())
    return split


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


# What a loss declares


@reads("ref_logps", beta=is_on)
@reads("old_logps", old="recorded")
def example(tokens: PolicyTokens, *, beta: float = 0.1, old: str = "current") -> Loss:
    return tokens.logps if not beta else field(tokens.ref_logps), {}


def test_conditional_reads_follow_the_options_and_their_defaults() -> None:
    assert columns_of(example, {}) == {"advantages", "mask", "ref_logps"}
    assert columns_of(example, {"beta": 0.0}) == {"advantages", "mask"}
    assert columns_of(example, {"beta": 0.0, "old": "recorded"}) == {"advantages", "mask", "old_logps"}


def test_needs_name_what_the_forward_pass_must_compute() -> None:
    assert LossObjective(nll, token_mean, {}).needs == frozenset()
    assert LossObjective(nll, token_mean, {"token_metrics": True}).needs == {"entropy", "is_top1"}
    assert LossObjective(nll, token_mean, {"label_smoothing": 0.1}).needs == {"mean_logps"}


def test_an_unknown_option_of_a_loss_is_refused_when_the_pipeline_is_built() -> None:
    with pytest.raises(ConfigError, match="unexpected keyword argument 'smoothing'"):
        columns_of(nll, {"smoothing": 0.1})


def test_a_loss_cannot_read_a_column_that_it_does_not_declare() -> None:
    rows = random_rows("grpo", {"beta": 0.1}, seed=1)
    view = PolicyTokens.of(rows.micro, Outputs(rows.logps), frozenset({"mask", "advantages"}), {})
    assert "ref_logps" in rows.micro
    assert view.ref_logps is None
    with pytest.raises(TypeError, match="does not declare"):
        field(view.ref_logps)


def test_a_sum_weights_its_terms_and_leaves_out_those_of_weight_zero() -> None:
    rows = random_rows("sft", {}, seed=2)
    single = optimise(LossObjective(nll, token_mean, {}), rows).value
    both = Sum(Term(nll, token_mean, 0.5), Term(nll, row_mean_of_token_means, 0.25), Term(nll, token_mean, 0.0))
    assert len(both.terms) == 2
    by_row = optimise(LossObjective(nll, row_mean_of_token_means, {}), rows).value
    assert optimise(LossObjective(both, None, {}), rows).value == pytest.approx(0.5 * single + 0.25 * by_row)


def test_a_sum_with_a_reduction_beside_it_and_a_loss_without_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="their own reductions"):
        LossObjective(Sum(Term(nll, token_mean)), token_mean, {})
    with pytest.raises(ConfigError, match="nll needs a reduction"):
        LossObjective(nll, None, {})


# Reductions


def two_rows() -> Tokens:
    micro = MicroBatch(torch.tensor([3, 5]), {})
    mask = torch.tensor([0, 1, 1, 0, 0, 1, 0, 0]).bool()
    return Tokens(micro=micro, logps=torch.zeros(8), mask=mask, shared={})


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        (token_mean, (2 + 4 + 9) / 3),
        (row_mean_of_token_means, (3 + 9) / 2),
        (token_sum_over(10), (2 + 4 + 9) / 20),
    ],
    ids=["token_mean", "row_mean_of_token_means", "token_sum_over"],
)
def test_a_reduction_divides_by_its_documented_count(reduce: Any, expected: float) -> None:
    view, values = two_rows(), torch.tensor([100.0, 2, 4, 100, 100, 9, 100, 100])
    micro = MicroBatch(view.micro.lengths, {"mask": view.mask})
    assert float(reduce(values, view, reduce.count(Tokens, micro))) == pytest.approx(expected)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "luspo", "sapo", "gmpo", "bnpo"])
def test_a_row_without_trained_tokens_has_no_weight(loss_type: str) -> None:
    options: dict[str, Any] = {"loss_type": loss_type, "updates_per_batch": 2}
    options |= {"max_completion_length": 8} if loss_type == "dr_grpo" else {}
    rows = random_rows("grpo", options, seed=12)
    left_out = rows.micro.per_token(torch.arange(len(rows)) % 4 == 1)
    columns = {**rows.micro.columns, "mask": rows.micro["mask"] & ~left_out}
    masked = replace(rows, micro=MicroBatch(rows.micro.lengths, columns))
    others = [row for row in range(len(rows)) if row % 4 != 1]
    objective = objective_of("grpo", options)
    found, without = optimise(objective, masked), optimise(objective, rows.select(others))
    assert found.value == pytest.approx(without.value) and found.value != 0
    torch.testing.assert_close(found.gradient[~left_out], without.gradient)


def test_a_fully_masked_batch_has_loss_zero_and_gradient_zero() -> None:
    rows = random_rows("grpo", {}, seed=4)
    micro = MicroBatch(rows.micro.lengths, {**rows.micro.columns, "mask": torch.zeros_like(rows.micro["mask"])})
    result = optimise(objective_of("grpo", {}), Rows(micro, rows.logps))
    assert result.value == 0.0
    assert not result.gradient.any()


def test_row_and_pair_means_count_items() -> None:
    rows = random_rows("dpo", {}, seed=6)
    objective = objective_of("dpo", {})
    assert item_mean.count(objective.terms[0].view, rows.micro) == len(rows) / 2


# Policy gradients


def test_with_one_update_the_gradient_is_the_policy_gradient() -> None:
    rows = random_rows("grpo", {"loss_type": "dapo"}, seed=8)
    result = optimise(objective_of("grpo", {"loss_type": "dapo"}), rows)
    mask, advantages = rows.micro["mask"], rows.micro["advantages"]
    torch.testing.assert_close(result.gradient, -advantages * mask / mask.sum())


def test_tokens_that_the_sampler_reports_as_nan_are_not_corrected() -> None:
    rows = random_rows("grpo", {"correction": "token_truncate"}, seed=9)
    sample = rows.micro["sample_logps"].clone()
    sample[::2] = torch.nan
    micro = MicroBatch(rows.micro.lengths, {**rows.micro.columns, "sample_logps": sample})
    result = optimise(objective_of("grpo", {"correction": "token_truncate"}), Rows(micro, rows.logps))
    plain = -(rows.micro["advantages"] * rows.micro["mask"] / rows.micro["mask"].sum())
    assert torch.isfinite(result.gradient).all()
    torch.testing.assert_close(result.gradient[::2], plain[::2])


def test_the_ratio_of_a_whole_completion_is_the_product_of_its_tokens_ratios() -> None:
    rows = random_rows("rloo", {"updates_per_batch": 2}, seed=13)
    mask, advantages = rows.micro["mask"], rows.micro["advantages"]
    ratio = rows.micro.sum_by_row((rows.logps - rows.micro["old_logps"]) * mask).exp()
    of_row = advantages[rows.micro.offsets[:-1]]
    expected = -torch.minimum(ratio * of_row, ratio.clamp(0.8, 1.2) * of_row).mean()
    assert optimise(objective_of("rloo", {"updates_per_batch": 2}), rows).value == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [("k1", 0.5, 1.0), ("k2", 0.125, 0.5), ("k3", np.exp(-0.5) - 0.5, 1 - np.exp(-0.5))],
)
def test_an_estimate_of_the_kl_and_its_slope_are_what_its_formula_says(
    estimator: Any, value: float, slope: float
) -> None:
    logps = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    found = kl_of_samples(logps, torch.tensor([-1.5], dtype=torch.float64), estimator)
    found.sum().backward()
    assert float(found.detach()) == pytest.approx(value)
    assert logps.grad is not None and float(logps.grad) == pytest.approx(slope)


def test_clip_metrics_count_the_tokens_that_were_clipped() -> None:
    lengths = torch.tensor([5])
    log_ratio = torch.tensor([0.0, 0.5, -0.5, 0.5, -0.5], dtype=torch.float64)
    columns = {
        "mask": torch.tensor([0, 1, 1, 1, 1]).bool(),
        "advantages": torch.tensor([1.0, 1, -1, -1, 1], dtype=torch.float64),
        "old_logps": torch.zeros(5, dtype=torch.float64),
    }
    options = {"surrogate": partial(clipped, epsilon=0.2, delta=1.1), "old": "recorded"}
    metrics = optimise(
        LossObjective(policy_gradient, token_mean, options), Rows(MicroBatch(lengths, columns), log_ratio)
    ).metrics
    assert metrics["clip_ratio/high_mean"] == 0.25  # δ below 1 + ε hides none of them
    assert metrics["clip_ratio/low_mean"] == 0.25
    assert metrics["clip_ratio/region_mean"] == 0.5


def test_the_entropy_bonus_is_the_mean_over_the_tokens_that_the_entropy_quantile_keeps() -> None:
    lengths = torch.tensor([4, 3])
    columns = {
        "mask": torch.tensor([0, 1, 1, 1, 0, 1, 1]).bool(),
        "advantages": torch.zeros(7, dtype=torch.float64),
    }
    entropy = torch.tensor([9.0, 0.1, 0.5, 2.0, 9.0, 0.2, 1.0], dtype=torch.float64)
    rows = Rows(MicroBatch(lengths, columns), torch.zeros(7, dtype=torch.float64), {"entropy": entropy})
    objective = objective_of("grpo", {"entropy_coef": 0.1, "top_entropy_quantile": 0.5})
    whole = optimise(objective, rows)  # the quantile is 0.5: three of five reach it
    assert whole.value == pytest.approx(-0.1 * (0.5 + 2.0 + 1.0) / 3)
    expected = torch.tensor([0, 0, 1, 1, 0, 0, 1]) * (-0.1 / 3)
    torch.testing.assert_close(whole.extra_gradients["entropy"], expected.double())
    assert optimise(objective, rows, [[[0]], [[1]]]).value == pytest.approx(whole.value)


def test_an_adaptive_entropy_bonus_acts_below_its_target_alone_and_its_coefficient_is_kept_and_bounded() -> None:
    options: dict[str, Any] = {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_coef_delta": 0.03}
    objective = objective_of("grpo", {**options, "entropy_target": 1.0, "entropy_coef_max": 0.12})
    rows = random_rows("grpo", {**options, "entropy_target": 1.0}, seed=14)
    mask, states = rows.micro["mask"], [{}]

    def at(entropy: float) -> Result:
        return optimise(
            objective, replace(rows, extra={"entropy": torch.full_like(rows.logps, entropy)}), states=states
        )

    plain = optimise(objective_of("grpo", {}), Rows(rows.micro, rows.logps)).value
    low = at(0.5)
    assert low.metrics["entropy_coef"] == pytest.approx(0.1)
    assert low.value - plain == pytest.approx(-0.1 * 0.5)
    torch.testing.assert_close(low.extra_gradients["entropy"], -0.1 * mask.double() / mask.sum())
    high = at(1.5)
    assert (high.metrics["entropy_coef"], high.value) == (0.0, pytest.approx(plain))
    assert not high.extra_gradients["entropy"].any()
    assert at(0.5).metrics["entropy_coef"] == pytest.approx(0.12 - 0.03)  # up to its bound, then down
    assert states[0]["1"]["coefficient"] == pytest.approx(0.12)


# Statistics over the whole batch


def test_the_running_mean_of_bco_continues_from_its_state_and_counts_each_row_once() -> None:
    objective, state = objective_of("bco", {"beta": 1.0}), [{}]
    first, second = (random_rows("bco", {}, seed=seed) for seed in (1, 2))
    optimise(objective, first, states=state)
    delta = optimise(objective, second, states=state).metrics["delta"]
    sums = [row_log_ratios(rows) for rows in (first, second)]
    assert delta == pytest.approx(float(torch.cat(sums).mean()))
    assert state[0]["0"]["count"] == len(first) + len(second)


def row_log_ratios(rows: Rows) -> Tensor:
    return rows.micro.sum_by_row((rows.logps - rows.micro["ref_logps"]) * rows.micro["mask"])


def test_the_kl_estimate_of_kto_is_clamped_after_averaging_over_everything() -> None:
    rows = random_rows("kto", {}, seed=1)
    low = MicroBatch(rows.micro.lengths, {**rows.micro.columns, "ref_logps": torch.zeros_like(rows.logps)})
    assert optimise(objective_of("kto", {}), Rows(low, rows.logps)).metrics["kl"] == 0.0
    high = MicroBatch(rows.micro.lengths, {**rows.micro.columns, "ref_logps": 5 * rows.logps})
    ratios = row_log_ratios(Rows(high, rows.logps))[rows.micro["mismatched"]]
    found = optimise(objective_of("kto", {}), Rows(high, rows.logps)).metrics["kl"]
    assert found == pytest.approx(float(ratios.mean()))


def test_losses_whose_statistics_are_over_different_rows_are_not_summed() -> None:
    kto, bco = (objective_of(name, {}).terms[0] for name in ("kto", "bco"))
    with pytest.raises(ConfigError, match=r"different rows \(all rows, mismatched\)"):
        LossObjective(Sum(kto, bco), None, {})


def test_mismatched_rows_move_the_estimate_and_have_no_gradient() -> None:
    rows = random_rows("kto", {}, seed=1)
    mismatched = rows.micro.per_token(rows.micro["mismatched"])
    nearer = Rows(rows.micro, torch.where(mismatched, 0.1 * rows.logps, rows.logps))
    found, moved = (optimise(objective_of("kto", {}), each) for each in (rows, nearer))
    assert moved.metrics["kl"] > found.metrics["kl"]
    assert moved.value != pytest.approx(found.value, rel=1e-6)
    gradient = found.gradient
    assert not gradient[mismatched].any()
    assert gradient[~mismatched & rows.micro["mask"]].all()


def test_the_loss_of_self_play_with_hard_win_rates_is_half_of_sppo_hard_of_pairs() -> None:
    """On the same pairs: chosen rows are preferred with probability 1, rejected ones with 0."""
    pairs = random_rows("dpo", {"loss_type": "sppo_hard", "beta": 0.3}, seed=3)
    columns = {**pairs.micro.columns, "preference": pairs.micro["preferred"].to(torch.float32)}
    columns |= {"reward": torch.zeros(len(pairs.micro))}
    rows = replace(pairs, micro=MicroBatch(pairs.micro.lengths, columns))
    of_pairs = optimise(objective_of("dpo", {"loss_type": "sppo_hard", "beta": 0.3}), pairs)
    of_rows = optimise(objective_of("sppo", {"win_rates": "hard", "beta": 0.3}), rows)
    assert of_rows.value == pytest.approx(of_pairs.value / 2, rel=1e-6) and of_pairs.value > 1
    assert torch.allclose(of_rows.gradient, of_pairs.gradient / 2)
