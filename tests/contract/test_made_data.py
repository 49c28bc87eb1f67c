"""Whole runs that make data and learn from it: in this process, of a tiny model."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet
from safetensors.numpy import load_file

from orchestrator.config.loading import config_of, load_run
from orchestrator.result import RunResult
from orchestrator.run import run
from tests.online_phases import TEMPLATE
from tests.unit.tiny import tiny_model_folder

PROMPTS = 10


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Three steps that make pairs of ten prompts, of which one gives none; two steps of dpo on them."""
    folder = tmp_path_factory.mktemp("making")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"a{i}", "number": i}) + "\n" for i in range(PROMPTS)))
    reward = folder / "reward.py"
    reward.write_text(
        "def spread(completions, number, **columns):\n"
        "    worth = [sum(map(ord, text)) % 97 if text.strip() else None for text in completions]\n"
        "    return [0 if n == 3 else each for each, n in zip(worth, number)]\n"
    )
    generating = {
        "method": "generate_data",
        "options": {"num_generations": 4, "keep": "best_and_worst"},
        "data": {"path": str(rows)},
        "sampling": {"max_tokens": 8},
        "train": {"epochs": 1, "batch_size": 4},
    }
    learning = {
        "method": "dpo",
        "data": {"path": "${phases.generating.output}"},
        "train": {"steps": 2, "batch_size": 4, "learning_rate": 0.01},
    }
    tree: dict[str, Any] = {
        "phases": {"generating": generating, "learning": learning},
        "model": {"path": str(tiny_model_folder(folder, hidden=32))},
        "roles": {"rollout": {"engine": "hf"}},
        "rewards": [{"fn": f"{reward}:spread"}],
        "output": str(folder / "runs"),
        "logging": {"trackers": [], "curves": False},
        "checkpoint": {"every": 1, "keep": 9},
    }
    return run(config_of(tree, [], "test"), local=True)


def records(folder: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(folder.glob("part-*.parquet")) for row in parquet.read_table(file).to_pylist()]


def test_each_prompt_is_asked_once_and_of_one_that_gives_no_pair_nothing_is_written(finished: RunResult) -> None:
    assert finished.output == finished.folder / "data" / "generating"
    made = records(finished.output)
    assert Counter(row["number"] for row in made) == Counter({i: 1 for i in range(PROMPTS) if i != 3})
    assert all(row["score_chosen"] > row["score_rejected"] and row["prompt"] == f"a{row['number']}" for row in made)
    metrics = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("written/records", 0) for line in metrics][:3] == [
        len(parquet.read_table(file)) for file in sorted(finished.output.glob("part-*.parquet"))
    ]
    assert metrics[2]["groups/filtered"] == 1
    assert [line["phase"] for line in metrics] == ["generating"] * 3 + ["learning"] * 2
    assert metrics[3]["grad_norm"] > 0
    assert [gain.phase for gain in finished.gains] == ["learning"]


def test_a_run_that_is_killed_while_it_makes_data_misses_no_prompt_and_has_none_twice(
    finished: RunResult, tmp_path: Path
) -> None:
    """As a kill leaves it: the part of step 2 is there, half of the next one, and no checkpoint of step 2."""
    folder = Path(shutil.copytree(finished.folder, tmp_path / finished.folder.name))
    for step in (2, 3, 4, 5):
        shutil.rmtree(folder / f"checkpoints/step-{step:08d}")
    made = folder / "data" / "generating"
    (made / "_SUCCESS").unlink()
    (made / "part-000003.parquet").rename(made / ".part-000003.parquet.tmp")
    again = run(load_run(folder, []), local=True, resume=folder)
    assert finished.output is not None and finished.model is not None and again.model is not None
    assert records(made) == records(finished.output) and len(records(made)) == PROMPTS - 1
    before, after = load_file(finished.model / "model.safetensors"), load_file(again.model / "model.safetensors")
    assert all(np.array_equal(value, after[name]) for name, value in before.items())


def test_a_run_that_is_resumed_after_the_data_was_made_reads_what_is_there(finished: RunResult, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished.folder, tmp_path / finished.folder.name))
    made = folder / "data" / "generating"
    times = {file.name: file.stat().st_mtime_ns for file in made.iterdir()}
    again = run(load_run(folder, []), local=True, resume=folder, from_step=4)
    assert {file.name: file.stat().st_mtime_ns for file in made.iterdir()} == times
    assert finished.model is not None and again.model is not None
    before, after = load_file(finished.model / "model.safetensors"), load_file(again.model / "model.safetensors")
    assert all(np.array_equal(value, after[name]) for name, value in before.items())
    shutil.rmtree(made)
    with pytest.raises(Exception, match="is no longer in the run's folder"):
        run(load_run(folder, []), local=True, resume=folder, from_step=4)


HEARD = """
import json
from rewards.environments.critique_and_revision import CritiqueAndRevision

class Heard(CritiqueAndRevision):
    def __init__(self, file, **options):
        super().__init__(**options)
        self.file = file

    def reset(self, row):
        self.prompt, self.said = row["prompt"], []
        super().reset(row)

    def step(self, message):
        self.said.append(message["content"])
        answer = super().step(message)
        if answer[-1]:
            with open(self.file, "a") as file:
                print(json.dumps([self.prompt, *self.said]), file=file)
        return answer
"""


def test_a_model_s_revisions_are_preferred_to_its_first_answers_and_learned_from(tmp_path: Path) -> None:
    """Where the prompt is a text, what was asked, and is learned from, is a conversation."""
    rows, heard = tmp_path / "rows.jsonl", tmp_path / "heard.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"a{i}"}) + "\n" for i in range(8)))
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    (tmp_path / "heard.py").write_text(HEARD)
    generating = {
        "method": "generate_data",
        "options": {"num_generations": 2, "keep": "last_turn_over_first"},
        "data": {"path": str(rows)},
        "episode": {
            "environment": f"{tmp_path / 'heard.py'}:Heard",
            "options": {"file": str(heard), "principles": ["kind"]},
            "split": "turns",
        },
        "sampling": {"max_tokens": 400, "stop_token_ids": list(range(2, 64, 4))},  # a turn is about four tokens
        "train": {"epochs": 1, "batch_size": 4},
    }
    learning = {
        "method": "dpo",
        "data": {"path": "${phases.generating.output}"},
        "train": {"steps": 2, "batch_size": 4, "learning_rate": 0.01},
    }
    model = {
        "path": str(tiny_model_folder(tmp_path, hidden=32)),
        "chat_template": str(tmp_path / "template.jinja"),
    }
    tree: dict[str, Any] = {
        "phases": {"generating": generating, "learning": learning},
        "model": model,
        "roles": {"rollout": {"engine": "hf"}},
        "output": str(tmp_path / "runs"),
        "logging": {"trackers": [], "curves": False},
    }
    result = run(config_of(tree, [], "test"), local=True)
    assert result.output is not None
    made = {
        tuple(row[name][0]["content"] for name in ("prompt", "rejected", "chosen")) for row in records(result.output)
    }
    told = [json.loads(line) for line in heard.read_text().splitlines()]
    assert len(told) == 16 and all(len(each) == 4 for each in told)
    assert made == {
        (prompt, answer, revision)
        for prompt, answer, critique, revision in told
        if answer != revision and answer.strip() and revision.strip()
    }
    assert len(made) > 8
    metrics = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["phase"] == "learning" and metrics[-1]["grad_norm"] > 0
