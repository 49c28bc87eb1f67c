"""What a run asks of an engine that the engine cannot do is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.errors import ConfigError
from orchestrator.config.loading import config_of
from orchestrator.planning.resolve import prepare
from rollout.engine import ENGINES, Ability, abilities_of
from tests.unit.source_stub import write_rows
from tests.unit.tiny import tiny_model_folder

OWN = """
from rollout.hf_engine import HfEngine


class Plain(HfEngine):
    abilities = frozenset()
"""


def run_of(tmp_path: Path, engine: str, method: str = "grpo", **changes: Any) -> Any:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1+1=", "answer": "2"}])
    roles = {name: {"engine": engine} for name in ("rollout", "mixture_rollout")}
    tree: dict[str, Any] = {
        "method": method,
        "model": {"path": str(tiny_model_folder(tmp_path, hidden=128)), "dtype": "bfloat16"},
        "data": {"path": str(rows)},
        "train": {"steps": 1, "batch_size": 1},
        "sampling": {"max_tokens": 4},
        "rewards": [{"fn": "completion_length"}],
        "roles": roles,
    }
    for section, keys in changes.items():
        tree[section] = {**tree[section], **keys}
    return config_of(tree, [], "test")


ASKED: list[tuple[dict[str, Any], str]] = [
    ({"method": "nash_md"}, "cannot sample from the mixture of two models, which nash_md does; use vllm or hf"),
    ({"sampling": {"replay_truncation": True, "top_k": 4}}, "does not say which tokens a truncated distribution left"),
    ({"model": {"lm_head_fp32": True}}, "computes logits in the model's dtype"),
]


@pytest.mark.parametrize(("changes", "said"), ASKED, ids=[said for _, said in ASKED])
def test_an_engine_without_the_ability_is_refused_and_the_others_are_not(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    for engine in ("scripted", f"{file}:Plain"):
        with pytest.raises(ConfigError, match=said) as caught:
            prepare(run_of(tmp_path, engine, **changes))
        assert engine in str(caught.value)
    for engine in ("hf", "vllm"):
        assert prepare(run_of(tmp_path, engine, **changes)).generates


def coached(tmp_path: Path, engine: str, **options: Any) -> Any:
    """A run whose teacher is an engine."""
    teacher = {"teacher": {"model": str(tiny_model_folder(tmp_path, hidden=128, seed=1))}}
    roles = {"coach": {"kind": "engine", "engine": engine, "follows": "teacher"}, **teacher}
    run = run_of(tmp_path, "hf", "gkd", roles=roles)
    options = {"teachers": ["coach"], "teacher_top_k": 4, **options}
    phase = run.phases["gkd"].model_copy(update={"options": options})
    return run.model_copy(update={"phases": {"gkd": phase}, "rewards": ()})


def test_an_engine_teaches_at_temperature_1_if_it_says_which_tokens_are_likeliest(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    for engine in ("scripted", f"{file}:Plain"):
        with pytest.raises(
            ConfigError, match=r"does not say which tokens are likeliest .* use vllm or hf, or a teacher"
        ):
            prepare(coached(tmp_path, engine))
    with pytest.raises(ConfigError, match=r"at temperature 0.7, and the engine of coach says log-probabilities at 1"):
        prepare(coached(tmp_path, "hf", temperature=0.7))
    found = prepare(coached(tmp_path, "hf"))
    (phase,) = found.phases
    assert found.asked_of_engines(phase) == 4
    assert found.longest == phase.source.longest.prompt + 4 + 1, "an engine that teaches samples a token more"


def test_experts_that_the_engine_does_not_say_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not say which experts a token was sent to; use hf"):
        prepare(run_of(tmp_path, "vllm", sampling={"replay_routing": True}))


def test_more_tokens_than_there_are_cannot_be_recorded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sampling\.top_k=65: .* the tokenizer has 64"):
        prepare(run_of(tmp_path, "hf", sampling={"replay_truncation": True, "top_k": 65}))


def test_every_ability_has_an_engine_and_one_that_says_nothing_has_none() -> None:
    assert {ability for kind in ENGINES for ability in abilities_of(kind)} == set(Ability)
    assert abilities_of("scripted") == frozenset()
