"""What becomes of a user's DeepSpeed configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from actors.backends.deepspeed_config import resolve
from actors.errors import ConfigError
from actors.specs import OptimSpec

OPTIM = OptimSpec(learning_rate=1e-4, scheduler="constant", max_grad_norm=0.5, weight_decay=0.1)
SHIPPED = sorted((Path(__file__).parents[2] / "deploy" / "deepspeed").glob("*.json"))


def resolved(given: Any = None, *, dtype: str = "float32", optim: OptimSpec | None = OPTIM) -> dict[str, Any]:
    return resolve(given, zero_stage=2, dtype=dtype, optim=optim, world_size=4)


def test_an_empty_configuration_gets_the_roles_stage_and_the_runs_settings() -> None:
    config = resolved()
    assert config["zero_optimization"] == {"stage": 2}
    assert config["gradient_clipping"] == 0.5
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (4, 1)
    assert not config["bf16"]["enabled"]


def test_every_key_that_the_run_does_not_decide_passes_through() -> None:
    given = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 7}, "communication_data_type": "fp32", "new": [1]}
    config = resolved(given)
    assert {key: config[key] for key in given} == given
    assert "new" not in resolved()


def test_the_given_configuration_is_left_as_it_was() -> None:
    given = {"zero_optimization": {}, "bf16": {"enabled": "auto"}}
    resolved(given, dtype="bfloat16")
    assert given == {"zero_optimization": {}, "bf16": {"enabled": "auto"}}


def test_auto_is_filled_in() -> None:
    given = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "scheduler": "auto",
        "optimizer": {"type": "Muon", "params": {"lr": "auto", "weight_decay": "auto", "momentum": 0.9}},
    }
    config = resolved(given, dtype="bfloat16")
    assert config["train_batch_size"] == 4
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"]["enabled"] is True
    assert config["optimizer"] == {"type": "Muon", "params": {"lr": 1e-4, "weight_decay": 0.1, "momentum": 0.9}}
    assert "scheduler" not in config


@pytest.mark.parametrize(
    ("given", "where_to_set_it"),
    [
        ({"train_batch_size": 64}, "train.batch_size"),
        ({"train_micro_batch_size_per_gpu": 8}, "train.token_budget"),
        ({"gradient_accumulation_steps": 2}, "train.token_budget"),
        ({"gradient_clipping": 1.0}, "train.max_grad_norm"),
        ({"bf16": {"enabled": True}}, "model.dtype"),
        ({"fp16": {"enabled": True}}, "model.dtype"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}}, "train.learning_rate"),
        ({"scheduler": {"type": "WarmupLR"}}, "train.scheduler"),
    ],
)
def test_a_contradiction_is_refused_naming_the_key_and_where_to_set_it(given: Any, where_to_set_it: str) -> None:
    with pytest.raises(ConfigError, match=where_to_set_it) as caught:
        resolved(given)
    assert next(iter(given)) in str(caught.value)


def test_an_adam_of_deepspeeds_own_gets_everything_that_the_run_decides() -> None:
    optimizer = resolved({"optimizer": {"type": "OneBitAdam", "params": {"freeze_step": 3}}})["optimizer"]
    ours = {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1}
    assert optimizer == {"type": "OneBitAdam", "params": {"freeze_step": 3, **ours}}


def test_an_equal_value_is_no_contradiction() -> None:
    assert resolved({"gradient_clipping": 0.5, "fp16": {"enabled": False}})["gradient_clipping"] == 0.5


def test_bfloat16_accumulates_in_float32_unless_told_otherwise() -> None:
    assert resolved(dtype="bfloat16")["data_types"] == {"grad_accum_dtype": "fp32"}
    assert resolved({"data_types": {"grad_accum_dtype": "bf16"}}, dtype="bfloat16")["data_types"] == {
        "grad_accum_dtype": "bf16"
    }


def test_a_frozen_role_has_no_optimizer_and_partitions_only_parameters() -> None:
    given = {"optimizer": {"type": "AdamW"}, "gradient_clipping": 9.0, "zero_optimization": {"stage": 2}}
    frozen = resolved(given, optim=None)
    assert "optimizer" not in frozen
    assert "gradient_clipping" not in frozen
    assert frozen["zero_optimization"]["stage"] == 0
    partitioned = resolved({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, optim=None)
    assert partitioned["zero_optimization"] == {"stage": 3}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_files_do_not_contradict_the_run(path: Path) -> None:
    stage = json.loads(path.read_text())["zero_optimization"]["stage"]
    assert resolved(path, dtype="bfloat16")["zero_optimization"]["stage"] == stage


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.json cannot be read: No such file"):
        resolved(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match=r"broken\.json is not JSON"):
        resolved(tmp_path / "broken.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"list\.json holds a list"):
        resolved(tmp_path / "list.json")
