"""Options of methods: which ones are refused, and where they come from."""

from __future__ import annotations

from typing import Any

import pytest

from actors.errors import ConfigError
from orchestrator.methods import build
from orchestrator.pipeline import Pipeline


def test_a_default_may_be_written_down_as_a_list_too() -> None:
    assert build("gkd", {"teachers": ["teacher"]}) == build("gkd", {})


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("gkd", {"teachers": ["a", "b"]}, "several have ranks of their own; set options.teacher_top_k"),
        ("minillm", {"teachers": ["a", "b"]}, "several have ranks of their own; set options.teacher_top_k"),
        ("gkd", {"teachers": ["a", "a"], "teacher_top_k": 4}, "names a role twice"),
        ("gkd", {"teacher_weights": [1.0]}, "there must be one for each of several teachers"),
        (
            "on_policy_distillation",
            {"teachers": ["a", "b"], "teacher_weights": [1.0], "teacher_top_k": 4},
            "there must be one for each of several teachers",
        ),
        ("gkd", {"lmbda": 0.0, "seq_kd": True, "teachers": ["a", "b"], "teacher_top_k": 4}, "samples of one teacher"),
    ],
)
def test_teachers_that_do_not_fit_together_are_refused(method: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build(method, options)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("grop", {}, r"no method 'grop'; did you mean grpo\? There are: "),
    ("grpo", {"epsilonhigh": 0.28}, r"no option 'epsilonhigh'; did you mean epsilon_high\? It has"),
    (
        "gfpo",
        {"num_remains_in_group": 16},
        r"num_remains_in_group=16 of options\.num_generations=16: all samples remain",
    ),
    ("gfpo", {"group_filter": "longest"}, r"options\.group_filter='longest'"),
    (
        "grpo",
        {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "batch"},
        r"scale_rewards='batch' does nothing with options\.multi_objective_aggregation=normalize_then_sum",
    ),
    (
        "grpo",
        {"entropy_target": 0.5},
        r"does nothing with options\.use_adaptive_entropy=false: .* acts with options\.use_adaptive_entropy=true",
    ),
    (
        "grpo",
        {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_coef_min": 0.2},
        r"not within options\.entropy_coef_min=0\.2 and options\.entropy_coef_max=1",
    ),
    ("xpo", {"alpha": 0.0}, r"options\.alpha=0\.0: .*greater than 0"),
    ("a2po", {"num_value_samples": 0}, r"options\.num_value_samples=0: .*greater than or equal to 1"),
    ("rloo", {"num_generations": 1}, r"options\.num_generations=1: .*greater than or equal to 2"),
    ("rloo", {"reward_clip_range": [1.0, 1.0]}, r"reward_clip_range=\[1, 1\]: every reward would be the same"),
    ("rloo", {"correction_max": 9}, r"does nothing with options\.correction=none"),
    ("grpo", {"kl_estimator": "k2"}, r"does nothing with options\.beta=0\.0"),
    (
        "grpo",
        {"beta": 0.1, "kl_estimator": "k1", "use_bias_correction_kl": False},
        r"gradient of lp - ref has mean 0 and holds the policy near to nothing",
    ),
    ("online_dpo", {"num_generations": 1}, r"options\.num_generations=1: .*greater than or equal to 2"),
    ("online_dpo", {"loss_type": "hinge"}, r"options\.loss_type='hinge': .*'sigmoid' or 'ipo'"),
    ("online_dpo", {"missing_eos_penalty": 0.0}, r"options\.missing_eos_penalty=0\.0: .*greater than 0"),
    ("grpo", {"num_generations": 1}, r"options\.num_generations=1: .*greater than or equal to 2"),
    ("grpo", {"correction": "tis"}, r"options\.correction='tis': .*'token_truncate'"),
    ("grpo", {"loss_type": "dr_grpo"}, r"divides by options\.max_completion_length: set it"),
    ("grpo", {"loss_type": "cispo"}, r"caps the ratio at options\.epsilon_high"),
    ("grpo", {"loss_type": "vespo", "correction": "token_mask"}, r"set options\.correction=none"),
    (
        "sft",
        {"loss_type": "dft", "label_smoothing": 0.1},
        r"options\.label_smoothing=0\.1 does nothing with options\.loss_type=dft: leave it out; it acts with "
        r"options\.loss_type=nll",
    ),
    ("dpo", {"loss_type": "exo_pair"}, r"needs options\.label_smoothing > 0"),
    (
        "dpo",
        {"loss_type": "hinge", "label_smoothing": 0.1},
        r"label_smoothing=0\.1 does nothing with options\.loss_type=hinge.* with options\.loss_type=sigmoid, exo_pair",
    ),
    ("dpo", {"loss_weights": [0]}, r"options\.loss_weights are all 0"),
    ("dpo", {"loss_weights": [-1.0]}, r"options\.loss_weights=-1\.0: .*greater than or equal to 0"),
    ("dpo", {"discopop_tau": 0.5}, r"discopop_tau=0\.5 does nothing .* acts with options\.loss_type=discopop$"),
    (
        "dpo",
        {"f_alpha_divergence_coef": 0.9},
        r"f_alpha_divergence_coef=0\.9 does nothing with options\.f_divergence_type=reverse_kl: leave it out; it acts "
        r"with options\.f_divergence_type=alpha_divergence$",
    ),
    (
        "dpo",
        {"loss_type": "sft", "sync_ref_model": True},
        r"sync_ref_model=True does nothing with options\.loss_type=sft",
    ),
    ("dpo", {"beta": True}, r"options\.beta=True: a number is needed; true, yes and on are not numbers"),
    ("dpo", {"loss_weights": [True]}, r"options\.loss_weights=\[True\]: a number is needed"),
    ("dpo", {"beta": float("inf")}, r"options\.beta=inf: .*finite"),
    ("kto", {"desirable_weight": 0, "undesirable_weight": 0}, r"both 0: nothing is learned"),
    (
        "grpo",
        {"dppo_threshold": 0.5},
        r"does nothing with options\.loss_type=dapo: .* acts with options\.loss_type=dppo$",
    ),
    ("grpo", {"loss_type": "cispo", "epsilon_high": 5, "delta": 2}, r"options\.delta=2 does nothing .*loss_type=cispo"),
    (
        "grpo",
        {"correction_max": 9},
        r"does nothing with options\.correction=none: .* acts with .*token_truncate, token_mask",
    ),
    (
        "grpo",
        {"use_bias_correction_kl": False},
        r"does nothing with options\.beta=0\.0: .* acts with options\.beta=0\.1$",
    ),
    (
        "grpo",
        {"correction": "token_mask", "correction_min": 4},
        r"correction_min=4 is above options\.correction_max=3: no weight is between them",
    ),
    (
        "grpo",
        {"loss_type": "dppo", "importance_sampling_level": "sequence"},
        r"not defined for options\.loss_type=dppo, .* set options\.importance_sampling_level=token$",
    ),
    ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, r"1 entries for 2 entries of loss_type"),
    ("dpo", {"loss_type": ["sigmoid", "hing"]}, r"options\.loss_type='hing'"),
    ("dpo", {"loss_type": "aot", "f_divergence_type": "forward_kl"}, r"not defined for loss_type aot"),
    ("dpo", {"loss_type": ["sigmoid", "sft"], "use_weighting": True}, r"use_weighting weighs pairs"),
    (
        "dpo",
        {"ref_model_mixup_alpha": 0.3},
        r"ref_model_mixup_alpha=0\.3 does .* acts with options\.sync_ref_model=true",
    ),
    (
        "kto",
        {"ref_model_sync_steps": 8},
        r"ref_model_sync_steps=8 does nothing .* acts with options\.sync_ref_model=true",
    ),
    ("bco", {"sync_ref_model": True, "ref_model_mixup_alpha": 0}, r"ref_model_mixup_alpha=0: .*greater than 0"),
    (
        "cpo",
        {"loss_type": "ipo", "label_smoothing": 0.1},
        r"does nothing .*loss_type=ipo: .* acts with .*loss_type=sigmoid$",
    ),
    (
        "tpo",
        {"loss_type": "hinge", "label_smoothing": 0.1},
        r"does nothing .* acts with options\.loss_type=sigmoid, tpo-l$",
    ),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED, ids=[f"{n} {o}" for n, o, _ in REFUSED])
def test_wrong_options_are_refused_with_what_was_given_and_what_is_allowed(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, options)


def test_a_fact_of_the_run_fills_an_option_of_that_name_unless_the_option_is_given() -> None:
    facts = {"max_completion_length": 64, "nothing_of_ours": 1}
    objective = _first_term(build("grpo", {"loss_type": "dr_grpo"}, facts))
    assert objective.reduce.count.keywords == {"each": 64.0}
    given = _first_term(build("grpo", {"loss_type": "dr_grpo", "max_completion_length": 8}, facts))
    assert given.reduce.count.keywords == {"each": 8.0}


def _first_term(pipeline: Pipeline) -> Any:
    loss: Any = pipeline.updates[0].call
    return loss.terms[0]
