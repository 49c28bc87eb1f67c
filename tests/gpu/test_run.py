"""A whole run on GPUs, as a user starts it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import Run

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

COMMON: dict[str, Any] = {
    "model": {"path": "example:arithmetic", "dtype": "bfloat16"},
    "train": {"steps": 2, "batch_size": 8},
    "options": {"num_generations": 4, "beta": 0.02},
}
ENGINE = {"kv_cache_gib": 1.0, "engine_options": {"enforce_eager": True}}
LAYOUTS = {
    "on one GPU": {
        "policy": {"gpus": 0.4},
        "reference": {"gpus": 0.2, "colocate": "policy"},
        "rollout": {"gpus": 0.4, "colocate": "policy", **ENGINE},
    },
    "on two GPUs": {
        "policy": {"gpus": 0.5},
        "reference": {"gpus": 0.5, "colocate": "policy"},
        "rollout": {"gpus": 1, **ENGINE},
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_steps_save_a_checkpoint_and_sample_with_the_trained_weights(tmp_path: Path, layout: str):
    if layout == "on two GPUs" and torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    run = Run(tmp_path, {**COMMON, "roles": LAYOUTS[layout]})
    run.wait(600)
    assert run.steps() == 2
    assert {row["version"] for row in run.completions()} == {0, 1}
    assert (run.folder / "checkpoints" / "step-00000002" / "model" / "model.safetensors").is_file()
    assert not run.events("evicted") and not run.events("sync_failed")
