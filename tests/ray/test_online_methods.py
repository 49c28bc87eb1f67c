"""Every method that samples, and episodes, three real steps each with vLLM: one start of Ray and of three engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.online_phases import EPISODES, ONLINE, assert_three_steps_of_each, recipe
from tests.runs import Run

pytestmark = pytest.mark.timeout(600)
PHASES = {**ONLINE, **EPISODES}


def test_every_method_that_samples_takes_three_steps_with_vllm(tmp_path: Path) -> None:
    engine = {"engine": "vllm", "kv_cache_gib": 0.05, "cpus": 0.2}
    small = {name: {"cpus": 0.1} for name in ("policy", "value", "reference", "reward", "environment")}
    tree = recipe(tmp_path, engine, PHASES, cluster={"num_cpus": 4, "object_store_mib": 100})
    tree["roles"] |= small
    run = Run(tmp_path, base=tree)
    run.wait()
    assert_three_steps_of_each(run.folder, tolerance=2e-3, phases=PHASES)
