"""Every option of every method: set to another value, it changes what is learned, or is refused, or warned of.

What is compared is what a pipeline does on given rows, not how it is written down: the stages, what credit stages
write, and value, gradient and metrics of the loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch

from actors.backends.single import SoloWorld
from actors.batch import Batch
from actors.columns import Head
from actors.errors import ConfigError
from actors.objective import DIVERGENCE, MicroBatch
from orchestrator.batches.row_table import RowTable
from orchestrator.losses.declare import EXTRAS
from orchestrator.losses.objective import LossObjective
from orchestrator.methods import METHODS, build
from orchestrator.pipeline import Pipeline, Stage, Verb
from tests.unit.loss_rows import masked_rows_start, names_in, positive, random_columns, rows_per_group
from tests.unit.trainer_stub import Rows, optimise

FACTS = {"max_completion_length": 16}
OTHER_VALUE: dict[str, Any] = {  # of every option, besides `loss_type`, whose names are all tried
    "accepted_count": 4,
    "alpha": 0.5,
    "best_count": 2,
    "beta": 0.37,
    "beta1": 0.9,
    "beta2": 0.2,
    "cliprange": 0.03,
    "cliprange_value": 0.03,
    "correction": "token_truncate",
    "correction_max": 1.2,
    "correction_min": 0.9,
    "center_rewards_coefficient": 0.1,
    "cpo_alpha": 0.7,
    "delta": 1.1,
    "density_ratio": True,
    "desirable_weight": 0.3,
    "discopop_tau": 0.7,
    "dppo_distance": "binary_kl",
    "dppo_threshold": 0.02,
    "drop_truncated": True,
    "dynamic_sampling": True,
    "entropy_coef": 0.3,
    "entropy_coef_delta": 0.05,
    "entropy_coef_max": 0.302,
    "entropy_coef_min": 0.299,
    "entropy_target": 0.1,
    "epsilon": 0.05,
    "epsilon_high": 0.9,
    "f_alpha_divergence_coef": 0.9,
    "f_divergence_type": "js_divergence",
    "filter_all_incorrect": False,
    "gamma": 0.7,
    "importance_clip": 1.1,
    "group_filter": "reward_per_token",
    "importance_sampling_level": "sequence",
    "keep": "best",
    "kl_coef": 0.3,
    "kl_estimator": "k3",
    "kl_horizon": 50,
    "kl_target": 0.2,
    "length_normalization": False,
    "lmbda": 0.0,
    "label_smoothing": 0.2,
    "lam": 0.3,
    "ld_alpha": 0.3,
    "loss_weights": (0.4,),
    "mask_truncated_completions": True,
    "max_completion_length": 99,
    "minibatches": 3,
    "missing_eos_penalty": 0.6,
    "mixture_coef": (0.3, 0.2),
    "multi_objective_aggregation": "normalize_then_sum",
    "normalize_advantages": True,
    "num_generations": 6,
    "num_mini_batches": 3,
    "num_remains_in_group": 2,
    "num_ppo_epochs": 2,
    "num_value_samples": 3,
    "off_policy_mask_threshold": -0.2,
    "precompute_ref_log_probs": True,
    "ref_model_mixup_alpha": 0.2,
    "ref_model_sync_steps": 7,
    "rejected": "advantage_0",
    "rejection_beta": 9.0,
    "replay_buffer_size": 9,
    "replay_max_age": 7,
    "reward_clip_range": (-0.3, 0.8),
    "sapo_temperature_neg": 2.0,
    "sapo_temperature_pos": 2.0,
    "scale_rewards": "none",
    "scored": False,
    "seq_kd": True,
    "shared_weight": 0.4,
    "simpo_gamma": 0.8,
    "single_step_decomposition": False,
    "step_separator": ";",
    "success_threshold": 2.0,
    "supervision": "process",
    "sync_ref_model": True,
    "ties": "keep",
    "temperature": 0.7,
    "threshold": 0.9,
    "teacher": "live",
    "teacher_template": "{prompt} {hint} {demonstration}",
    "teacher_top_k": 2,
    "teacher_update_rate": 0.2,
    "teacher_weights": (0.3, 0.7),
    "teachers": ("tutor",),
    "token_metrics": True,
    "top_entropy_quantile": 0.4,
    "tpo_alpha": 0.2,
    "tpo_l_gamma": 0.9,
    "train_on_last_step_only": True,
    "undesirable_weight": 0.3,
    "updates_per_batch": 3,
    "use_adaptive_entropy": True,
    "use_bias_correction_kl": False,
    "use_margin": True,
    "use_weighting": True,
    "whiten_advantages": False,
    "whiten_rewards": True,
    "win_rates": "hard",
}
OTHER_VALUE_OF: dict[str, dict[str, Any]] = {  # where that is the default, or out of range
    "gfpo": {"num_generations": 20},
    "sdft": {"teacher_template": "{prompt} {hint}"},
    "grpo": {"kl_estimator": "k2"},
}
NEEDED: dict[str, dict[str, Any]] = {  # beside a loss: what it requires, or what tells it from another
    "cispo": {"epsilon_high": 1.5},
    "exo_pair": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.1},
    "dppo": {"dppo_threshold": 0.1},
}
BESIDE: dict[str, list[dict[str, Any]]] = {  # what else is set: the first beside every loss, the rest beside one
    "dpo": [{}, {"sync_ref_model": True}, {"f_divergence_type": "alpha_divergence"}],
    "kto": [{}, {"sync_ref_model": True}],
    "bco": [{}, {"sync_ref_model": True}],
    "grpo": [
        {"updates_per_batch": 2, "beta": 0.2},
        {},
        {"minibatches": 2, "correction": "token_mask"},
        {"use_adaptive_entropy": True, "entropy_coef": 0.3, "entropy_target": 3.0},
        {"replay_buffer_size": 5},
        {"supervision": "process"},
    ],
    "gfpo": [
        {"updates_per_batch": 2, "num_remains_in_group": 3},
        {"correction": "token_mask", "rejected": "advantage_0", "num_remains_in_group": 3},
    ],
    "generate_data": [
        {},
        {"keep": "all", "scored": False},
        {"keep": "best", "num_generations": 3},
        {"keep": "accepted", "threshold": 0.4},
        {"keep": "labelled", "threshold": 0.4},
        {"keep": "best_and_worst", "num_generations": 2},
        {"keep": "statistical_rejection", "num_generations": 8, "accepted_count": 6},
        {"keep": "data_and_samples"},
        {"keep": "data"},
        {"keep": "last_turn"},
        {"keep": "last_turn_over_first"},
    ],
    "gkd": [{}, {"lmbda": 0.0}, {"lmbda": 0.3}, {"teachers": ("a", "b"), "teacher_top_k": 3}],
    "on_policy_distillation": [{}, {"teachers": ("a", "b"), "teacher_top_k": 3}],
    "minillm": [{}, {"gamma": 0.3}],
    "gold": [{}, {"shared_weight": 0.7}],
    "sdft": [{}, {"teacher_top_k": None}],
    "sdpo": [{}, {"teacher_top_k": None}],
    **{name: [{"updates_per_batch": 2}, {"correction": "token_mask"}] for name in ("rloo", "reinforce_pp")},
    "reinforce_pp_baseline": [{"updates_per_batch": 2}, {"correction": "token_mask"}, {"supervision": "process"}],
    "ppo": [{}, {"kl_target": 0.1}, {"kl_coef": 0.0}],
}


def with_each_loss(method: str) -> list[dict[str, Any]]:
    first = BESIDE.get(method, [{}])[0]
    names = dict.fromkeys(names_in(get_type_hints(METHODS[method]).get("loss_type")))
    return [{**NEEDED.get(name, {}), **first, "loss_type": name} for name in names] or [first]


def made(method: str, options: dict[str, Any]) -> Pipeline | None:
    """None if it is refused."""
    try:
        return build(method, options, FACTS)
    except ConfigError:
        return None


def behaviour(pipeline: Pipeline) -> list[Any]:
    """What the pipeline does, on rows that hold everything that any loss reads."""
    did: list[Any] = [pipeline.data]
    for stage in pipeline:
        did.append((stage.name, stage.precomputed, stage.share, stage.only))
        if stage.verb in (Verb.GENERATE, Verb.MIX, Verb.REPLAY, Verb.INFER):
            did.append(dict(stage.options))
        elif stage.verb is Verb.CREDIT:
            did += [{name: values.tolist() for name, values in found.items()} for found in credited(stage)]
        elif stage.verb is Verb.REGROUP:
            did.append([regrouped(stage, group) for group in (0, 1, 2)])
        elif stage.verb is Verb.WRITE:
            did.append((vars(stage.call)["columns"], dict(stage.options)))
        elif stage.verb is Verb.UPDATE:
            did.append([stage.options[name] for name in ("epochs", "minibatches", "companion")])
            did += updated(stage, rows(pipeline))
    return did


def updated(stage: Stage, rows: Rows) -> Iterator[Any]:
    """What a loss makes of the rows, and, if steps may leave something for later ones, of two steps more, in which
    entropies are higher."""
    objective, states = LossObjective.of(stage), [dict[str, Any]()]
    yield objective.of_logits
    width = objective.of_logits.width if objective.of_logits is not None else 1
    compared = rows.extra[DIVERGENCE] if width == 1 else torch.stack([rows.extra[DIVERGENCE]] * width, dim=-1)
    for factor in (1, 20, 20) if objective.coupled else (1,):
        extra = {**rows.extra, DIVERGENCE: compared, "entropy": rows.extra["entropy"] * factor}
        found = optimise(objective, replace(rows, extra=extra), states=states)
        yield found.value, found.metrics, found.gradient.tolist()
        yield {name: gradient.tolist() for name, gradient in found.extra_gradients.items()}
    yield str(states)


def credited(stage: Stage) -> Iterator[dict[str, np.ndarray]]:
    """What a credit stage writes in two steps, of which the first may leave something for the second."""
    assert stage.call is not None
    state: dict[str, Any] = {}
    for _ in range(2):
        if stage.reads_tokens:
            yield stage.call(sampled(), SoloWorld(), state, **stage.options)[0]
        else:
            yield stage.call(sampled(), **stage.options)


def rows(pipeline: Pipeline) -> Rows:
    size = rows_per_group(pipeline)
    rng = torch.Generator().manual_seed(21)
    lengths = torch.randint(3, 8, (3 * size,), generator=rng)
    columns = random_columns(lengths, size, rng)
    logps = masked_rows_start(lengths, -positive(lengths, rng))
    extras = {name: positive(lengths, rng) for name in sorted({*EXTRAS, DIVERGENCE})}
    if Head.ROW_SCALAR in pipeline.heads.values():
        return Rows(MicroBatch(lengths, columns), torch.randn(len(lengths), generator=rng), extras, per_row=True)
    return Rows(MicroBatch(lengths, columns), logps, extras)


def regrouped(stage: Stage, group: int) -> Any:
    """What a stage makes of the rows of a group: their numbers in the batch, with the columns that it writes."""
    assert stage.call is not None
    rows = np.flatnonzero(sampled()["group"] == group)
    turns = np.arange(len(rows)) // 2  # of each group, two turns make an episode
    table = stage.call(RowTable(sampled()).select(rows).with_values(episode=turns), **stage.options["call"])
    return table and (table.lengths.tolist(), {name: table[name].tolist() for name in stage.writes})


def sampled() -> Batch:
    """Three groups; a completion that was cut, one that could not be scored, and a group of equal rewards."""
    of_tokens = ("old_logps", "ref_logps", "values", "step_reward", "advantages")
    lengths = [3, 4, 5, 3, 4, 3, 4, 5, 3, 4]
    rewards = np.array([0.5, 1.0, 4.0, 0.2, 3.0, 3.0, np.nan, 1.0, 0.0, 0.0])
    noise = np.random.default_rng(5).normal(-1, 0.3, (len(of_tokens), sum(lengths)))
    return Batch.build(
        lengths,
        mask=np.concatenate([np.arange(length) > 0 for length in lengths]),
        reward=rewards,
        reward_parts=np.stack([rewards, rewards % 2], axis=1),
        reward_weights=np.tile([0.7, 0.3], (len(rewards), 1)),
        win_rate=np.where(np.arange(len(rewards)) < 8, np.linspace(0.0, 1.0, len(rewards)), np.nan),
        group=[0, 0, 0, 0, 0, 1, 1, 1, 2, 2],
        sampler=np.array([0, 1, 1, 1, 1, 0, 1, 1, 0, 1], np.int8),
        truncated=np.arange(len(lengths)) == 1,
        completion_tokens=np.array(lengths, np.int32) - 1,
        process_reward=np.where(np.arange(sum(lengths)) % 3 == 1, np.linspace(0.1, 0.9, sum(lengths)), np.nan),
        process_weight=np.full(len(lengths), 0.7),
        outcome_reward=rewards,
        teacher_row_tokens=np.array(lengths, np.int32) + 3,
        **dict(zip(of_tokens, noise, strict=True)),
    )


def test_every_option_has_another_value_to_be_tried_with() -> None:
    options = {option for method in METHODS.values() for option in inspect.signature(method).parameters}
    assert options == {*OTHER_VALUE, "loss_type"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors of a few numbers: several threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("method", METHODS)
def test_no_option_is_ignored_with_any_loss_and_each_has_an_effect_with_some(method: str) -> None:
    """If all of its combinations were refused, it would not be an option."""
    acting: set[str] = set()
    for options in [*with_each_loss(method), *BESIDE.get(method, [{}])[1:]]:
        before = behaviour(build(method, options, FACTS))
        for option, value in other_values(method).items():
            if options.get(option) != value:
                effect = effect_of(method, {**options, option: value}, option, before)
                assert effect != "nothing", f"options.{option} beside {options}"
                acting |= {option} if effect == "acts" else set()
    assert acting == inspect.signature(METHODS[method]).parameters.keys() - {"loss_type"}


def other_values(method: str) -> dict[str, Any]:
    """Of each of its options."""
    known = {**OTHER_VALUE, **OTHER_VALUE_OF.get(method, {})}
    return {option: known[option] for option in inspect.signature(METHODS[method]).parameters if option in known}


def effect_of(method: str, options: dict[str, Any], option: str, before: list[Any]) -> str:
    """Of the option, set to another value than `before`: `acts`, `refused`, `warned of` or `nothing`."""
    pipeline = made(method, options)
    if pipeline is None:
        return "refused"
    if behaviour(pipeline) != before:
        return "acts"
    return "warned of" if any(f"options.{option}" in said for said in pipeline.warnings) else "nothing"
