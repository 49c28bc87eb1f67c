"""Methods that sample, and episodes, three real steps each on Ray with vLLM: one start of Ray and of three engines.

Every method takes the same steps with the hf engine in tests/contract. Here are those that differ in what they ask of
engines and placed roles."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.online_phases import EPISODES, ONLINE, assert_three_steps_of_each, recipe
from tests.runs import Run

pytestmark = pytest.mark.timeout(600)
ASKS_OTHERWISE = (
    "grpo",  # one engine, its log-probabilities trusted within the correction
    "cut",  # tokens among those that top-k and top-p leave
    "cut_and_biased",
    "xpo",  # a second engine, of the reference
    "nash_md",  # a third, of a mixture token by token
    "sdft",  # a teacher with a prompt of its own
    "ppo_episodes",  # a critic, turns
    "nash_md_episodes",
)
PHASES = {name: phase for name, phase in {**ONLINE, **EPISODES}.items() if name in ASKS_OTHERWISE}


def test_methods_that_ask_otherwise_of_engines_take_three_steps_with_vllm(tmp_path: Path) -> None:
    assert set(PHASES) == set(ASKS_OTHERWISE)
    engine = {"engine": "vllm", "kv_cache_gib": 0.05, "cpus": 0.2}
    small = {name: {"cpus": 0.1} for name in ("policy", "value", "reference", "reward", "environment")}
    tree = recipe(tmp_path, engine, PHASES, cluster={"num_cpus": 4, "object_store_mib": 100})
    tree["roles"] |= small
    run = Run(tmp_path, base=tree)
    run.wait()
    assert_three_steps_of_each(run.folder, tolerance=2e-3, phases=PHASES)
