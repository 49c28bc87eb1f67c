"""Data that a phase makes: records of completions, their files, and what is known of them before they are there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from actors.batch import Batch
from actors.errors import ConfigError, DataError
from orchestrator.batches.records import (
    Answered,
    completions_with_rewards,
    labelled_completions,
    pairs,
    scored_completions,
    scored_pairs,
)
from orchestrator.batches.regrouping import (
    accepted,
    best,
    ended,
    first_against_others,
    labelled,
    last_turn,
    last_turn_over_first,
    statistical_rejection,
)
from orchestrator.batches.row_table import RowTable
from orchestrator.batches.written_data import Output
from orchestrator.config.schema import DataConfig, RunConfig
from orchestrator.data.formats import carried
from orchestrator.data.parts import Parts, is_complete
from orchestrator.data.source import open_source
from orchestrator.methods import build
from orchestrator.pipeline import AnsweredPrompts, Prompts, Verb, generate, regroup, score, take, write
from orchestrator.pipeline import Pipeline as Stages
from orchestrator.planning.resolve import prepare
from tests.conversations import TEMPLATE
from tests.unit.source_stub import write_rows
from tests.unit.tiny import tiny_model_folder, tiny_tokenizer


def group(rewards: list[float], **columns: Any) -> RowTable:
    """The samples of one prompt."""
    numbers = np.array(rewards, np.float32)
    return RowTable(Batch.build([2] * len(rewards), reward=numbers, group=[3] * len(rewards), **columns))


def answered(*completions: Any, prompt: Any = "p", **columns: Any) -> Answered:
    return Answered(prompt, completions, {name: np.array(values) for name, values in columns.items()})


# Which samples are kept


def test_the_best_samples_are_those_with_the_highest_rewards_and_unscored_ones_take_no_part() -> None:
    table = best(group([1.0, np.nan, 3.0, 3.0, 2.0]), count=2)
    assert table is not None and table["reward"].tolist() == [3.0, 3.0]
    assert best(group([np.nan, np.nan]), count=1) is None


def test_a_sample_is_accepted_from_the_threshold_on_and_labelled_by_it() -> None:
    table = accepted(group([0.4, 0.5, np.nan, 0.9]), threshold=0.5)
    assert table is not None and table["reward"].tolist() == pytest.approx([0.5, 0.9])
    told = labelled(group([0.4, 0.5, np.nan, 0.9]), threshold=0.5)
    assert told["label"].tolist() == [False, True, True]


def test_samples_that_hit_their_limit_are_left_out_by_name() -> None:
    assert ended(group([1.0, 2.0, 3.0], truncated=[True, False, True]))["reward"].tolist() == [2.0]


def test_the_data_s_own_completion_is_preferred_to_each_sample() -> None:
    table = first_against_others(group([5.0, 1.0, 2.0], sampler=np.array([0, 1, 1], np.int8)))
    assert table is not None and table["reward"].tolist() == [5.0, 1.0, 5.0, 2.0]
    assert table["preferred"].tolist() == [True, False, True, False]
    assert first_against_others(group([5.0], sampler=np.array([0], np.int8))) is None


def test_of_episodes_that_came_to_their_end_the_last_turn_is_kept_or_preferred_to_the_first() -> None:
    episodes, turns = [7, 7, 7, 2, 2, 5, 9, 9], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    cut = [False] * 3 + [True] * 2 + [False] * 3
    table = group(turns, episode=episodes, truncated=cut)
    kept, pair = last_turn(table), last_turn_over_first(table)
    assert kept is not None and kept["reward"].tolist() == [2.0, 5.0, 7.0]
    assert pair is not None and pair["reward"].tolist() == [2.0, 0.0, 7.0, 6.0]
    assert pair["preferred"].tolist() == [True, False] * 2
    assert last_turn_over_first(group([1.0], episode=[0], truncated=[False])) is None
    assert last_turn(group([1.0], episode=[0], truncated=[True])) is None


def test_statistical_rejection_pairs_what_it_accepts_and_the_higher_reward_is_preferred() -> None:
    rewards = np.linspace(0, 1, 32).tolist()
    table = statistical_rejection(group(rewards), beta=0.1, count=8)
    assert table is not None and len(table) == 8 and len(set(table["reward"].tolist())) == 8
    assert all(table["reward"][::2] > table["reward"][1::2])
    assert table["preferred"].tolist() == [True, False] * 4
    again = statistical_rejection(group(rewards), beta=0.1, count=8)
    assert again is not None and again["reward"].tolist() == table["reward"].tolist()


def test_a_small_beta_accepts_the_best_and_a_large_one_any_sample() -> None:
    """The expected share of each reward under `exp((r - max) / beta)`, over many groups."""

    def mean(beta: float) -> float:
        found: list[float] = []
        for position in range(200):
            columns = {"reward": np.arange(16, dtype=np.float32) / 16, "group": [position] * 16}
            table = statistical_rejection(RowTable(Batch.build([2] * 16, **columns)), beta=beta, count=4)
            found += [] if table is None else table["reward"].tolist()
        return float(np.mean(found))

    assert mean(1e-3) == pytest.approx((12 + 13 + 14 + 15) / 64, abs=1e-6)  # one after the other, the best first
    assert mean(1e3) == pytest.approx(15 / 32, abs=0.03)
    weights = np.exp(np.arange(16) / 16 / 0.5)
    assert mean(0.5) == pytest.approx(float((weights * np.arange(16) / 16).sum() / weights.sum()), abs=0.03)


def test_statistical_rejection_of_equal_rewards_gives_no_pair() -> None:
    assert statistical_rejection(group([1.0] * 6), beta=0.5, count=4) is None


# Records


def test_a_pair_has_the_preferred_side_first_with_both_scores_and_is_left_out_if_its_texts_say_nothing() -> None:
    sides = answered("bad", "good", "same", "same", "good", " ", preferred=[False, True, True, False, True, False])
    assert pairs(sides) == [{"prompt": "p", "chosen": "good", "rejected": "bad"}]
    scored = answered("bad", "good", preferred=[False, True], reward=[0.25, np.nan])
    assert scored_pairs(scored) == [
        {"prompt": "p", "chosen": "good", "rejected": "bad", "score_chosen": None, "score_rejected": 0.25}
    ]


def test_what_could_not_be_scored_has_no_reward_and_blank_completions_are_written_only_where_all_are() -> None:
    said = answered("a", "", truncated=[False, True], reward=[np.nan, 2.0], reward_parts=[[np.nan, 4.0], [2.0, 0.0]])
    first = {"prompt": "p", "completion": "a", "truncated": False, "reward": None}
    second = {"prompt": "p", "completion": "", "truncated": True, "reward": 2.0}
    assert scored_completions(said) == [first]
    assert completions_with_rewards(replace(said, index=7, reward_names=("right", "short"))) == [
        {"prompt_index": 7, **first, "rewards/right": None, "rewards/short": 4.0},
        {"prompt_index": 7, **second, "rewards/right": 2.0, "rewards/short": 0.0},
    ]
    told = answered("a", "b", label=[True, False], reward=[1.0, 0.0])
    assert [record["label"] for record in labelled_completions(told)] == [True, False]


def test_columns_that_would_be_read_as_another_answer_do_not_go_on() -> None:
    names = ("prompt", "answer", "completion", "chosen", "label", "tools", "input_ids", "margin")
    assert carried(names) == ("answer", "tools")


# Files


def test_a_part_is_replaced_as_a_whole_and_later_ones_are_made_again(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "data")
    parts.begin(0)
    for step in (1, 2, 3):
        parts.write(step, [{"prompt": f"p{step}"}])
    parts.finish()
    (tmp_path / "data" / ".part-000004.parquet.tmp").write_text("half")
    assert is_complete(tmp_path / "data")
    parts.begin(2)
    assert sorted(file.name for file in (tmp_path / "data").iterdir()) == ["part-000001.parquet", "part-000002.parquet"]
    parts.write(2, [{"prompt": "other"}])
    assert parquet.read_table(tmp_path / "data" / "part-000002.parquet").to_pylist() == [{"prompt": "other"}]


def test_parts_with_other_types_have_the_same_ones_at_the_end(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "data")
    parts.begin(0)
    parts.write(1, [{"prompt": "a", "tags": [], "answer": 1, "info": 1, "only": None}])
    parts.write(2, [{"prompt": "b", "tags": ["x"], "answer": 0.5, "info": "one"}])
    assert parts.finish() == 2
    tables = [parquet.read_table(file) for file in sorted((tmp_path / "data").glob("*.parquet"))]
    assert tables[0].schema.equals(tables[1].schema)
    assert [row for table in tables for row in table.select(["prompt", "tags", "answer", "info"]).to_pylist()] == [
        {"prompt": "a", "tags": [], "answer": 1.0, "info": "1"},
        {"prompt": "b", "tags": ["x"], "answer": 0.5, "info": "one"},
    ]


def test_a_data_set_without_a_record_is_an_error(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "data")
    parts.begin(0)
    parts.write(1, [])
    with pytest.raises(DataError, match="no completion of any prompt was kept"):
        parts.finish()
    assert not is_complete(tmp_path / "data")


def test_completions_of_conversations_are_the_assistant_s_turns_and_can_be_read_as_pairs(tmp_path: Path) -> None:
    words = tiny_tokenizer()
    words.chat_template = TEMPLATE
    asked = [[{"role": "user", "content": f"what is {i}?"}] for i in range(2)]
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": messages, "answer": i} for i, messages in enumerate(asked)])
    data = DataConfig(path=str(file), shuffle=False)
    source = open_source(data, Prompts, words, seed=0, model_max_length=512)
    texts = ["yes", "no", "one", "two"]
    ids = [words(text, add_special_tokens=False)["input_ids"] for text in texts]
    rows = [list(source.item(i // 2).tokens) + each for i, each in enumerate(ids)]
    masks = [[False] * (len(row) - len(each)) + [True] * len(each) for row, each in zip(rows, ids, strict=True)]
    batch = Batch.build(
        [len(row) for row in rows],
        tokens=[token for row in rows for token in row],
        mask=[learned for row in masks for learned in row],
        group=[0, 0, 1, 1],
        preferred=[True, False, False, True],
    )
    output = Output(Parts(tmp_path / "made"), source, words)
    output.parts.begin(0)
    metrics = output.write(write(pairs), batch, step=0)
    assert output.parts.finish() == 2 and metrics == {"written/records": 2.0, "written/prompts": 2.0}
    made = parquet.read_table(tmp_path / "made").to_pylist()
    assert [row["answer"] for row in made] == [0, 1]
    assert [row["prompt"] for row in made] == asked
    assert [row["chosen"] for row in made] == [[{"role": "assistant", "content": said}] for said in ("yes", "two")]
    kind = build("dpo", {}).data
    learned = open_source(DataConfig(path=str(tmp_path / "made")), kind, words, seed=0, model_max_length=512)
    assert learned.report.items == 2 and "⟦yes" in learned.preview()


# Pipelines, and what is known before


def test_the_method_of_the_documentation_writes_records_of_its_own(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "methods" / "generate_data.md").read_text()
    file = tmp_path / "my_data.py"
    file.write_text(page.split("```python\n")[1].split("```")[0])
    pipeline = build(f"{file}:with_lengths", {"num_generations": 2})
    assert pipeline.written_columns == ("prompt", "completion", "tokens") and pipeline.samples_per_prompt == 2
    (written,) = pipeline.learn
    assert written.call is not None and "completion_tokens" in written.reads
    made = written.call(answered("ab", "c", completion_tokens=[2, 1]))
    assert [(row["completion"], row["tokens"]) for row in made] == [("ab", 2), ("c", 1)]


def test_a_phase_makes_one_data_set_and_what_it_writes_is_learning_s_part() -> None:
    pipeline = build("generate_data", {"num_generations": 2, "keep": "best_and_worst"})
    assert [stage.verb for stage in pipeline.learn] == [Verb.WRITE] and pipeline.trained == ()
    assert pipeline.held_out is None and not pipeline.draws_again
    with pytest.raises(ConfigError, match="several stages write"):
        Stages(AnsweredPrompts, take(), generate(), regroup(first_against_others), write(pairs), write(pairs))
    with pytest.raises(ConfigError, match="reads preferred, which no earlier stage writes"):
        Stages(Prompts, generate(), score(), write(pairs))


def chained(tmp_path: Path, learning: dict[str, Any], **options: Any) -> RunConfig:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"a{i}", "answer": str(i)} for i in range(8)])
    making = {
        "method": "generate_data",
        "options": {"num_generations": 2, "keep": "best_and_worst", **options},
        "data": {"path": str(rows)},
        "train": {"epochs": 1, "batch_size": 4},
        "sampling": {"max_tokens": 4},
    }
    learning = {"data": {"path": "${phases.making.output}"}, "train": {"steps": 2, "batch_size": 4}, **learning}
    tree = {
        "model": {"path": str(tiny_model_folder(tmp_path, hidden=32))},
        "roles": {"rollout": {"engine": "hf"}},
        "phases": {"making": making, "learning": learning},
        "rewards": [{"fn": "exact_match"}],
    }
    return RunConfig.model_validate(tree)


def test_a_phase_that_learns_from_what_another_makes_is_planned_by_its_columns(tmp_path: Path) -> None:
    ready = prepare(chained(tmp_path, {"method": "dpo"}))
    making, learning = ready.phases
    assert learning.awaits_data and learning.steps == 2 and learning.first_version == making.steps == 2
    assert learning.source.report.columns == (
        *("prompt", "chosen", "rejected", "score_chosen", "score_rejected"),
        "answer",
    )
    assert "what phase making writes" in learning.source.report.lines()[0]
    assert learning.drawn == "2 steps of 4 pairs"
    assert learning.source.longest.row == making.source.longest.prompt + 4
    with pytest.raises(DataError, match="is read when that phase has ended"):
        learning.source.batch([0])


@pytest.mark.parametrize(
    ("learning", "said"),
    [
        ({"method": "sft"}, "what phase making writes has no column 'completion'"),
        ({"method": "dpo", "data": {"path": "${phases.learning.output}"}}, "with NAME one of making"),
        ({"method": "dpo", "data": {"path": "${phases.making.model}"}}, "with NAME one of making"),
        (
            {"method": "dpo", "train": {"epochs": 1, "batch_size": 4}},
            "data that the run makes itself cannot be counted",
        ),
        (
            {"method": "dpo", "evaluation": {"rows": {"path": "${phases.making.output}"}}},
            "what is held out is read before the run",
        ),
    ],
)
def test_what_cannot_be_handed_on_is_refused_before_anything_starts(
    tmp_path: Path, learning: dict[str, Any], said: str
) -> None:
    with pytest.raises((ConfigError, DataError)) as caught:
        prepare(chained(tmp_path, learning))
    assert said in str(caught.value)


def test_data_may_be_a_mixture_with_what_a_phase_makes(tmp_path: Path) -> None:
    other = tmp_path / "pairs.jsonl"
    other.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    entries = [{"path": "${phases.making.output}", "fraction": 1}, {"path": str(other), "fraction": 1}]
    ready = prepare(chained(tmp_path, {"method": "dpo", "data": {"mixture": entries}}))
    assert ready.phases[1].awaits_data
