"""What a process reward model says of the steps of an answer becomes one reward."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.batch import Batch
from actors.columns import Head
from actors.errors import ConfigError, DataFailure
from actors.model import ModelSpec
from actors.model_worker import ModelWorker
from actors.specs import BackendSpec, OptimSpec
from actors.worker import Ref
from orchestrator.batches.row_table import RowTable
from orchestrator.collection.model_scorer import ModelScorer
from orchestrator.credit.step_rewards import Aggregate, Steps, reward_of_steps, step_ends
from orchestrator.losses.likelihood import nll
from orchestrator.losses.reduce import token_mean
from orchestrator.pipeline import Completions, Pipeline, update
from tests.local_executor import in_process, local_executor
from tests.unit.tiny import tiny_model_folder, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
STEPS = Steps("min", ";").found_in(TOKENIZER)


def answers(*texts: str, prompt: str = "1+1=", eos: bool = True) -> Batch:
    """Rows of the prompt and an answer each, which is written by the model, its end included."""
    head = TOKENIZER.encode(prompt)
    rows = [[*head, *TOKENIZER.encode(text), *([EOS] if eos else [])] for text in texts]
    mask = [position >= len(head) for row in rows for position in range(len(row))]
    return Batch.build([len(row) for row in rows], tokens=np.concatenate(rows), mask=mask)


def ended(batch: Batch) -> list[list[str]]:
    """The text of each row up to each end of a step, without what was before."""
    ends, rows = step_ends(batch, STEPS), batch.row_of_token
    starts = np.cumsum([0, *batch.lengths[:-1]])
    return [
        [TOKENIZER.decode(batch["tokens"][starts[row] : end + 1]) for end in ends[rows[ends] == row]]
        for row in range(len(batch))
    ]


def test_steps_end_at_separators_after_text_and_at_the_end_of_an_answer() -> None:
    found = ended(answers("a;b;c", "a;;b;", ";a", "", "ab"))
    assert found[0] == ["1+1=a;", "1+1=a;b;", "1+1=a;b;c"]
    assert found[1] == ["1+1=a;", "1+1=a;;b;"], "a second separator ends nothing, nor does the end after one"
    assert found[2] == ["1+1=;a"], "before a separator at the beginning there is no step"
    assert found[3] == [] and found[4] == ["1+1=ab"]
    assert ended(answers("a;b", prompt="x;y=", eos=False)) == [["x;y=a;", "x;y=a;b"]], "a prompt has no steps"


@pytest.mark.parametrize(
    ("aggregate", "reward"), [("min", 0.2), ("product", 0.9 * 0.2 * 0.5), ("last", 0.5), ("mean", 1.6 / 3)]
)
def test_the_probabilities_of_the_steps_become_one_reward(aggregate: Aggregate, reward: float) -> None:
    batch = answers("a;b;c", "d", "")
    scalars = np.full(batch.num_tokens, 99.0, np.float32)  # where no step ends, nothing is read
    probabilities = np.array([0.9, 0.2, 0.5, 0.75])
    scalars[step_ends(batch, STEPS)] = np.log(probabilities / (1 - probabilities))
    world: Any = None
    steps = Steps(aggregate, ";").found_in(TOKENIZER)
    found, _ = reward_of_steps(batch.with_columns(step_reward=scalars), world, {}, steps=steps)
    assert found["reward"][:2] == pytest.approx([reward, 0.75]) and np.isnan(found["reward"][2])


def test_a_number_that_is_not_finite_is_a_failure_and_no_reward() -> None:
    batch = answers("a;b")
    scalars = np.zeros(batch.num_tokens, np.float32)
    scalars[step_ends(batch, STEPS)[0]] = np.nan
    world: Any = None
    with pytest.raises(DataFailure, match="not finite"):
        reward_of_steps(batch.with_columns(step_reward=scalars), world, {}, steps=STEPS)


def test_a_separator_that_no_token_holds_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"step_separator='Step 1' is in none of the tokenizer's tokens"):
        Steps("min", "Step 1").found_in(TOKENIZER)


def table(batch: Batch, group: int) -> RowTable:
    rows = Batch.build(batch.lengths, group=[group] * len(batch))
    return RowTable.of_block(rows, Ref(batch), {"tokens", "mask"})


async def test_a_role_scores_the_steps_of_groups_that_wait_together_each_as_if_alone(tmp_path: Path) -> None:
    model = ModelSpec(str(tiny_model_folder(tmp_path)), head=Head.STEP_SCALAR)
    worker = ModelWorker("prm", model, BackendSpec("single", OptimSpec(1e-3, total_steps=1)), threads=1)
    worker.ready()
    pipeline = Pipeline(Completions, update("policy", nll, reduce=token_mean))
    executor = local_executor(pipeline, {"prm": in_process("prm", worker)}, token_budget=4096)
    groups = [table(answers("a;b;c", "cc;", ""), 0), table(answers("aaaa;b", prompt="2+2="), 1)]

    def scorer(aggregate: Aggregate) -> ModelScorer:
        steps = Steps(aggregate, ";").found_in(TOKENIZER)
        return ModelScorer(partial(executor.batch_stages.scores, "prm", steps=steps))

    alone = [(await scorer("min").score(each))["reward"] for each in groups]
    shared, mean = scorer("min"), (await scorer("mean").score(groups[0]))["reward"]
    together = [each["reward"] for each in await asyncio.gather(*(shared.score(each) for each in groups))]
    assert [each.tobytes() for each in together] == [each.tobytes() for each in alone]
    assert 0 < alone[0][0] < mean[0] < 1 and np.isnan(alone[0][2]) and mean[1] == alone[0][1]

    of_steps = scorer("each")
    for rows, found in zip(groups, await asyncio.gather(*(of_steps.score(each) for each in groups)), strict=True):
        batch, values = rows.blocks[0].target, await executor.column("process_reward", found)
        ends = step_ends(batch, STEPS)
        assert np.flatnonzero(~np.isnan(values)).tolist() == ends.tolist() and (values[ends] > 0).all()
        for row, reward in enumerate(found["reward"].tolist()):
            mine = values[ends[batch.row_of_token[ends] == row]]
            assert reward == pytest.approx(float(mine.sum())) if len(mine) else np.isnan(reward)
