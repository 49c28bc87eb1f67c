"""What completions are worth: pass@k, means and their errors; and what the commands make of a recipe or a run."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from actors.errors import ConfigError, DataError
from orchestrator.completions.evaluate import evaluation_config
from orchestrator.completions.generate import generation_config
from orchestrator.completions.score import scoring_config
from orchestrator.completions.settings import Settings
from orchestrator.completions.statistics import Estimate, measured, pass_at_k
from orchestrator.config.loading import load_config
from orchestrator.phases.resuming import save_config
from orchestrator.planning.resolve import prepare
from tests.unit.source_stub import write_rows
from tests.unit.tiny import tiny_model_folder


@pytest.mark.parametrize(("samples", "right", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 2), (4, 1, 4), (7, 3, 5)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_samples_with_a_right_one(samples: int, right: int, k: int):
    choices = list(itertools.combinations([True] * right + [False] * (samples - right), k))
    assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_at_k_of_fewer_samples_than_k_is_refused():
    with pytest.raises(ValueError, match="pass@3 of 2 samples"):
        pass_at_k(2, 1, 3)


def test_the_standard_error_takes_prompts_as_units():
    """Two samples of a prompt that are always the same say no more than one."""
    once = measured({0: [1.0], 1: [0.0], 2: [0.0]}, [1], samples=1, threshold=1.0)["mean@1"]
    twice = measured({0: [1.0, 1.0], 1: [0.0, 0.0], 2: [0.0, 0.0]}, [1], samples=2, threshold=1.0)["mean@2"]
    assert once == twice
    assert once.value == pytest.approx(1 / 3)
    assert once.standard_error == pytest.approx(math.sqrt((4 / 9 + 1 / 9 + 1 / 9) / 2 / 3))
    assert Estimate.of([0.5]) == Estimate(0.5, None, 1)


def test_what_has_no_reward_is_in_no_measure_and_a_sample_is_right_from_the_threshold_on():
    rewards = {0: [0.5, 0.4, None, 0.0], 1: [None, None], 2: [0.5, 0.9]}
    found = measured(rewards, [1, 3], samples=4, threshold=0.5)
    assert (found["pass@1"].value, found["pass@1"].prompts) == (pytest.approx(2 / 3), 2)
    assert found["pass@3"] == Estimate(1.0, None, 1)  # of the first prompt alone: the last has two samples
    assert (found["mean@4"].value, found["mean@4"].prompts) == (pytest.approx(0.5), 2)
    assert measured({0: [None]}, [1], samples=1, threshold=1.0) == {}


def run_folder(tmp_path: Path, model: Path, **changes: Any) -> Path:
    """A run as the commands see it: its configuration, and a model that its phase left."""
    held_out = {"data": {"path": "held-out.jsonl", "split": "train"}, "max_tokens": 9}
    tree = {
        "method": "grpo",
        "data": {"path": "train.jsonl"},
        "train": {"steps": 1, "batch_size": 2},
        "sampling": {"max_tokens": 30, "temperature": 0.7, "top_k": 5, "stop": ["x"], "replay_truncation": True},
        "rewards": [{"fn": "exact_match", "weight": 2.0}],
        "roles": {"rollout": {"engine": "hf", "workers": 2}, "spare": {"kind": "frozen"}},
        "model": {"path": "another", "dtype": "bfloat16", "lora": {}},
        "evaluation": held_out,
        **changes,
    }
    (tmp_path / "run.json").write_text(json.dumps(tree))
    folder = tmp_path / "runs/one"
    shutil.copytree(model, folder / "phases/grpo/model")
    save_config(folder, load_config(tmp_path / "run.json"))
    (folder / "events.jsonl").touch()
    return folder


def test_a_model_is_evaluated_at_the_task_of_the_run_that_it_is_of(tmp_path: Path):
    run = run_folder(tmp_path, tiny_model_folder(tmp_path))
    model = str(run / "phases/grpo")
    several = evaluation_config(model, ks=[1, 4])
    phase = several.phases["evaluate"]
    assert (phase.data.path, phase.data.shuffle, phase.train.epochs) == ("held-out.jsonl", False, 1)
    assert phase.options == {"num_generations": 4}
    assert (phase.sampling.temperature, phase.sampling.max_tokens, phase.sampling.top_k) == (0.7, 9, 5)
    assert not phase.sampling.replay_truncation
    assert several.model.path == f"{model}/model"
    assert (several.model.dtype, several.model.lora) == ("bfloat16", None)
    assert several.rewards[0].weight == 2.0
    assert (several.roles.rollout.engine, several.roles.rollout.workers) == ("hf", 2)
    assert "spare" in several.roles
    one = evaluation_config(model, ["sampling.max_tokens=4"]).phases["evaluate"].sampling
    assert (one.temperature, one.max_tokens, one.top_k, one.stop) == (0.0, 4, -1, ("x",))


def test_models_that_phases_left_are_roles_models_by_their_folders(tmp_path: Path):
    model = tiny_model_folder(tmp_path)
    (tmp_path / "r").mkdir()
    file = tmp_path / "r" / "recipe.json"
    phases = {
        name: {"method": method, "data": {"path": "d.jsonl"}, "train": {"steps": 1, "batch_size": 2}}
        for name, method in (("rm", "reward_model"), ("grpo", "grpo"))
    }
    roles = {"reward_model": {"model": "${phases.rm.model}"}, "policy": {"model": "elsewhere"}}
    file.write_text(json.dumps({"phases": phases, "roles": roles, "rewards": [{"role": "reward_model"}]}))
    folder = tmp_path / "r/run"
    shutil.copytree(model, folder / "phases/rm/model")
    save_config(folder, load_config(file))
    (folder / "events.jsonl").touch()
    tree = Settings.of(str(folder)).tree(str(model))
    assert tree["roles"]["reward_model"]["model"] == str(folder / "phases/rm/model")
    assert "policy" not in tree["roles"]  # what the engines follow has the model that is asked


def test_a_task_a_phase_and_samples_that_do_not_exist_are_refused(tmp_path: Path):
    model = str(tiny_model_folder(tmp_path))
    with pytest.raises(ConfigError, match="there is no task"):
        evaluation_config(model)
    with pytest.raises(ConfigError, match="-k 8 with --samples 4"):
        evaluation_config(model, ks=[8], samples=4)
    with pytest.raises(ConfigError, match="-k 0: pass@k is of one sample at least"):
        evaluation_config(model, ks=[0])
    with pytest.raises(ConfigError, match="--phase ppo: there are sft, grpo"):
        generation_config(model, "d.jsonl", recipe="grpo_arithmetic", phase="ppo")


def test_nothing_is_scored_unless_it_is_asked_for(tmp_path: Path):
    model = str(tiny_model_folder(tmp_path))
    plain = generation_config(model, "d.jsonl", samples=3, recipe="grpo_arithmetic")
    assert plain.phases["generate"].options == {"num_generations": 3, "scored": False}
    assert plain.rewards == ()
    by_recipe = generation_config(model, "d.jsonl", scored=True, recipe="grpo_arithmetic")
    assert [reward.fn for reward in by_recipe.rewards] == ["exact_match"]
    named = generation_config(model, "d.jsonl", rewards=["ray://jobs/judge", "https://h/score", "regex"])
    assert [(reward.actor, reward.url, reward.fn) for reward in named.rewards] == [
        ("ray://jobs/judge", None, None),
        (None, ("https://h/score",), None),
        (None, None, "regex"),
    ]


def test_a_row_that_does_not_fit_is_not_cut_before_it_is_scored(tmp_path: Path):
    rows = [{"prompt": "p", "completion": "c" * 2000, "answer": "c"}]
    config = scoring_config(str(write_rows(tmp_path / "rows.jsonl", rows)), rewards=["exact_match"])
    with pytest.raises(DataError, match=r"2,?00"):
        prepare(config)
