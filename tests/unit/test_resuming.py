"""What a resume may change: a property of each key."""

from __future__ import annotations

from orchestrator.config import RunConfig
from orchestrator.explain import schema_keys
from orchestrator.loading import config_of
from orchestrator.overrides import dotted
from orchestrator.resuming import changes, why_fixed


def test_what_may_not_change_on_resume_is_this_and_nothing_else():
    keys = {dotted(path).replace("NAME", "now") for path in schema_keys(RunConfig)}
    fixed = {key for key in keys if why_fixed(key, "now", [])}
    data = {key for key in keys if key.startswith("phases.now.data.")}
    may_move = {"phases.now.data.path", "phases.now.data.cache_dir", "phases.now.data.max_bad_rows"}
    assert len(data) > 10 and may_move <= data
    lora = {f"model.lora.{name}" for name in ("r", "alpha", "target_modules", "use_rslora", "use_dora")}
    model = {f"model.{name}" for name in ("path", "dtype", "lora", "tokenizer", "chat_template")}
    assert fixed == {"seed", "output", "phases.now.method", *model, *lora, *(data - may_move)}


def test_of_a_phase_that_is_over_nothing_may_change_and_of_one_to_come_everything():
    assert why_fixed("phases.sft.train.learning_rate", "grpo", ["sft"]) == "phase sft is over"
    assert why_fixed("phases.grpo.train.learning_rate", "grpo", ["sft"]) is None
    assert why_fixed("phases.dpo.data.limit", "grpo", ["sft"]) is None


def test_changes_are_named_by_their_keys_with_both_values():
    before, now = (config_of({"method": "sft", **more}, [], "test") for more in ({}, {"model": {"lora": {"r": 4}}}))
    assert changes(before, before) == {}
    assert changes(before, now)["model.lora.r"] == (None, 4)
