"""Adapters and averages of weights, trained and saved by every backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import AutoPeftModelForCausalLM

from actors.weight_averaging import AverageSpec
from tests.contract.backend_stage import (
    DEEPSPEED,
    LORA,
    OPTIM,
    SINGLE,
    ZERO3,
    Case,
    Role,
    Start,
    assert_same_weights,
    base,
    batch,
    every_backend,
    expected_once,
    plain_logps,
    plain_model,
    start,
)

__all__ = ["base", "batch", "start"]  # fixtures


@every_backend
def test_adapters_train_alike_and_switch_off_to_the_base(start: Start, tmp_path: Path, case: Case) -> None:
    base = expected_once("base logps", lambda: start(SINGLE).logps())
    expected = expected_once("adapters", lambda: [r.metrics["loss"] for r in start(SINGLE, lora=LORA).update(3)])
    role = start(case, lora=LORA)
    untouched = role.logps(adapters=False)
    np.testing.assert_allclose(untouched, base, atol=1e-5)
    reports = role.update(2)
    role.act("save_state", str(tmp_path))
    losses = [report.metrics["loss"] for report in reports + role.update(1)]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_array_equal(role.logps(adapters=False), untouched)
    assert np.abs(role.logps() - untouched).max() > 1e-3, "the adapters must have learned something"
    assert_merged_export(role, tmp_path / "merged")
    resumed = start(case, lora=LORA)
    resumed.act("load_state", str(tmp_path))
    assert resumed.update(1)[0].metrics["loss"] == losses[-1]


def assert_merged_export(role: Role, folder: Path) -> None:
    """A plain model with the exported weights computes what the adapted one does; no trace of the adapters is left."""
    learned = role.logps()
    role.act("save_model", str(folder))
    merged = plain_model(str(folder))
    assert_same_weights(merged, role.weights())
    assert not [name for name in merged if "lora" in name or "base_layer" in name]
    np.testing.assert_allclose(plain_logps(str(folder), role.batch), learned, atol=1e-5)


AVERAGE = AverageSpec(
    update_freq=2, ema_power=0.5, bias_power=0.2, lag=10, multiplier=1, update_after=0, min_ema_multiplier=0.0
)
VARIANTS: dict[str, dict[str, Any]] = {"full": {}, "adapters": {"lora": LORA}, "bfloat16": {"dtype": "bfloat16"}}
AVERAGED = [("full", case) for case in (SINGLE, *DEEPSPEED)]
AVERAGED += [(variant, case) for variant in ("adapters", "bfloat16") for case in (SINGLE, *DEEPSPEED[4:])]


@pytest.mark.parametrize(("variant", "case"), AVERAGED, ids=str)
def test_an_average_is_that_of_single_and_a_resumed_one_that_of_an_uninterrupted_run(
    start: Start, tmp_path: Path, case: Case, variant: str
) -> None:
    def saved(role: Role, name: str) -> dict[str, np.ndarray]:
        role.act("save_model", str(tmp_path / name), True)
        return plain_model(str(tmp_path / name))

    def averaged(case: Case, name: str) -> dict[str, np.ndarray]:
        role = start(case, **VARIANTS[variant])
        role.act("reset", OPTIM, AVERAGE)
        role.update(3)
        (state := tmp_path / f"state-{name}").mkdir()
        role.act("save_state", str(state))
        role.update(1)
        own = role.weights()
        average = saved(role, name)
        assert_same_weights(role.weights(), own)  # saving the average has left them alone
        moved = max(np.abs(average[name] - weight).max() for name, weight in own.items())
        assert moved > 1e-3, "the average must differ from the weights, or nothing is compared"
        return average

    average = averaged(case, "average")
    tolerance = 2**-7 if variant == "bfloat16" else 2e-6  # one unit of half precision at 1: it is saved in that
    expected = expected_once(f"average {variant}", lambda: averaged(SINGLE, "expected"))
    assert_same_weights(average, expected, tolerance)
    resumed = start(case, **VARIANTS[variant])
    resumed.act("reset", OPTIM, AVERAGE)
    resumed.act("load_state", str(tmp_path / "state-average"))
    resumed.update(1)
    assert_same_weights(saved(resumed, "resumed"), average)


@pytest.mark.parametrize("case", [SINGLE, Case("deepspeed", 2, 1), ZERO3], ids=str)
def test_adapters_are_saved_alone_and_open_with_peft(start: Start, tmp_path: Path, case: Case) -> None:
    role = start(case, lora=LORA)
    base = role.logps()
    role.update(2)
    role.act("save_adapter", str(tmp_path / "adapter"))
    opened: Any = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    opened.merge_and_unload().save_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(plain_logps(str(tmp_path / "merged"), role.batch), role.logps(), atol=1e-4)
    assert np.abs(role.logps() - base).max() > 1e-2
