"""What a loss declares: the columns and outputs that it reads, its options, and sums of losses."""

from __future__ import annotations

import pytest

from actors.errors import ConfigError
from actors.objective import Outputs
from orchestrator.losses.declare import Loss, Sum, Term, columns_of, is_on, reads
from orchestrator.losses.likelihood import nll
from orchestrator.losses.objective import LossObjective
from orchestrator.losses.reduce import row_mean_of_token_means, token_mean
from orchestrator.losses.views import PolicyTokens
from orchestrator.losses.views import require as field
from tests.unit.loss_rows import random_rows
from tests.unit.trainer_stub import optimise


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
