"""Where `roles.ROLE.engine` is not set, samples and model decide which engine a role has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.loading import config_of
from orchestrator.planning.prepared import Prepared
from orchestrator.planning.resolve import prepare
from tests.unit.source_stub import write_rows
from tests.unit.tiny import tiny_model_folder


def prepared(tmp_path: Path, rollout: dict[str, Any], **changes: Any) -> Prepared:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1+1=", "answer": "2"}])
    tree: dict[str, Any] = {
        "method": "grpo",
        "model": {"path": str(tiny_model_folder(tmp_path, hidden=128))},
        "data": {"path": str(rows)},
        "train": {"steps": 1, "batch_size": 1},
        "sampling": {"max_tokens": 4},
        "rewards": [{"fn": "completion_length"}],
        "roles": {"rollout": rollout},
    }
    return prepare(config_of(tree | changes, [], "test"))


LONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"sampling": {"max_tokens": 54}}, "prompt and completion have up to 58 tokens"),
    ({"max_model_len": 58}, {}, "prompt and completion have up to 58 tokens"),
    ({"gpus": 1}, {}, "it has a GPU"),
    ({"kv_cache_gib": 0.5}, {}, "kv_cache_gib is set"),
    ({"engine_options": {"block_size": 32}}, {}, "engine_options is set"),
]


def test_short_samples_of_a_small_model_are_decoded_by_transformers_and_the_plan_says_so(tmp_path: Path) -> None:
    run = prepared(tmp_path, {})
    assert run.config.roles.rollout.engine == "hf"
    assert prepared(tmp_path, {"max_model_len": 57}).config.roles.rollout.engine == "hf"
    assert run.plan().accepted().engine_notes == {
        "rollout": "the engine hf, because samples are short and the model is small"
    }


@pytest.mark.parametrize(("rollout", "changes", "why"), LONG, ids=[why for _, _, why in LONG])
def test_other_samples_are_decoded_by_vllm(
    tmp_path: Path, rollout: dict[str, Any], changes: dict[str, Any], why: str
) -> None:
    run = prepared(tmp_path, rollout, **changes)
    assert run.config.roles.rollout.engine == "vllm"
    assert run.engine_notes == {"rollout": f"the engine vllm, because {why}"}


def test_an_engine_that_is_set_is_left_and_a_role_that_is_not_launched_gets_none(tmp_path: Path) -> None:
    run = prepared(tmp_path, {"engine": "vllm"})
    assert run.config.roles.rollout.engine == "vllm"
    assert run.config.roles.teacher_rollout.engine == "auto"
    assert run.engine_notes == {}
