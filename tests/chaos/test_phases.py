"""Phases that hand models over: a run that is killed in a later one goes on there, with what the earlier ones left.

The run that is never interrupted is in one process (`--local`), and so is the killed one before its first kill and
after its second one, to save starting Ray three times more; the bits are the same.
"""

import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.runs import Run

pytestmark = pytest.mark.timeout(900)  # whole runs; a busy machine is slow to start them

PHASES = {"sft": 2, "rm": 8, "ppo": 5}  # steps: the killed phases last longer than it takes to see a step and kill
CLASSIC: dict[str, Any] = {
    "name": "t",
    "model": {"path": "example:arithmetic"},
    "rewards": [{"role": "reward_model"}],
    "phases": {
        "sft": {"method": "sft", "data": {"path": "example:arithmetic_sft"}},
        "rm": {"method": "reward_model", "data": {"path": "example:arithmetic_pairs"}},
        "ppo": {
            "method": "ppo",
            "options": {"num_ppo_epochs": 2, "kl_coef": 0.1, "kl_target": 1.0, "kl_horizon": 100},
            "data": {"path": "example:arithmetic"},
            "sampling": {"max_tokens": 5},
        },
    },
    "roles": {
        "policy": {"threads": 1, "cpus": 0.5},
        "reward_model": {"model": "${phases.sft.model}", "threads": 1, "cpus": 0.25},
        "value": {"model": "${phases.rm.model}", "threads": 1, "cpus": 0.25},
        "reference": {"threads": 1, "cpus": 0.25},
        "rollout": {"engine": "hf", "threads": 1, "cpus": 0.5},
        "reward": {"cpus": 0.1},
    },
    "cluster": {"num_cpus": 4, "object_store_mib": 100},
    "checkpoint": {"every": 1, "keep": 99},
    "logging": {"completions_every": 1000, "trackers": [], "curves": False},
}
for name, count in PHASES.items():
    CLASSIC["phases"][name]["train"] = {"steps": count, "batch_size": 16, "learning_rate": 1e-3}
STEPS = [name for name, count in PHASES.items() for _ in range(count)]  # the phase of each step of the run
FIRST = {name: STEPS.index(name) + 1 for name in PHASES}


def started(where: Path, *arguments: str) -> Run:
    return Run(where, {}, *arguments, environment={"OMP_NUM_THREADS": "1"}, base=CLASSIC)


def kill_in(phase: str, run: Run) -> None:
    """Once the first step of the phase is in a checkpoint."""
    saved = f"a checkpoint of step {FIRST[phase]}, the first of {phase}"
    run.until(lambda: any(event["step"] >= FIRST[phase] for event in run.events("checkpoint")), saved, timeout_s=400)
    run.process.send_signal(signal.SIGKILL)
    run.process.wait(30)


def weights(run: Run, step: int) -> dict[str, bytes]:
    """Of every trained role in the checkpoint of a step."""
    folder = run.folder / "checkpoints" / f"step-{step:08d}"
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.glob("model*/**/*.safetensors")}


def learned(run: Run) -> list[dict[str, Any]]:
    """What each step reports of rewards and gradients, times aside."""
    lines = [line for line in run.lines("metrics.jsonl") if "step_time" in line]
    timed = ("time", "seconds", "tokens_per", "_per_second")
    return [{name: value for name, value in line.items() if not any(part in name for part in timed)} for line in lines]


def assert_learned(run: Run) -> None:
    """Every step had a gradient for each role that it trains, and moved all of its weights."""
    lines = learned(run)
    assert [line["phase"] for line in lines] == STEPS and [line["step"] for line in lines] == list(
        range(1, len(STEPS) + 1)
    )
    norms = [{name: value for name, value in line.items() if name.endswith("grad_norm")} for line in lines]
    assert [len(each) for each in norms] == [2 if phase == "ppo" else 1 for phase in STEPS]
    assert all(norm > 1e-4 for each in norms for norm in each.values())
    for phase, count in PHASES.items():
        found = [weights(run, step) for step in range(FIRST[phase], FIRST[phase] + count)]
        assert found[0].keys() == (
            {"model/model.safetensors"} | ({"models/value/model.safetensors"} if phase == "ppo" else set())
        )
        for name in found[0]:
            assert len({each[name] for each in found}) == count, f"{name} stood still in {phase}"


def test_sft_reward_model_and_ppo_in_one_run_go_on_to_the_same_bits_where_each_of_the_later_two_was_killed(
    tmp_path: Path,
):
    whole, run = (started(tmp_path / name, "--local") for name in ("whole", "killed"))  # at the same time
    for phase, how in (("rm", []), ("ppo", ["--local"])):
        kill_in(phase, run)
        run.resume(*how)
    run.wait(400)
    whole.wait(400)
    resumed_from = [event["step"] for event in run.events("resumed")]
    assert [STEPS[step - 1] for step in resumed_from] == ["rm", "ppo"] and resumed_from[1] < len(STEPS)
    saved = Counter(event["step"] for event in run.events("checkpoint"))  # by all three processes
    assert max(saved.values()) == 1, f"no step is repeated: {saved}"
    for each in (whole, run):
        assert_learned(each)
    assert learned(run) == learned(whole)
    assert weights(run, len(STEPS)) == weights(whole, len(STEPS))
    assert len({line["objective/kl_coef"] for line in learned(run) if line["phase"] == "ppo"}) == PHASES["ppo"]
