"""Every method with the options that its losses are tried with, and random rows of the data that it takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.columns import Head
from actors.objective import MicroBatch
from orchestrator.losses.objective import LossObjective
from orchestrator.methods import build
from orchestrator.pipeline import Pipeline
from tests.unit.trainer_stub import Rows, Split

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


def names_in(annotation: Any) -> Iterator[str]:
    """The names of all `Literal`s in an annotation."""
    for part in get_args(annotation):
        if isinstance(part, str):
            yield part
        else:
            yield from names_in(part)


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
    everything = random_columns(lengths, size, rng)
    per_row = objective.head is Head.ROW_SCALAR
    said = torch.randn(len(lengths), generator=rng, dtype=torch.float64)
    logps = said if per_row else masked_rows_start(lengths, -positive(lengths, rng))
    extras = {name: positive(lengths, rng) for name in objective.needs - {"all_tokens", "entropy_grad"}}
    if objective.of_logits is not None:
        extras["logits"] = random_logits(lengths, rng)
        if objective.of_logits.companion:
            extras["companion_logits"] = random_logits(lengths, rng)
    return Rows(MicroBatch(lengths, {name: everything[name] for name in objective.columns}), logps, extras, per_row)


def rows_per_group(pipeline: Pipeline) -> int:
    """As many as the pipeline makes of an item; of samples, four do."""
    return min(pipeline.rows_per_item, 4)


def random_columns(lengths: Tensor, size: int, rng: torch.Generator) -> dict[str, Tensor]:
    rows = torch.arange(len(lengths))
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)[:-1]])
    position = torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths)
    prompt = torch.randint(1, 3, (len(lengths),), generator=rng)
    member = rows % size
    advantages = torch.randn(len(lengths), generator=rng, dtype=torch.float64)
    names = ("old_logps", "sample_logps", "ref_logps", "teacher_logps")
    columns = {name: -positive(lengths, rng) for name in names}
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
        **_top_k(random_logits(lengths, rng).log_softmax(-1)),
    }


def random_logits(lengths: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(int(lengths.sum()), VOCABULARY, generator=rng, dtype=torch.float64)


def _top_k(log_probs: Tensor) -> dict[str, Tensor]:
    """What a teacher would say of its three most likely tokens."""
    logps, ids = log_probs.topk(3)
    tail = torch.log1p(-logps.exp().sum(-1, keepdim=True))
    return {"teacher_topk_ids": ids.int(), "teacher_topk_logps": logps, "teacher_tail_logps": tail}


def positive(lengths: Tensor, rng: torch.Generator) -> Tensor:
    return 0.05 + 1.5 * torch.rand(int(lengths.sum()), generator=rng, dtype=torch.float64)


def masked_rows_start(lengths: Tensor, values: Tensor) -> Tensor:
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
