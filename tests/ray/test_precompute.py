"""`troupe run` twice on the same data and weights: the first run asks a reference and ends it, the second has none, and
needs no Ray to show it."""

from pathlib import Path
from typing import Any

import pytest

from tests.runs import Run

pytestmark = pytest.mark.timeout(600)

PAIRS: dict[str, Any] = {
    "name": "t",
    "model": {"path": "example:arithmetic"},
    "method": "dpo",
    "options": {"precompute_ref_log_probs": True},
    "data": {"path": "example:arithmetic_pairs", "limit": 64},
    "roles": {"policy": {"threads": 1}, "reference": {"threads": 1}},
    "train": {"steps": 2, "batch_size": 16, "learning_rate": 1e-3},
    "cluster": {"num_cpus": 4, "object_store_mib": 100},
    "logging": {"trackers": [], "curves": False, "ray_metrics": False},
}


def test_a_second_run_reads_the_first_ones_values_and_launches_no_reference(tmp_path: Path):
    kept = {"data": {"cache_dir": str(tmp_path / "cache")}}
    first = Run(tmp_path / "first", kept, base=PAIRS)
    first.wait()
    second = Run(tmp_path / "second", kept, "--local", base=PAIRS, environment={"OMP_NUM_THREADS": "1"})
    second.wait()
    assert [event["from"] for event in first.events("precomputed")] == ["reference"]
    assert [event["role"] for event in first.events("released")] == ["reference"]
    assert [event["from"] for event in second.events("precomputed")] == ["cache"]
    assert second.events("released") == []
    assert "reference/0" in first.output.read_text()
    assert "reference/0" not in second.output.read_text()
    losses = [[line["loss"] for line in run.lines("metrics.jsonl")] for run in (first, second)]
    assert losses[0] == losses[1]
