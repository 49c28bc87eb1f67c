"""`generate`, `score` and `evaluate` as runs: in this process, of a tiny model."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from pyarrow import parquet

from orchestrator.completions.evaluate import evaluate, report
from orchestrator.completions.generate import generate
from orchestrator.completions.score import records, score, spreads
from orchestrator.config.loading import load_run
from orchestrator.result import RunResult
from orchestrator.run import run
from tests.unit.tiny import tiny_model_folder

PROMPTS = 70  # more than a batch
REWARDS = """
def parity(completions, number, **columns):
    return [None if n == 3 else float((n + sum(map(ord, text))) % 2) for text, n in zip(completions, number)]

def length(completions, number, **columns):
    return [None if n == 3 else float(len(text)) for text, n in zip(completions, number)]
"""


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completions")
    tiny_model_folder(folder, hidden=32).rename(folder / "model")
    rows = ({"prompt": f"a{number}", "number": number} for number in range(PROMPTS))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def settings(where: Path) -> list[str]:
    return [
        *(
            "roles.rollout.engine=hf",
            "sampling.max_tokens=6",
            "logging.trackers=[]",
            "logging.curves=false",
            f"output={where}/runs",
        ),
        "rewards.1.weight=0",
    ]


def named(where: Path) -> list[str]:
    return [f"{where}/rewards.py:parity", f"{where}/rewards.py:length"]


@pytest.fixture(scope="module")
def generated(where: Path) -> RunResult:
    return generate(
        f"{where}/model", f"{where}/rows.jsonl", settings(where), samples=3, rewards=named(where), local=True
    )


def test_each_prompt_has_its_completions_with_every_reward(where: Path, generated: RunResult):
    assert generated.output is not None
    rows = list(records(generated.output))
    assert Counter(row["prompt_index"] for row in rows) == Counter(
        {number: 3 for number in range(PROMPTS) if number != 3}  # on whose samples no reward has an opinion
    )
    for row in rows:
        assert row["prompt"] == f"a{row['prompt_index']}"
        assert row["rewards/length"] == len(row["completion"])
        assert row["reward"] == row["rewards/parity"]
    assert len({row["completion"] for row in rows}) > PROMPTS
    assert {row["reward"] for row in rows} == {0.0, 1.0}


@pytest.fixture(scope="module")
def scored(where: Path, generated: RunResult) -> RunResult:
    return score(
        str(generated.output),
        [*settings(where)[2:], "data.columns={}"],
        rewards=named(where),
        model=f"{where}/model",
        local=True,
    )


def test_what_was_generated_is_scored_again_to_the_same_rewards(generated: RunResult, scored: RunResult):
    assert scored.output is not None and generated.output is not None
    before, after = list(records(generated.output)), list(records(scored.output))
    same = ("prompt", "completion", "reward", "rewards/parity", "rewards/length", "number")
    assert [[row[name] for name in same] for row in after] == [[row[name] for name in same] for row in before]
    assert spreads(scored.output)["reward"].count == 3 * (PROMPTS - 1)
    assert "" in {row["completion"] for row in after} or all(row["completion"] for row in before)


def test_scoring_that_was_killed_is_resumed_and_asks_the_rewards_once_of_every_completion(
    scored: RunResult, tmp_path: Path
):
    """As a kill in the last of four batches leaves it. The rewards add one from then on, so that what was scored after
    the kill is known by its rewards."""
    assert scored.output is not None
    whole = list(records(scored.output))
    folder = Path(shutil.copytree(scored.folder, tmp_path / scored.folder.name))
    output = folder / "data/score"
    parts = sorted(output.glob("part-*.parquet"))
    assert len(parts) == 4
    shutil.rmtree(folder / "checkpoints/step-00000004")
    (output / "_SUCCESS").unlink()
    parts[3].rename(output / f".{parts[3].name}.tmp")
    changed = tmp_path / "rewards.py"
    changed.write_text(REWARDS.replace("float(len(text))", "len(text) + 1.0"))
    overrides = [f"rewards.{index}.fn={changed}:{name}" for index, name in enumerate(("parity", "length"))]
    run(load_run(folder, overrides), local=True, resume=folder)
    after = list(records(output))
    scored_before = sum(parquet.read_metadata(part).num_rows for part in parts[:3])
    assert [(row["prompt"], row["completion"], row["reward"]) for row in after] == [
        (row["prompt"], row["completion"], row["reward"]) for row in whole
    ]
    added = [row["rewards/length"] - known["rewards/length"] for row, known in zip(after, whole, strict=True)]
    assert added == [0.0] * scored_before + [1.0] * (len(whole) - scored_before) and 0 < scored_before < len(whole)
    assert (output / "_SUCCESS").exists()


def test_an_evaluation_that_was_cut_off_is_resumed_and_reports_the_same(where: Path):
    whole = evaluate(
        f"{where}/model",
        settings(where),
        ks=[1, 2],
        samples=3,
        data=f"{where}/rows.jsonl",
        rewards=named(where),
        local=True,
    )
    assert (whole.prompts, whole.unanswered, whole.samples) == (PROMPTS, 1, 3)
    passed, twice, mean = (whole.measures[name] for name in ("pass@1", "pass@2", "mean@3"))
    assert passed.value == pytest.approx(mean.value)  # rewards are 0 and 1
    assert passed.value < twice.value <= 1
    assert passed.standard_error is not None and passed.standard_error > 0
    folder = Path(shutil.copytree(whole.run, f"{whole.run}-again"))
    shutil.rmtree(folder / "checkpoints/step-00000002")  # as a kill in the second batch leaves it
    output = folder / "data/evaluate"
    (output / "_SUCCESS").unlink()
    (output / "part-000002.parquet").unlink()
    run(load_run(folder, []), local=True, resume=folder)
    assert report(folder, [1, 2]).measures == whole.measures
    assert json.loads((folder / "evaluation.json").read_text())["measures"]["pass@2"]["value"] == twice.value
