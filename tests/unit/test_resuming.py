"""What a resume may change: a property of each key."""

from __future__ import annotations

from orchestrator.config.error_messages import schema_keys
from orchestrator.config.loading import config_of
from orchestrator.config.overrides import dotted
from orchestrator.config.schema import RunConfig
from orchestrator.phases.resuming import changes, why_fixed


def test_exactly_these_settings_may_not_change_on_resume():
    keys = {dotted(path).replace("NAME", "now") for path in schema_keys(RunConfig)}
    fixed = {key for key in keys if why_fixed(key, "now", [])}
    data = {key for key in keys if key.startswith("phases.now.data.")}
    may_move = {"phases.now.data.path", "phases.now.data.cache_dir", "phases.now.data.max_bad_rows"}
    assert len(data) > 10 and may_move <= data
    lora = {f"model.lora.{name}" for name in ("r", "alpha", "target_modules", "use_rslora", "use_dora")}
    model = {f"model.{name}" for name in ("path", "dtype", "lora", "tokenizer", "chat_template")}
    assert fixed == {"seed", "output", "phases.now.method", *model, *lora, *(data - may_move)}


def test_a_finished_phase_may_not_change_and_a_later_one_may():
    assert why_fixed("phases.sft.train.learning_rate", "grpo", ["sft"]) == "phase sft is over"
    assert why_fixed("phases.grpo.train.learning_rate", "grpo", ["sft"]) is None
    assert why_fixed("phases.dpo.data.limit", "grpo", ["sft"]) is None


def test_changes_are_named_by_their_keys_with_both_values():
    before, now = (config_of({"method": "sft", **more}, [], "test") for more in ({}, {"model": {"lora": {"r": 4}}}))
    assert changes(before, before) == {}
    assert changes(before, now)["model.lora.r"] == (None, 4)
