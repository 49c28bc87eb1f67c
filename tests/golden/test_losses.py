"""Our losses against the numbers of `losses.json`: what another implementation computed on fixed inputs (its `source`).

The inputs are padded; here every padded row becomes a ragged row of the same width whose mask leaves the padding out,
after one token that nothing predicts. Which method and options a case is in ours is said by `peer.py`. Cases in which
we differ on purpose are in `DEPARTURES`, with the reason.
"""

from __future__ import annotations

import json
import math
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split, Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from actors.backends.single import SoloWorld
from actors.batch import Batch
from actors.distributions import Asked
from actors.distributions import of_logits as of_logits_of
from actors.errors import ConfigError
from actors.heads import VocabularyHead
from actors.logits import LogitScaling, Vocabulary
from actors.lora import resident
from actors.objective import MicroBatch, Outputs
from actors.weight_averaging import Average, AverageSpec
from actors.weight_swap import mix_in
from orchestrator.batches.replay_buffer import Kept, ReplayBuffer
from orchestrator.batches.row_table import RowTable
from orchestrator.credit.advantages import mask_truncated, zscore_by_group
from orchestrator.credit.returns import whitened
from orchestrator.data.density_ratio import density_ratio_weights
from orchestrator.data.mismatched_rows import with_mismatches
from orchestrator.losses.objective import LossObjective
from orchestrator.losses.pairwise import odds_ratio
from orchestrator.losses.policy_gradient import engine_correction, policy_gradient
from orchestrator.losses.reduce import item_mean, token_mean
from orchestrator.losses.surrogates import clipped
from orchestrator.losses.views import PolicyTokens, Taught
from orchestrator.methods import METHODS, build
from orchestrator.pipeline import Pipeline, Verb
from rewards.combine import weighted_sum
from tests.golden.peer import (
    ELSEWHERE,
    GRPO_NAMES,
    MAPPINGS,
    NOT_BUILT,
    NOT_COMPARABLE,
    Inexpressible,
    ours,
)
from tests.unit.source_stub import opened, write_rows
from tests.unit.trainer_stub import Result, Rows, optimise

FILE = json.loads((Path(__file__).parent / "losses.json").read_text())
CASES: dict[str, dict[str, Any]] = {case["id"]: case for case in FILE["cases"]}

DEPARTURES = {
    "dpo/sigmoid_ls0.1_IGNORED": "the peer ignores label smoothing here; ours applies it",
    "gfpo/group_slicing_note": "the peer filters overlapping slices of the batch; ours a prompt's own samples",
}
COMPARED: set[str] = set()  # cases that a test of this file computes


def the(name: str) -> dict[str, Any]:
    """A case that a test compares."""
    COMPARED.add(name)
    return CASES[name]


def cases(*prefixes: str, without: tuple[str, ...] = ()) -> Any:
    left_out = {*DEPARTURES, *NOT_COMPARABLE, *without}
    names = [name for name in CASES if name.startswith(prefixes) and not name.startswith(tuple(left_out))]
    return pytest.mark.parametrize("case", [the(name) for name in names], ids=names)


def test_every_case_is_compared_or_listed_with_the_reason_why_it_is_not() -> None:
    listed = {*ELSEWHERE, *NOT_COMPARABLE, *DEPARTURES}
    families = {name for name in CASES if name.partition("/")[0] in NOT_BUILT}
    assert CASES.keys() - COMPARED - listed - families == set(), "neither compared nor listed"
    assert not COMPARED & (listed | families), "compared, and listed as not"
    assert listed <= CASES.keys() and {name.partition("/")[0] for name in families} == set(NOT_BUILT)
    root = Path(__file__).parents[2]
    assert all((root / file).is_file() for file in ELSEWHERE.values())


@pytest.mark.parametrize("family", MAPPINGS)
def test_a_key_or_a_family_of_the_peer_that_nobody_knows_is_an_error(family: str) -> None:
    compared = (CASES[name] for name in COMPARED if name.startswith(f"{family}/"))
    case = max(compared, key=lambda case: len(case["config"]))
    assert ours(case)[1]
    with pytest.raises(Inexpressible, match="'a_new_key'"):
        ours({**case, "config": {**case["config"], "a_new_key": 1}})
    with pytest.raises(Inexpressible, match="which method of ours"):
        ours({**case, "id": "newer/method"})


def padded(values: list[list[float]]) -> Tensor:
    """[R, C] -> flat [R * (C + 1)], a zero before each row."""
    matrix = torch.tensor(values, dtype=torch.float64)
    return torch.cat([torch.zeros(len(matrix), 1, dtype=torch.float64), matrix], dim=1).flatten()


def unpadded(flat: Tensor, rows: int) -> Tensor:
    return flat.view(rows, -1)[:, 1:]


def rows_of(
    logps: list[list[float]], mask: list[list[int]], extra: dict[str, Any] | None = None, **columns: Tensor
) -> Rows:
    """Ragged rows of one width; extras are padded like the log-probabilities."""
    lengths = torch.full((len(logps),), len(logps[0]) + 1)
    columns = {"mask": padded(mask).bool(), **columns}
    found = {name: padded(values) for name, values in (extra or {}).items()}
    return Rows(MicroBatch(lengths, columns), padded(logps), found)


def objective_of(method: str, options: dict[str, Any]) -> LossObjective:
    stage = build(method, options).updates[0]
    assert stage.call is not None
    return LossObjective(stage.call, stage.options["reduce"], stage.options["loss_options"])


def assert_equal(result: Result, case: dict[str, Any], gradient: str, mask: list[list[int]]) -> None:
    """Value and gradient, the latter where the mask is 1: elsewhere the peer's inputs are not differentiable at all."""
    assert result.value == pytest.approx(case["outputs"]["loss"], abs=1e-6)
    expected = torch.tensor(case["outputs"][gradient]) * torch.tensor(mask)
    torch.testing.assert_close(unpadded(result.gradient, len(mask)), expected.double(), atol=1e-6, rtol=1e-6)


# DPO


def preference_rows(case: dict[str, Any]) -> tuple[Rows, list[list[int]]]:
    inputs = case["inputs"]
    mask = [row[1:] for row in inputs["completion_mask"]]
    pairs = len(mask) // 2
    ref = torch.zeros(len(mask), len(mask[0]) + 1, dtype=torch.float64)
    for row, total in enumerate([*inputs["ref_chosen_logps"], *inputs["ref_rejected_logps"]]):
        ref[row, 1 + mask[row].index(1)] = total  # on the first completion token, which no length weighs down
    extra = {"log_sum_sq_probs": inputs["log_sum_sq_probs"]} if "log_sum_sq_probs" in inputs else {}
    rows = rows_of(
        inputs["per_token_logps"],
        mask,
        extra,
        ref_logps=ref.flatten(),
        group=torch.arange(pairs).repeat(2),
        preferred=torch.arange(2 * pairs) < pairs,
    )
    return rows, mask


def objective_for(case: dict[str, Any]) -> LossObjective:
    return objective_of(*ours(case))


@cases("dpo/", without=("dpo/wpo_backward",))
def test_dpo_equals_the_peer(case: dict[str, Any]) -> None:
    rows, mask = preference_rows(case)
    assert_equal(optimise(objective_for(case), rows), case, "grad_per_token_logps", mask)


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_a_robust_loss_of_the_peer_keeps_its_label_smoothing(smoothing: float) -> None:
    """Unbiased: the smoothed value of the same pairs, were a share of them turned round, is the plain one."""
    case = CASES["dpo/sigmoid"]
    robust = {**case, "config": {**case["config"], "loss_type": ["robust"], "label_smoothing": smoothing}}
    rows, _ = preference_rows(case)
    objective = objective_for(robust)
    right, turned = (optimise(objective, each).value for each in (rows, _swapped(rows)))
    assert right != pytest.approx(case["outputs"]["loss"], abs=1e-4)
    assert (1 - smoothing) * right + smoothing * turned == pytest.approx(case["outputs"]["loss"], abs=1e-6)


@cases("dpo/wpo_backward")
def test_weighted_pairs_have_a_gradient_or_are_refused_where_the_peer_has_none(case: dict[str, Any]) -> None:
    weighted = CASES["dpo/sigmoid_WPO"]
    loss = case["config"]["loss_type"]
    smoothing = 1e-3 if loss == "exo_pair" else 0.0
    config = {**weighted["config"], "loss_type": [loss], "label_smoothing": smoothing}
    rows, mask = preference_rows(weighted)
    if case["outputs"]["status"] != "ok":
        with pytest.raises(ConfigError, match="use_weighting"):
            build("dpo", {"loss_type": loss, "use_weighting": True})
        return
    plain, found = (
        optimise(objective_for({**weighted, "config": {**config, "use_weighting": on}}), rows) for on in (False, True)
    )
    gradient, unweighted = (unpadded(each.gradient, len(mask)) for each in (found, plain))
    pairs = len(mask) // 2
    share = (gradient / unweighted)[torch.tensor(mask).bool()]
    assert torch.isfinite(share).all() and (share > 0).all()
    first_of_row = (gradient / unweighted).nan_to_num(0).amax(1)  # one weight for both sides of a pair
    torch.testing.assert_close(first_of_row[:pairs], first_of_row[pairs:])


def test_label_smoothing_of_dpo_acts_where_the_peer_ignores_it() -> None:
    case = CASES["dpo/sigmoid_ls0.1_IGNORED"]
    rows, _ = preference_rows(case)
    assert case["outputs"]["loss"] == CASES["dpo/sigmoid"]["outputs"]["loss"]
    method, options = ours(case)
    assert "label_smoothing" not in options
    smoothed = optimise(objective_of(method, {**options, "label_smoothing": 0.1}), rows).value
    plain = case["outputs"]["loss"]
    assert smoothed != pytest.approx(plain, abs=1e-4)
    flipped = optimise(objective_of(method, options), _swapped(rows)).value
    assert smoothed == pytest.approx(0.9 * plain + 0.1 * flipped, abs=1e-9)


def _swapped(rows: Rows) -> Rows:
    columns = {**rows.micro.columns, "preferred": ~rows.micro["preferred"]}
    return Rows(MicroBatch(rows.micro.lengths, columns), rows.logps, rows.extra)


# Online DPO


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


@cases("replay_buffer/")
def test_a_buffer_of_groups_keeps_those_that_the_peer_keeps(case: dict[str, Any]) -> None:
    buffer = ReplayBuffer(case["inputs"]["max_size"])
    for score in case["inputs"]["scores"]:
        buffer.add(Kept(score, 0, RowTable(Batch.empty())))
    assert sorted(kept.score for kept in buffer.groups) == case["outputs"]["kept"]


# Divergences of whole distributions


@cases("gkd/")
def test_a_divergence_of_distributions_equals_the_peer(case: dict[str, Any]) -> None:
    """Temperature 1 is the identity of a projection, so that hidden states are logits."""
    config, inputs, outputs = case["config"], case["inputs"], case["outputs"]
    student, teacher = (torch.tensor(inputs[f"{name}_logits"]) for name in ("student", "teacher"))
    mask = torch.tensor(inputs["labels"]) != -100
    of_logits = objective_for(case).of_logits
    assert of_logits is not None and of_logits.companion
    student = student.requires_grad_()
    identity = Vocabulary(torch.eye(student.shape[-1]), None, LogitScaling())
    asked = Asked(partial(of_logits.call, **of_logits.options), (), (identity, teacher[mask]))
    tokens = int(mask.sum())
    anything = torch.zeros(tokens, dtype=torch.int64)
    total = of_logits_of(identity, student[mask], anything, asked, chunk_rows=2)[1].sum()
    divisor = config["num_items_in_batch"] or {"sum": 1, "batchmean": tokens}[config["reduction"]]
    (total / divisor).backward()
    assert float(total.detach()) / divisor == pytest.approx(outputs["loss"], abs=1e-6)
    assert student.grad is not None
    torch.testing.assert_close(student.grad, torch.tensor(outputs["grad_student_logits"]), atol=1e-6, rtol=1e-5)


@cases("distillation/")
def test_a_divergence_of_projected_states_of_two_widths_equals_the_peer(case: dict[str, Any]) -> None:
    """The peer's is the mean over the completions' tokens, and it sums their entropies."""
    inputs, outputs = case["inputs"], case["outputs"]
    mask = torch.tensor(inputs["mask"]).bool()
    hidden, weight = (torch.tensor(inputs[f"student_{name}"]).requires_grad_() for name in ("hidden", "w"))
    teacher = Vocabulary(torch.tensor(inputs["teacher_w"]), None, LogitScaling())
    objective, temperature = objective_for(case), case["config"]["temperature"]
    assert objective.of_logits is not None
    asked = Asked(objective.of_logits.at(temperature), (), (teacher, torch.tensor(inputs["teacher_hidden"])[mask]))
    anything = torch.zeros(int(mask.sum()), dtype=torch.int64)
    own = Vocabulary(weight, None, LogitScaling())
    mean = of_logits_of(own, hidden[mask], anything, asked, chunk_rows=2)[1].mean()
    mean.backward()
    assert float(mean.detach()) == pytest.approx(outputs["loss"], abs=1e-6)
    for found, name in ((hidden.grad, "grad_hidden"), (weight.grad, "grad_w")):
        assert found is not None
        torch.testing.assert_close(found, torch.tensor(outputs[name]), atol=1e-6, rtol=1e-4)
    head = VocabularyHead(nn.Linear(*reversed(weight.shape), bias=False), LogitScaling())
    head.weight.data = weight.detach()
    entropy = head(hidden[mask].detach(), anything, temperature, frozenset({"entropy"}), 2)["entropy"]
    assert float(entropy.sum()) == pytest.approx(outputs["entropy_sum"], abs=1e-5)


@cases("iw_opd/")
def test_tokens_that_weigh_less_the_further_the_student_has_drifted_equal_the_peer(case: dict[str, Any]) -> None:
    inputs, outputs = case["inputs"], case["outputs"]
    logits = torch.tensor(inputs["student_logits"], dtype=torch.float64).requires_grad_()
    logps = logits.log_softmax(-1).gather(-1, torch.tensor(inputs["ids"])[..., None]).squeeze(-1)
    mask = (torch.tensor(inputs["labels"]) != -100).int().tolist()
    rows = rows_of(logps.tolist(), mask, teacher_logps=padded(inputs["teacher_logps"]))
    result = optimise(objective_for(case), rows)
    assert result.value == pytest.approx(outputs["loss"], abs=1e-6)
    logps.backward(unpadded(result.gradient, len(mask)))
    torch.testing.assert_close(logits.grad, torch.tensor(outputs["grad"]).double(), atol=1e-6, rtol=1e-5)


@cases("gold/")
def test_a_distance_of_sorted_probabilities_of_two_vocabularies_equals_the_peer(case: dict[str, Any]) -> None:
    """The mean over the tokens that both answers have, of each row; then over rows. (The peer's case reads the logits
    at the answer's tokens, and not those that predict them; what is compared with what is the same here.)"""
    inputs, of_logits = case["inputs"], objective_for(case).of_logits
    assert of_logits is not None
    of_rows: list[float] = []
    for row in range(len(inputs["student_logits"])):
        student, teacher = (
            torch.tensor(inputs[f"{name}_logits"][row])[torch.tensor(inputs[f"{name}_labels"][row]) != -100]
            for name in ("student", "teacher")
        )
        count = min(len(student), len(teacher))
        logps, ids = teacher[:count].log_softmax(-1).sort(-1, descending=True)
        tail = torch.full((count, 1), -torch.inf)
        of_rows.append(float(of_logits.at(1.0)(student[:count], ids.int(), logps, tail).mean()))
    assert sum(of_rows) / len(of_rows) == pytest.approx(case["outputs"]["loss"], abs=1e-6)


@cases("sdft/")
def test_what_a_policy_learns_of_itself_under_another_prompt_equals_the_peer(case: dict[str, Any]) -> None:
    """The peer's k tokens are the student's, and without a tail it renormalises them: a teacher with a tail of 0."""
    student, teacher = (torch.tensor(case["inputs"][f"{name}_logits"]).flatten(0, 1) for name in ("student", "teacher"))
    expected, (_, options) = torch.tensor(case["outputs"]["per_token"]).flatten(), ours(case)
    update = build("sdft", options).updates[0]
    assert update.call is not None
    own, other = student.log_softmax(-1), teacher.log_softmax(-1)
    if options["teacher_top_k"] is None:
        ids = torch.tensor(case["inputs"]["ids"]).flatten()[:, None]
        logps, said = (each.gather(1, ids).squeeze(1) for each in (own, other))
        rows = rows_of([logps.tolist()], [[1] * len(logps)], teacher_logps=padded([said.tolist()]))
        view = Taught.of(rows.micro, Outputs(rows.logps), frozenset({"mask", "teacher_logps"}), {})
        values, _ = update.call(view, **update.options["loss_options"])
        found = unpadded(values, 1).flatten().float()
    else:
        ids = student.topk(min(options["teacher_top_k"], student.shape[1])).indices
        top, tail = other.gather(1, ids).log_softmax(-1), torch.full((len(ids), 1), -torch.inf)
        of_logits = objective_for(case).of_logits
        assert of_logits is not None
        found = of_logits.at(1.0)(student, ids.int(), top, tail)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@cases("minillm/adv")
def test_returns_of_the_log_ratio_equal_the_peer(case: dict[str, Any]) -> None:
    """The peer's powers of gamma begin at the row's first token: a quotient of two such sums is the same from any. To
    the sum of weights that it divides by, its padding adds 1e-4 each."""
    inputs, (method, options) = case["inputs"], ours(case)
    returns = build(method, {**options, "single_step_decomposition": False}).updates[0]
    rows = rows_of(inputs["student_logps"], inputs["mask"], teacher_logps=padded(inputs["teacher_logps"]))
    view = Taught.of(rows.micro, Outputs(rows.logps), frozenset({"mask", "teacher_logps"}), {})
    assert returns.call is not None
    values, _ = returns.call(view, **returns.options["loss_options"])
    expected = torch.tensor(case["outputs"]["advantages"]).double()
    torch.testing.assert_close(
        -unpadded(values, len(expected)) * torch.tensor(inputs["mask"]),
        expected,
        atol=1e-6,
        rtol=2e-4 if options["gamma"] else 1e-6,
    )


@cases("minillm/single_step")
def test_the_exact_divergence_of_each_step_equals_the_peer(case: dict[str, Any]) -> None:
    """The peer's function takes the mean over the mask, as ours does; its trainer hands it one that is 1 on padding."""
    student, teacher = (
        torch.tensor(case["inputs"][f"{name}_log_probs"]).flatten(0, 1) for name in ("student", "teacher")
    )
    of_logits = objective_for(case).of_logits
    assert of_logits is not None and of_logits.width == 2
    ids = torch.arange(len(student)) % 7
    sampled, divergence = of_logits.at(1.0)(student, teacher, ids).unbind(-1)
    learned = torch.tensor(case["inputs"]["mask"]).flatten()
    assert float(divergence[learned].mean()) == pytest.approx(case["outputs"]["loss"], abs=1e-6)
    torch.testing.assert_close(sampled, teacher.log_softmax(-1)[torch.arange(len(ids)), ids])


# SFT


@cases("sft/")
def test_sft_equals_the_peer(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    rows = rows_of(inputs["per_token_logps"], inputs["label_mask"])
    result = optimise(objective_for(case), rows)
    tokens = float(rows.micro["mask"].sum())
    share = tokens / (inputs["num_items_in_batch"] or tokens)  # the peer's count spans micro-batches that are not here
    assert result.value * share == pytest.approx(case["outputs"]["loss"], abs=1e-6)
    expected = torch.tensor(case["outputs"]["grad_per_token_logps"]) * torch.tensor(inputs["label_mask"])
    gradient = unpadded(result.gradient, len(inputs["label_mask"])) * share
    torch.testing.assert_close(gradient, expected.double(), atol=1e-6, rtol=1e-6)


# KTO and BCO


@cases("kto/", without=("kto/kl_pairs",))
def test_kto_equals_the_peer(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    real, other = inputs["per_token_logps"], inputs["KL_per_token_logps"]
    width = max(len(real[0]), len(other[0]))
    logps = [row + [0.0] * (width - len(row)) for row in [*real, *other]]
    mask = [[int(value != 0) for value in row] for row in logps]
    ref = torch.zeros(len(logps), width + 1, dtype=torch.float64)
    ref[:, 2] = torch.tensor([*inputs["ref_logps"], *inputs["ref_KL_logps"]])  # the first token of every completion
    is_real = torch.arange(len(logps)) < len(real)
    rows = rows_of(
        logps,
        mask,
        ref_logps=ref.flatten(),
        label=torch.tensor(inputs["label"] * 2),
        mismatched=~is_real,
        group=torch.arange(len(real)).repeat(2),
    )
    if case["config"]["loss_type"] != "kto":  # the other loss takes no mismatched rows
        rows = rows.select(range(len(real)))
    result = optimise(objective_for(case), rows)
    assert result.value == pytest.approx(case["outputs"]["loss"], abs=1e-6)
    gradient = unpadded(result.gradient, len(rows))
    expected = (
        torch.tensor(case["outputs"]["grad_per_token_logps"]) * torch.tensor(mask[: len(real)])[:, : len(real[0])]
    )
    torch.testing.assert_close(gradient[: len(real), : len(real[0])], expected.double(), atol=1e-6, rtol=1e-6)
    assert not gradient[len(real) :].any()
    assert result.metrics.get("kl", 0.0) == pytest.approx(case["outputs"]["kl"], abs=1e-6)


@cases("kto/kl_pairs")
def test_mismatched_rows_pair_prompts_with_the_completions_that_the_peer_pairs_them_with(case: dict[str, Any]) -> None:
    completions = case["outputs"]["completion_ids"]
    rows = [[20 + row, *completion] for row, completion in enumerate(completions)]
    batch = Batch.build(
        [len(row) for row in rows],
        tokens=np.concatenate(rows),
        mask=np.concatenate([np.arange(len(row)) > 0 for row in rows]),
        label=[True, False, True, False],
    )
    doubled = with_mismatches(batch)
    found = [doubled.row("tokens", row).tolist() for row in np.flatnonzero(doubled["mismatched"])]
    assert found == [[20 + row, *other] for row, other in enumerate(case["outputs"]["KL_completion_ids"])]


@cases("data/nanstd")
def test_the_deviation_equals_the_peer_where_rewards_are_missing(case: dict[str, Any]) -> None:
    rewards = np.array(case["inputs"]["x"], dtype=np.float64)
    group = np.repeat(np.arange(2), rewards.shape[1])
    centred = zscore_by_group(rewards.flatten(), group, scale="none").reshape(rewards.shape)
    scaled = zscore_by_group(rewards.flatten(), group).reshape(rewards.shape)
    assert centred[0, 0] / scaled[0, 0] - 1e-4 == pytest.approx(case["outputs"]["std"][0], abs=1e-5)
    assert case["outputs"]["std"][1] == "nan"
    assert not scaled[1].any()


BCO = [the(name) for name in ("bco/step0", "bco/step1")]


def test_bco_equals_the_peer_over_two_steps_with_one_running_mean() -> None:
    objective, states = objective_for(BCO[0]), [{}]
    for case in BCO:
        inputs, outputs = case["inputs"], case["outputs"]
        logps = [*inputs["policy_chosen_logps"], *inputs["policy_rejected_logps"]]
        ref = [*inputs["ref_chosen"], *inputs["ref_rejected"]]
        rows = rows_of(
            [[value] for value in logps],
            [[1]] * len(logps),
            ref_logps=padded([[value] for value in ref]),
            label=torch.arange(len(logps)) < len(inputs["policy_chosen_logps"]),
        )
        result = optimise(objective, rows, states=states)
        assert result.metrics["delta"] == pytest.approx(outputs["delta"], abs=1e-6)
        assert result.value == pytest.approx(np.mean(outputs["losses"]), abs=1e-6)
        expected = torch.tensor(
            [[g] for g in [*outputs["grad_chosen"], *outputs["grad_rejected"]]], dtype=torch.float64
        )
        torch.testing.assert_close(unpadded(result.gradient, len(logps)), expected, atol=1e-6, rtol=1e-6)


@cases("bco/udm_weight")
def test_density_ratio_weights_equal_the_peer(case: dict[str, Any]) -> None:
    weights = density_ratio_weights(np.array(case["inputs"]["prob_desirable"]))
    np.testing.assert_allclose(weights, case["outputs"]["weight"], atol=1e-6)


# Pairs without a reference


@cases("cpo/", without=("cpo/full",))
def test_a_contrast_without_reference_equals_the_peer(case: dict[str, Any]) -> None:
    result = optimise(objective_for(case), single_token_pairs(case["inputs"]))
    assert result.value == pytest.approx(np.mean(case["outputs"]["losses"]), abs=1e-6)
    gradients = torch.tensor([*case["outputs"]["grad_chosen"], *case["outputs"]["grad_rejected"]], dtype=torch.float64)
    torch.testing.assert_close(unpadded(result.gradient, len(gradients)).flatten(), gradients, atol=1e-6, rtol=1e-6)


def test_the_peers_shape_of_a_reward_is_alphapo_and_nothing_else_of_ours() -> None:
    case = CASES["cpo/simpo_b2.5_g1.375_a0_ls0"]
    shaped = {**case, "config": {**case["config"], "alpha": 0.3}}
    assert ours(shaped) == (
        "alphapo",
        {"beta": 2.5, "cpo_alpha": 0.0, "simpo_gamma": 1.375, "alpha": 0.3},
    )
    scores = torch.tensor([case["inputs"]["policy_chosen_logps"], case["inputs"]["policy_rejected_logps"]]).double()
    chosen, rejected = (1 - (-0.3 * scores).exp()) / 0.3
    expected = -torch.nn.functional.logsigmoid(2.5 * (chosen - rejected) - 1.375).mean()
    found = optimise(objective_for(shaped), single_token_pairs(case["inputs"]))
    assert found.value == pytest.approx(float(expected), abs=1e-6)
    with pytest.raises(Inexpressible, match=r"alpha=0\.3 with loss_type=hinge"):
        ours({**case, "config": {**case["config"], "alpha": 0.3, "loss_type": "hinge"}})


def single_token_pairs(inputs: dict[str, Any]) -> Rows:
    """The peer's function takes sequence scores: a completion of one token has its sum and its mean as the same
    number."""
    logps = [[value] for value in [*inputs["policy_chosen_logps"], *inputs["policy_rejected_logps"]]]
    pairs = len(logps) // 2
    return rows_of(
        logps, [[1]] * len(logps), group=torch.arange(pairs).repeat(2), preferred=torch.arange(2 * pairs) < pairs
    )


@cases("orpo/odds_b0.1")
def test_the_odds_ratio_equals_the_peer(case: dict[str, Any]) -> None:
    rows = single_token_pairs(case["inputs"])
    result = optimise(LossObjective(odds_ratio, item_mean, {"beta": case["config"]["beta"]}), rows)
    assert result.value == pytest.approx(-np.mean(case["outputs"]["losses"]), abs=1e-6)
    expected = [*case["outputs"]["grad_chosen_of_neg_mean"], *case["outputs"]["grad_rejected_of_neg_mean"]]
    gradient = unpadded(result.gradient, len(expected)).flatten()
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-6)


def from_logits(logits: Tensor, tokens: Tensor) -> Tensor:
    """[R, L, V], [R, L] -> [R, L - 1]: log-probabilities of the tokens after the first."""
    log_probs = logits[:, :-1].log_softmax(-1)
    return log_probs.gather(-1, tokens[:, 1:, None]).squeeze(-1)


def through_logits(
    objective: LossObjective, logits: Tensor, tokens: Tensor, attended: Tensor, **columns: Tensor
) -> tuple[float, float, dict[str, float]]:
    """(value, norm of the gradient with respect to the logits, metrics): all that the peer's functions report.
    `attended` [R, L] says where rows end; `mask` is given as [R, L], too."""
    logits = logits.clone().requires_grad_()
    logps = torch.cat([torch.zeros(len(tokens), 1, dtype=torch.float64), from_logits(logits, tokens)], dim=1)[attended]
    columns["mask"] = columns["mask"][attended]
    result = optimise(objective, Rows(MicroBatch(attended.sum(1), columns), logps))
    logps.backward(result.gradient)
    assert logits.grad is not None
    return result.value, float(logits.grad.norm()), result.metrics


@cases("cpo/full", "orpo/full")
def test_a_whole_reference_free_loss_equals_the_peer(case: dict[str, Any]) -> None:
    inputs, outputs = case["inputs"], case["outputs"]
    tokens = torch.tensor([*inputs["chosen_input_ids"], *inputs["rejected_input_ids"]])
    labels = torch.tensor([*inputs["chosen_labels"], *inputs["rejected_labels"]])
    attended = torch.tensor([*inputs["chosen_attention_mask"], *inputs["rejected_attention_mask"]]).bool()
    pairs = len(tokens) // 2
    value, norm, metrics = through_logits(
        objective_for(case),
        torch.tensor(inputs["logits"], dtype=torch.float64),
        tokens,
        attended,
        mask=labels != -100,
        group=torch.arange(pairs).repeat(2),
        preferred=torch.arange(2 * pairs) < pairs,
    )
    assert (value, norm) == (pytest.approx(outputs["loss"], abs=1e-6), pytest.approx(outputs["grad_norm"], abs=1e-6))
    of_tokens = ("logps/", "logits/")  # the peer calls a reference-free score `logps`; ours are sums for every method
    expected = {name: value for name, value in outputs["metrics"].items() if not name.startswith(of_tokens)}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-5)


@cases("tpo/")
def test_tpo_equals_the_peer(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    tokens = torch.tensor(inputs["input_ids"])
    mask = torch.tensor(inputs["completion_mask"]).bool()
    triples = len(tokens) // 3
    side = torch.arange(len(tokens)) // triples
    value, norm, _ = through_logits(
        objective_for(case),
        torch.tensor(inputs["logits"], dtype=torch.float64),
        tokens,
        torch.ones_like(mask),
        mask=mask,
        group=torch.arange(triples).repeat(3),
        preferred=side == 0,
        imitated=side == 2,
    )
    assert (value, norm) == (
        pytest.approx(case["outputs"]["loss"], abs=1e-6),
        pytest.approx(case["outputs"]["grad_norm"], abs=1e-6),
    )


# Policy gradient


def sampled_rows(inputs: dict[str, Any]) -> tuple[Rows, list[list[int]]]:
    mask = torch.tensor(inputs["completion_mask"])
    mask = mask * torch.tensor(inputs["tool_mask"]) if inputs["tool_mask"] is not None else mask
    old = torch.tensor(inputs["old_per_token_logps"], dtype=torch.float64)
    columns = {
        "old_logps": padded(inputs["old_per_token_logps"]),
        "ref_logps": padded(inputs["ref_per_token_logps"]),
        "advantages": torch.tensor(inputs["advantages"], dtype=torch.float64).repeat_interleave(mask.shape[1] + 1),
        "sample_logps": padded((old - _log_of_ratio(inputs, mask)).tolist()),
    }
    return rows_of(inputs["per_token_logps"], mask.tolist(), {"entropy": inputs["entropies"]}, **columns), mask.tolist()


def _log_of_ratio(inputs: dict[str, Any], mask: Tensor) -> Tensor:
    """By how much each token's old log-probability exceeds the sampler's: as given, or a row's one number on its first
    token."""
    if inputs["importance_sampling_ratio"] is None:
        return torch.zeros(mask.shape, dtype=torch.float64)
    given = torch.tensor(inputs["importance_sampling_ratio"], dtype=torch.float64).log()
    if given.shape == mask.shape:
        return given
    spread = torch.zeros(mask.shape, dtype=torch.float64)
    spread[torch.arange(len(mask)), mask.argmax(1)] = given[:, 0]
    return spread


@cases("grpo/", without=("grpo/mask_truncated",))
def test_grpo_equals_the_peer(case: dict[str, Any]) -> None:
    assert_policy_gradient_equals(case, *policy_gradient_of(case))


def policy_gradient_of(case: dict[str, Any]) -> tuple[Result, Result]:
    """The whole loss, and without its entropy bonus."""
    (method, options), inputs = ours(case), case["inputs"]
    rows, mask = sampled_rows(inputs)
    if options["loss_type"] == "vespo" and inputs["importance_sampling_ratio"] is not None:
        rows = _summed_over_padding(rows, inputs, mask)
    without = {**options, "entropy_coef": 0.0}
    whole, plain = (optimise(objective_of(method, each), rows) for each in (options, without))
    return whole, plain


def assert_policy_gradient_equals(case: dict[str, Any], whole: Result, plain: Result) -> None:
    """The peer divides the bonus by its number of micro-batches, and the rest by something else for some losses."""
    config, outputs, (_, mask) = case["config"], case["outputs"], sampled_rows(case["inputs"])
    factor, bonus = _denominator(config, case["inputs"], mask), whole.value - plain.value
    assert plain.value / factor + bonus / config["ga"] == pytest.approx(outputs["loss"], abs=1e-6)
    found = unpadded(whole.gradient, len(mask)) / factor
    expected = torch.tensor(outputs["grad_per_token_logps"]).double() * torch.tensor(mask)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    if outputs["grad_entropies"] is not None:
        of_entropies = unpadded(whole.extra_gradients["entropy"], len(mask)) / config["ga"]
        expected = torch.tensor(outputs["grad_entropies"], dtype=torch.float64)
        torch.testing.assert_close(of_entropies, expected, atol=1e-6, rtol=1e-6)


def _summed_over_padding(rows: Rows, inputs: dict[str, Any], mask: list[list[int]]) -> Rows:
    """The peer sums a row's ratios over its padding, too (where its trainer has zeros): on the first token, here."""
    moved = dict(inputs, importance_sampling_ratio=None)
    total = torch.tensor(inputs["importance_sampling_ratio"], dtype=torch.float64).log().sum(1)
    moved["importance_sampling_ratio"] = total.exp()[:, None].tolist()
    return sampled_rows(moved)[0]


def _denominator(config: dict[str, Any], inputs: dict[str, Any], mask: list[list[int]]) -> float:
    """By how much the peer's denominator exceeds ours: it counts micro-batches, or tokens of a batch that is not here;
    and rows without a token, which are in no count of ours."""
    learned = [sum(row) for row in mask]
    match config["loss_type"]:
        case "dapo" | "cispo" | "vespo":
            return inputs["num_items_in_batch"] * config["ga"] / config.get("spg", config["ga"]) / sum(learned)
        case "bnpo":
            return config["ga"]
        case _:
            return config["ga"] * len(mask) / sum(map(bool, learned))


def variant(name: str, inputs: dict[str, Any] | None = None, **config: Any) -> dict[str, Any]:
    """A case with other settings: its numbers are not the peer's."""
    case = CASES[name]
    return {**case, "config": {**case["config"], **config}, "inputs": {**case["inputs"], **(inputs or {})}}


def test_the_constant_that_dr_grpo_divides_by_is_the_peers() -> None:
    rows, mask = sampled_rows(CASES["grpo/bnpo"]["inputs"])
    found, tokens = (policy_gradient_of(variant("grpo/bnpo", loss_type=name))[0].value for name in ("dr_grpo", "bnpo"))
    longest = CASES["grpo/bnpo"]["inputs"]["max_completion_length"]
    assert longest == 10
    assert found * len(rows) * longest == pytest.approx(tokens * np.sum(mask), abs=1e-9)


def test_a_correction_per_token_is_told_from_one_per_row() -> None:
    per_token = CASES["grpo/vespo_isr"]["inputs"]["importance_sampling_ratio"]
    case = variant("grpo/dapo", {"importance_sampling_ratio": per_token})
    assert ours(case)[1]["correction"] == "token_truncate"
    assert ours(CASES["grpo/dapo_tis_seq"])[1]["correction"] == "sequence_truncate"
    corrected, plain = (policy_gradient_of(each)[0].gradient for each in (case, CASES["grpo/dapo"]))
    rows = len(per_token)
    torch.testing.assert_close(
        unpadded(corrected, rows), unpadded(plain, rows) * torch.tensor(per_token, dtype=torch.float64)
    )


def test_tokens_of_a_tool_are_in_no_sum_and_in_no_count() -> None:
    """The peer's number of items leaves them out; the same rows without a tool's tokens are the same batch."""
    tools = CASES["grpo/grpo_toolmask_seq"]["inputs"]["tool_mask"]
    both = np.array(tools) * np.array(CASES["grpo/dapo"]["inputs"]["completion_mask"])
    assert both.sum() < np.sum(CASES["grpo/dapo"]["inputs"]["completion_mask"])
    masked = policy_gradient_of(variant("grpo/dapo", {"tool_mask": tools}))[0]
    absent = policy_gradient_of(variant("grpo/dapo", {"completion_mask": both.tolist()}))[0]
    assert masked.value == pytest.approx(absent.value, abs=1e-12) and masked.value != 0
    torch.testing.assert_close(masked.gradient, absent.gradient)


def test_every_key_of_the_peers_policy_gradient_has_a_name_of_ours() -> None:
    assert set(GRPO_NAMES.values()) <= signature(METHODS["grpo"]).parameters.keys()


def _times(outputs: dict[str, Any], factor: float) -> dict[str, Any]:
    return {
        "loss": outputs["loss"] * factor,
        "grad_per_token_logps": (torch.tensor(outputs["grad_per_token_logps"]).double() * factor).tolist(),
    }


@cases("gmpo/", "gspo_token/")
def test_its_relatives_equal_the_peer(case: dict[str, Any]) -> None:
    assert_equal(optimise(objective_for(case), _simple(case)), case, "grad", case["inputs"]["mask"])


def _simple(case: dict[str, Any]) -> Rows:
    inputs = case["inputs"]
    advantages = torch.tensor(inputs["advantages"], dtype=torch.float64)
    width = len(inputs["mask"][0])
    per_token = advantages if advantages.dim() == 2 else advantages[:, None].expand(-1, width)
    columns = {"old_logps": padded(inputs["old"]), "advantages": padded(per_token.tolist())}
    columns |= {"ref_logps": padded(inputs["ref"])} if "ref" in inputs else {}
    return rows_of(inputs["per_token_logps"], inputs["mask"], **columns)


@cases("dppo/")
def test_dppo_masks_the_tokens_that_the_peer_masks(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    mask = [[1] * len(row) for row in inputs["logps"]]
    width = len(mask[0])
    rows = rows_of(
        inputs["logps"],
        mask,
        sample_logps=padded(inputs["sampling_logps"]),
        advantages=padded([row * width for row in inputs["advantages"]]),
    )
    learned = unpadded(optimise(objective_for(case), rows).gradient, len(mask)) != 0
    assert learned.double().tolist() == case["outputs"]["mask"]


@cases("async_grpo/loss")
def test_the_ratio_against_the_sampler_equals_the_peer(case: dict[str, Any]) -> None:
    """Its asynchronous trainer clips against the sampler's log-probabilities and divides by global tokens."""
    inputs, config = case["inputs"], case["config"]
    mask = [[1] * len(inputs["log_probs"])]
    rows = rows_of(
        [inputs["log_probs"]],
        mask,
        sample_logps=padded([inputs["old_log_probs"]]),
        advantages=padded([inputs["advantages"]]),
    )
    surrogate = partial(clipped, epsilon=config["epsilon"], epsilon_high=config["epsilon_high"])
    result = optimise(LossObjective(policy_gradient, token_mean, {"surrogate": surrogate, "old": "sampler"}), rows)
    outputs = _times({"loss": case["outputs"]["loss"], "grad_per_token_logps": [case["outputs"]["grad"]]}, config["ga"])
    assert_equal(result, {"outputs": outputs}, "grad_per_token_logps", mask)


@cases("grpo_vllm_is/")
def test_the_engine_correction_equals_the_peer(case: dict[str, Any]) -> None:
    old, sampler = case["inputs"]["old_per_token_logps"], case["inputs"]["sampling_per_token_logps"]
    lengths = torch.tensor([len(row) for row in old])
    logps, sample_logps = (
        torch.tensor([x for row in rows for x in row], dtype=torch.float64) for rows in (old, sampler)
    )
    everything = torch.ones(len(logps), dtype=torch.bool)
    view = PolicyTokens(
        micro=MicroBatch(lengths, {}),
        logps=logps,
        mask=everything,
        shared={},
        advantages=torch.ones_like(logps),
        sample_logps=sample_logps,
    )
    config = case["config"]
    weight, _ = engine_correction(view, logps, config["mode"], config["clip_min"], config["clip_max"])
    expected = [row if len(row) > 1 else row * int(n) for row, n in zip(case["outputs"]["ratio"], lengths, strict=True)]
    flat = torch.tensor([x for row, n in zip(expected, lengths, strict=True) for x in row[:n]], dtype=torch.float64)
    torch.testing.assert_close(weight, flat, atol=1e-6, rtol=1e-6)


@cases("grpo/mask_truncated")
def test_truncated_completions_are_masked_as_the_peer_masks_them(case: dict[str, Any]) -> None:
    completions = case["inputs"]["completion_ids"]
    lengths = [len(completion) for completion in completions]
    batch = Batch.build(lengths, mask=np.ones(sum(lengths), bool), truncated=[c[-1] != 1 for c in completions])
    rows = RowTable(batch)
    mask = rows.with_values(**mask_truncated(rows)).whole().shard.fetched([]).batch["mask"]
    assert int(mask.sum()) == case["outputs"]["num_items_in_batch"]
    expected = np.array(case["outputs"]["completion_mask"])
    assert batch.sum_by_row(mask).tolist() == expected.sum(axis=1).tolist()


@cases("grpo_adv/")
def test_advantages_equal_the_peer(case: dict[str, Any]) -> None:
    inputs, config = case["inputs"], case["config"]
    rewards = np.array([[np.nan if r in (None, "nan") else r for r in row] for row in inputs["rewards_per_func"]])
    weights = np.array(inputs["weights"])
    table = RowTable(
        Batch.build(
            [1] * len(rewards),
            reward=weighted_sum(rewards, weights),
            reward_parts=rewards,
            reward_weights=np.tile(weights, (len(rewards), 1)),
            group=np.arange(len(rewards)) // inputs["num_generations"],
        )
    )
    aggregation = config.get("multi_objective_aggregation", "sum_then_normalize")
    scale = {} if aggregation == "normalize_then_sum" else {"scale_rewards": config["scale_rewards"]}
    found = credited(build("grpo", {"multi_objective_aggregation": aggregation, **scale}), table)
    np.testing.assert_allclose(found["advantages"], case["outputs"]["advantages"], atol=1e-4)
    assert found["learned"].tolist() == (~np.isnan(rewards).all(axis=1)).tolist()


@cases("rloo/")
def test_the_ratio_of_whole_completions_equals_the_peer(case: dict[str, Any]) -> None:
    """Its old log-probabilities are sums over a row: on the first token, here."""
    inputs = case["inputs"]
    mask = inputs["completion_mask"]
    old = [[total, *([0.0] * (len(row) - 1))] for total, row in zip(inputs["old_logps"], mask, strict=True)]
    advantages = padded([[value] * len(row) for value, row in zip(inputs["advantages"], mask, strict=True)])
    rows = rows_of(inputs["per_token_logps"], mask, old_logps=padded(old), advantages=advantages)
    assert_equal(optimise(objective_for(case), rows), case, "grad_per_token_logps", mask)


@cases("rloo_adv/")
def test_leave_one_out_advantages_equal_the_peer(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    old, ref = np.array(inputs["old_per_token_logps"]), np.array(inputs["ref_per_token_logps"])
    rows, width = old.shape
    rewards = np.array([np.nan if reward == "nan" else reward for reward in inputs["rewards"]])
    batch = Batch.build(
        [width] * rows,
        mask=np.ones(old.size, bool),
        reward=rewards,
        group=np.arange(rows) // inputs["num_generations"],
        old_logps=old.flatten(),
        ref_logps=ref.flatten(),
    )
    found = credited(build(*ours(case)), RowTable(batch))
    np.testing.assert_allclose(found["advantages"], case["outputs"]["advantages"], atol=1e-5)
    assert found["learned"].tolist() == (~np.isnan(rewards)).tolist()


def credited(pipeline: Pipeline, table: RowTable) -> RowTable:
    """What the credit stages make of rows, all of which one rank has."""
    for stage in pipeline:
        if stage.verb is Verb.CREDIT:
            assert stage.call is not None
            if stage.reads_tokens:
                columns, _ = stage.call(table.whole().shard.fetched([]).batch, SoloWorld(), {}, **stage.options)
            else:
                columns = stage.call(table, **stage.options)
            table = table.with_values(**columns)
    return table


# PPO


def peers_rows(case: dict[str, Any]) -> tuple[Batch, np.ndarray]:
    """A peer's rows end one token after their last real one, unless they are cut there: that is where it puts the
    score, with a value and without a KL. So these are ours, every token trained; and [R, C] bool: where they stand."""
    inputs, last = case["inputs"], np.array(case["outputs"]["sequence_lengths"])
    place = np.arange(len(inputs["logprobs"][0]))
    real, lasting = place <= last[:, None], place <= last[:, None] + 1
    old, ref = np.array(inputs["logprobs"]), np.array(inputs["ref_logprobs"])
    batch = Batch.build(
        lasting.sum(1),
        mask=np.ones(int(lasting.sum()), bool),
        old_logps=old[lasting],
        ref_logps=np.where(real, ref, old)[lasting],
        values=np.array(inputs["values"])[lasting],
        reward=inputs["scores_after_eos_penalty"],
    )
    return batch, lasting


@cases("ppo/run")
def test_returns_advantages_and_metrics_equal_the_peer(case: dict[str, Any]) -> None:
    config, outputs = case["config"], case["outputs"]
    name, options = ours(case)
    credits = {getattr(stage.call, "__name__", ""): stage for stage in build(name, options) if stage.verb == "credit"}
    batch, lasting = peers_rows(case)
    for wanted in ("kl_in_reward", "generalised_advantages"):
        stage = credits[wanted]
        assert stage.call is not None
        columns, metrics = stage.call(batch, SoloWorld(), {}, **{**stage.options, **WITHOUT_WHITENING.get(wanted, {})})
        batch = batch.with_columns(**columns)
        for metric in metrics.keys() & outputs["logs"].keys() - {"objective/entropy"}:  # of the token past the end, too
            found = float(metrics[metric].total) / float(metrics[metric].weight)
            assert found == pytest.approx(outputs["logs"][metric], abs=1e-6)
    np.testing.assert_allclose(batch["advantages"], np.array(outputs["raw_advantages"])[lasting], atol=1e-5)
    np.testing.assert_allclose(batch["returns"], np.array(outputs["returns"])[lasting], atol=1e-5)
    real = np.array(outputs["whitened_advantages"]) != 0
    whitened_by_peer = whitened(np.array(outputs["raw_advantages"])[real], SoloWorld())
    np.testing.assert_allclose(whitened_by_peer, np.array(outputs["whitened_advantages"])[real], atol=1e-5)
    assert config["whiten_rewards"] is False


WITHOUT_WHITENING: dict[str, dict[str, Any]] = {"generalised_advantages": {"whiten": False}}


@cases("ppo/run")
def test_the_losses_of_policy_and_value_equal_the_peer(case: dict[str, Any]) -> None:
    outputs, logs = case["outputs"], case["outputs"]["logs"]
    batch, lasting = peers_rows(case)
    batch = batch.with_columns(returns=np.array(outputs["returns"])[lasting].astype(np.float32))
    value = updated_by(case, "value", batch, batch["values"])
    assert value.value == pytest.approx(outputs["value_loss"], abs=1e-4)
    assert value.metrics["val/clipfrac_avg"] == logs["val/clipfrac_avg"]
    advantages = np.array(outputs["whitened_advantages"])[lasting].astype(np.float32)
    batch = batch.with_columns(advantages=advantages, mask=advantages != 0)  # the token past the end is no policy's
    policy = updated_by(case, "policy", batch, batch["old_logps"])
    assert policy.value == pytest.approx(outputs["policy_loss"], abs=1e-6)
    assert policy.metrics["policy/ratio_avg"] == logs["val/ratio"]
    for metric in ("policy/approxkl_avg", "policy/clipfrac_avg"):
        assert policy.metrics[metric] == logs[metric]


def updated_by(case: dict[str, Any], role: str, batch: Batch, said: np.ndarray) -> Result:
    """The loss of a role's update, whose model says of every token what it said before."""
    (stage,) = (stage for stage in build(*ours(case)).updates if stage.role == role)
    return optimise(LossObjective.of(stage), Rows(MicroBatch.of(batch), torch.tensor(said, dtype=torch.float64)))


@cases("ppo/masked_whiten")
def test_whitening_equals_the_peer(case: dict[str, Any]) -> None:
    mask = np.array(case["inputs"]["mask"])
    found = whitened(np.array(case["inputs"]["values"])[mask], SoloWorld(), shift_mean=case["id"].endswith("True"))
    np.testing.assert_allclose(found, np.array(case["outputs"]["out"])[mask], atol=1e-6)


@cases("utils/entropy_logsoftmax")
def test_log_probabilities_and_entropies_of_a_head_equal_the_peer(case: dict[str, Any]) -> None:
    """The head's input are the logits: its projection is the identity. Entropies are at temperature 1 in the peer."""
    logits = torch.tensor(case["inputs"]["logits"]).flatten(0, 1)
    expected = {name: torch.tensor(values).flatten() for name, values in case["outputs"].items()}
    projection = nn.Linear(logits.shape[1], logits.shape[1], bias=False)
    projection.weight = nn.Parameter(torch.eye(logits.shape[1]))
    head = VocabularyHead(projection, LogitScaling())
    wanted = (logits / 0.7).log_softmax(-1)
    tokens = (wanted - expected["logp"][:, None]).abs().argmin(1)  # which ones the peer took
    found = head(logits, tokens, 0.7, frozenset(), None)["main"]
    torch.testing.assert_close(found, expected["logp"], atol=1e-6, rtol=1e-6)
    entropies = head(logits, tokens, 1.0, frozenset({"entropy"}), None)["entropy"]
    torch.testing.assert_close(entropies, expected["entropy"], atol=1e-6, rtol=1e-6)


# Reward models


@cases("reward/")
def test_a_reward_models_loss_equals_the_peer(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    scores = torch.tensor([*inputs["rewards_chosen"], *inputs["rewards_rejected"]], dtype=torch.float64)
    pairs = len(scores) // 2
    columns = {
        "mask": torch.tensor([False, True] * 2 * pairs),
        "group": torch.arange(pairs).repeat(2),
        "preferred": torch.arange(2 * pairs) < pairs,
    }
    if inputs["margin"] is not None:
        columns["margin"] = torch.tensor(inputs["margin"], dtype=torch.float64).repeat(2)
    rows = Rows(MicroBatch(torch.full((2 * pairs,), 2), columns), scores, per_row=True)
    result = optimise(objective_for(case), rows)
    assert result.value == pytest.approx(case["outputs"]["loss"], abs=1e-6)
    torch.testing.assert_close(result.gradient, torch.tensor(case["outputs"]["grad"]).double(), atol=1e-6, rtol=1e-6)


# Process reward models


def tokenizer_of_the_peer(case: dict[str, Any]) -> PreTrainedTokenizerBase:
    """One token per character, after one that begins a sequence; a space or a line break is none."""
    inputs, ids = case["inputs"], case["outputs"]["input_ids"]
    text = "".join(("".join([inputs["prompt"], *inputs["completions"]])).split())
    vocabulary = {"<unk>": 0, "<bos>": ids[0], **dict(zip(text, ids[1:], strict=True))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Sequence([Whitespace(), Split("", "isolated")])
    words.post_processor = TemplateProcessing("<bos> $A", None, [("<bos>", ids[0])])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>", unk_token="<unk>")


@cases("prm/")
def test_steps_and_their_labels_equal_the_peer(case: dict[str, Any], tmp_path: Path) -> None:
    inputs, (method, options) = case["inputs"], ours(case)
    file = write_rows(tmp_path / "steps.jsonl", [inputs])
    batch = opened(file, build(method, options).data, tokenizer_of_the_peer(case)).item(0).batch
    assert batch["tokens"].tolist() == case["outputs"]["input_ids"]
    assert batch["step_label"].tolist() == [-1 if label == -100 else label for label in case["outputs"]["labels"]]


# Weights that move besides training


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
