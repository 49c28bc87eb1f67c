"""Every option of every method: set to another value, it changes what is learned, or is refused, or warned of.

What is compared is what a pipeline does on given rows, not how it is written down: the stages, what credit stages
write, and value, gradient and metrics of the loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch

from actors.batch import Batch
from actors.errors import ConfigError
from actors.objective import MicroBatch
from orchestrator.losses.declare import EXTRAS
from orchestrator.losses.objective import LossObjective
from orchestrator.methods import METHODS, build
from orchestrator.pipeline import Pipeline, Verb
from tests.unit.test_losses import _columns, _masked_rows_start, _names_in, _positive
from tests.unit.trainer_stub import Rows, optimise

FACTS = {"max_completion_length": 16}
OTHER_VALUE: dict[str, Any] = {  # of every option, besides `loss_type`, whose names are all tried
    "alpha": 0.5,
    "beta": 0.37,
    "correction": "token_truncate",
    "correction_max": 1.2,
    "correction_min": 0.9,
    "cpo_alpha": 0.7,
    "delta": 1.1,
    "density_ratio": True,
    "desirable_weight": 0.3,
    "discopop_tau": 0.7,
    "dppo_distance": "binary_kl",
    "dppo_threshold": 0.02,
    "dynamic_sampling": True,
    "entropy_coef": 0.3,
    "epsilon": 0.05,
    "epsilon_high": 0.9,
    "f_alpha_divergence_coef": 0.9,
    "f_divergence_type": "js_divergence",
    "importance_sampling_level": "sequence",
    "label_smoothing": 0.2,
    "ld_alpha": 0.3,
    "loss_weights": (0.4,),
    "mask_truncated_completions": True,
    "max_completion_length": 99,
    "minibatches": 3,
    "num_generations": 6,
    "off_policy_mask_threshold": -0.2,
    "precompute_ref_log_probs": True,
    "ref_model_mixup_alpha": 0.2,
    "ref_model_sync_steps": 7,
    "sapo_temperature_neg": 2.0,
    "sapo_temperature_pos": 2.0,
    "scale_rewards": "none",
    "simpo_gamma": 0.8,
    "sync_ref_model": True,
    "token_metrics": True,
    "top_entropy_quantile": 0.4,
    "tpo_alpha": 0.2,
    "tpo_l_gamma": 0.9,
    "undesirable_weight": 0.3,
    "updates_per_batch": 3,
    "use_bias_correction_kl": False,
    "use_weighting": True,
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
    "grpo": [{"updates_per_batch": 2, "beta": 0.2}, {}, {"minibatches": 2, "correction": "token_mask"}],
}


def with_each_loss(method: str) -> list[dict[str, Any]]:
    first = BESIDE.get(method, [{}])[0]
    names = dict.fromkeys(_names_in(get_type_hints(METHODS[method]).get("loss_type")))
    return [{**NEEDED.get(name, {}), **first, "loss_type": name} for name in names] or [first]


def made(method: str, options: dict[str, Any]) -> Pipeline | None:
    """None if it is refused."""
    try:
        return build(method, options, FACTS)
    except ConfigError:
        return None


def behaviour(pipeline: Pipeline) -> list[Any]:
    """What the pipeline does, on rows that hold everything that any loss reads."""
    did: list[Any] = [pipeline.data.name, sorted(pipeline.data.columns)]
    for stage in pipeline:
        did.append((stage.name, stage.precomputed))
        if stage.verb in (Verb.GENERATE, Verb.MIX):
            did.append(dict(stage.options))
        elif stage.verb is Verb.CREDIT:
            assert stage.call is not None
            did.append({name: values.tolist() for name, values in stage.call(sampled(), **stage.options).items()})
        elif stage.verb is Verb.UPDATE:
            found = optimise(LossObjective.of(stage), rows(pipeline))
            did.append((stage.options["epochs"], stage.options["minibatches"], found.value, found.metrics))
            did += [found.gradient.tolist(), {name: g.tolist() for name, g in found.extra_gradients.items()}]
    return did


def rows(pipeline: Pipeline) -> Rows:
    size = 4 if pipeline.data.prompts_only else pipeline.data.rows_per_item
    rng = torch.Generator().manual_seed(21)
    lengths = torch.randint(3, 8, (3 * size,), generator=rng)
    columns = _columns(lengths, size, rng)
    logps = _masked_rows_start(lengths, -_positive(lengths, rng))
    return Rows(MicroBatch(lengths, columns), logps, {name: _positive(lengths, rng) for name in sorted(EXTRAS)})


def sampled() -> Batch:
    """Two groups; a completion that was cut, and one that could not be scored."""
    return Batch.build(
        [3] * 6,
        mask=np.tile([False, True, True], 6),
        reward=[1.0, 0.0, 0.5, 3.0, np.nan, 1.0],
        group=[0, 0, 0, 1, 1, 1],
        truncated=[False, True, False, False, False, False],
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
def test_no_option_is_ignored_beside_any_loss_and_each_acts_beside_some(method: str) -> None:
    """If all of its combinations were refused, it would not be an option."""
    acting: set[str] = set()
    for options in [*with_each_loss(method), *BESIDE.get(method, [{}])[1:]]:
        before = behaviour(build(method, options, FACTS))
        for option in OTHER_VALUE.keys() & inspect.signature(METHODS[method]).parameters.keys():
            if options.get(option) != OTHER_VALUE[option]:
                effect = effect_of(method, options, option, before)
                assert effect != "nothing", f"options.{option} beside {options}"
                acting |= {option} if effect == "acts" else set()
    assert acting == inspect.signature(METHODS[method]).parameters.keys() - {"loss_type"}


def effect_of(method: str, options: dict[str, Any], option: str, before: list[Any]) -> str:
    """Of setting the option to another value: `acts`, `refused`, `warned of` or `nothing`."""
    pipeline = made(method, {**options, option: OTHER_VALUE[option]})
    if pipeline is None:
        return "refused"
    if behaviour(pipeline) != before:
        return "acts"
    return "warned of" if any(f"options.{option}" in said for said in pipeline.warnings) else "nothing"
