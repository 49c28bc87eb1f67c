"""Engines that sample from a reference which followed the policy in one phase, and is a copy of it in the next one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from actors.model import ModelSpec
from actors.model_worker import ModelWorker
from actors.specs import BackendSpec
from orchestrator.config.schema import RunConfig
from orchestrator.run import run
from rollout.weights import ManifestOf, PackBuckets
from tests.unit.source_stub import write_rows
from tests.unit.tiny import tiny_model_folder

BUCKET = 2**20
REWARD = """
def spread(completions, **columns):
    return [float(sum(map(ord, text)) % 5) for text in completions]
"""


def fingerprint(model: Path) -> str:
    """Of the weights of a model's folder, as the role that holds them sends them."""
    worker = ModelWorker("any", ModelSpec(str(model)), BackendSpec("single"), threads=torch.get_num_threads())
    worker.ready()
    manifest: Any = worker.export(ManifestOf("float32", BUCKET), BUCKET, "merged")
    report, _ = worker.export(PackBuckets(manifest, 0), BUCKET, "merged")
    return report.fingerprint


def test_engines_of_a_reference_that_was_evaluated_as_it_moved_get_the_next_phases_copy(tmp_path: Path) -> None:
    """The evaluation at a phase's end publishes the moved reference as the version with which the next phase begins."""
    (tmp_path / "rewards.py").write_text(REWARD)
    pairs = write_rows(
        tmp_path / "pairs.jsonl",
        ({"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i + 11)} for i in range(24)),
    )
    prompts = write_rows(tmp_path / "prompts.jsonl", ({"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(8)))
    following = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.3}
    phases: dict[str, Any] = {
        "dpo": {
            "method": "dpo",
            "options": following,
            "data": {"path": str(pairs)},
            "train": {"steps": 3, "batch_size": 8, "learning_rate": 1e-2},
            "evaluation": {"data": {"path": str(prompts)}, "at_start": False},
        },
        "xpo": {
            "method": "xpo",
            "data": {"path": str(prompts)},
            "train": {"steps": 1, "batch_size": 4},
            "sampling": {"max_tokens": 5},
        },
    }
    tree = {
        "output": tmp_path,
        "model": {"path": str(tiny_model_folder(tmp_path, hidden=32))},
        "phases": phases,
        "roles": {"rollout": {"engine": "hf"}, "reference_rollout": {"engine": "hf"}},
        "rewards": [{"fn": f"{tmp_path / 'rewards.py'}:spread"}],
        "checkpoint": {"every": 1, "keep": 9},
        "logging": {"trackers": [], "curves": False},
    }
    result = run(RunConfig.model_validate(tree), local=True)
    events = [json.loads(line) for line in (result.folder / "events.jsonl").read_text().splitlines()]
    assert not [event for event in events if event["event"] == "evaluation_failed"]
    begun = [event for event in events if event["event"] == "published" and event["phase"] == "xpo"]
    ended = result.folder / "checkpoints" / "step-00000003"
    policy, moved = (fingerprint(ended / name) for name in ("model", "reference"))
    assert policy != moved, "the reference is where the policy is: this shows nothing"
    assert [(event["role"], event["version"], event["fingerprint"]) for event in begun] == [
        ("reference_rollout", 3, policy)
    ], "the policy's engines have its weights already, those of the reference have what it was before"
