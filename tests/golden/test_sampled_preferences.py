"""Losses of preferences between samples (online DPO, XPO, A2PO, Nash-MD) against the numbers of another
implementation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from actors.batch import Batch
from actors.objective import MicroBatch
from orchestrator.batches.row_table import RowTable
from orchestrator.methods import build
from orchestrator.pipeline import Verb
from tests.golden.cases import CASES, assert_equal, cases, objective_for, padded, rows_of
from tests.golden.peer import ours
from tests.unit.trainer_stub import Rows, optimise


def margins_of_the_peer() -> tuple[float, float]:
    """`d` of both pairs. The weights of the peer's model are not in the file; the two numbers are those with which both
    of its losses come out: `mean softplus(-βd)` for sigmoid and `mean (d - 1/(2β))²` for ipo."""
    logistic, squared = (CASES[f"online_dpo/{name}"]["outputs"]["loss_passed_to_backward"] for name in _ONLINE)
    beta = 0.1
    centre, radius = 1 / (2 * beta), math.sqrt(2 * squared)

    def pair(angle: float) -> tuple[float, float]:
        return centre + radius * math.cos(angle), centre + radius * math.sin(angle)

    def excess(angle: float) -> float:
        return sum(math.log1p(math.exp(-beta * d)) for d in pair(angle)) / 2 - logistic

    low, high = 1.0 * math.pi, 1.25 * math.pi  # from where the pairs are far apart to where they are equal
    assert excess(low) < 0 < excess(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return pair(low)


_ONLINE = ("sigmoid_ga1", "ipo_ga4")


def sampled_pairs(case: dict[str, Any]) -> Rows:
    """The peer's samples, made pairs of by the stages of `online_dpo`. The peer chooses sample 0 over 2, and 3 over 1,
    which was cut; it has the first samples of both prompts, then the second ones."""
    inputs, (method, options) = case["inputs"], ours(case)
    first, second = margins_of_the_peer()
    log_ratios = torch.tensor([first, 0.0, 0.0, second], dtype=torch.float64)  # log π(y) - log ref(y) of each sample
    lengths = torch.tensor(inputs["prompt_mask"]).sum(1) + torch.tensor(inputs["completion_mask"]).sum(1)
    cut = [1 not in completion for completion in inputs["completion_ids"]]  # 1 is the peer's end of sequence
    tables: list[RowTable] = []
    for prompt in range(2):
        rows = np.array([prompt, prompt + 2])
        table: RowTable | None = RowTable(
            Batch.build(
                lengths.numpy()[rows],
                group=[prompt] * 2,
                reward=np.array(inputs["rewards"])[rows],
                truncated=np.array(cut)[rows],
                sampler=rows,  # which sample it is
            )
        )
        for stage in build(method, options):
            if stage.verb is Verb.REGROUP:
                assert stage.call is not None and table is not None
                table = stage.call(table, **stage.options["call"])
        assert table is not None
        tables.append(table)
    table = RowTable.concat(tables)
    samples = torch.from_numpy(table["sampler"]).long()
    starts = torch.cat([torch.zeros(1).long(), lengths[samples].cumsum(0)[:-1]])
    prompts = torch.tensor(inputs["prompt_mask"]).sum(1)[samples]
    position = torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths[samples])
    logps = torch.zeros(int(lengths.sum()), dtype=torch.float64)
    logps[starts + prompts] = log_ratios[samples]
    columns = {name: torch.from_numpy(table[name].copy()) for name in ("group", "preferred", "reward", "truncated")}
    columns |= {"mask": position >= prompts.repeat_interleave(lengths[samples]), "ref_logps": torch.zeros_like(logps)}
    return Rows(MicroBatch(lengths[samples], columns), logps)


@cases("online_dpo/")
def test_online_dpo_equals_the_peer_in_however_many_micro_batches(case: dict[str, Any]) -> None:
    rows = sampled_pairs(case)
    assert rows.micro["reward"].tolist() == [1.0, 0.5, 2.0, -1.0]  # the cut one is worth 1 less
    whole, apart = (optimise(objective_for(case), rows, split) for split in ([[[0, 1, 2, 3]]], [[[0, 1], [2, 3]]]))
    assert whole.value == pytest.approx(case["outputs"]["loss_passed_to_backward"], abs=case["tol"])
    assert apart.value == pytest.approx(whole.value, rel=1e-9)
    torch.testing.assert_close(apart.gradient, whole.gradient)


@cases("xpo/")
def test_an_exploration_bonus_equals_the_peer(case: dict[str, Any]) -> None:
    """The policy's samples first, then the reference's."""
    inputs, outputs = case["inputs"], case["outputs"]
    logps = [*inputs["model_on_model"], *inputs["model_on_ref"]]
    pairs, mask = len(logps) // 2, [[1] * len(logps[0])] * len(logps)
    chosen = torch.tensor(inputs["chosen_is_model"])
    rows = rows_of(
        logps,
        mask,
        ref_logps=padded([*inputs["ref_on_model"], *inputs["ref_on_ref"]]),
        group=torch.arange(pairs).repeat(2),
        preferred=torch.cat([chosen, ~chosen]),
        sampler=torch.arange(2).repeat_interleave(pairs).to(torch.int8),
        reward=torch.cat([chosen, ~chosen]).double(),
        truncated=torch.zeros(2 * pairs).bool(),
    )
    gradient = [*outputs["grad_model_on_model"], *outputs["grad_model_on_ref"]]
    assert_equal(optimise(objective_for(case), rows), {"outputs": {**outputs, "grad": gradient}}, "grad", mask)


@cases("a2po/")
def test_a_fit_to_the_optimal_advantage_equals_the_peer(case: dict[str, Any]) -> None:
    """The peer's function takes sums over rows: a completion of one token, here."""
    inputs, outputs = case["inputs"], case["outputs"]
    logps, ref = ([[value] for value in inputs[f"{name}_logps"]] for name in ("policy", "ref"))
    rows = rows_of(
        logps,
        [[1]] * len(logps),
        ref_logps=padded(ref),
        reward=torch.tensor(inputs["rewards"], dtype=torch.float64),
        optimal_value=torch.tensor(inputs["v_star"], dtype=torch.float64),
    )
    expected = {"loss": outputs["loss"], "grad": [[value] for value in outputs["grad"]]}
    assert_equal(optimise(objective_for(case), rows), {"outputs": expected}, "grad", [[1]] * len(logps))


@cases("nash_md/")
def test_a_game_against_a_mixture_equals_the_peer(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    mask = [[1] * len(inputs["model_logps"][0])] * len(inputs["model_logps"])
    rows = rows_of(
        inputs["model_logps"],
        mask,
        ref_logps=padded(inputs["ref_logps"]),
        preference=torch.tensor(inputs["probability"], dtype=torch.float64),
        truncated=torch.zeros(len(mask)).bool(),
    )
    assert_equal(optimise(objective_for(case), rows), case, "grad", mask)
