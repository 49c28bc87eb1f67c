"""Configurations of runs for the tests of keys: dictionaries, of which a test sets one key more."""

from __future__ import annotations

from typing import Any

GRPO: dict[str, Any] = {
    "phases": {"a": {"method": "grpo", "options": {"beta": 0.1}, "train": {"steps": 50}}},
    "rewards": [{"fn": "exact_match"}],
}
SFT: dict[str, Any] = {"phases": {"a": {"method": "sft", "train": {"steps": 50}}}}
PPO: dict[str, Any] = {**GRPO, "phases": {"a": {"method": "ppo", "train": {"steps": 50}}}}
CLASSIC: dict[str, Any] = {  # a model that scores is trained, then asked
    "phases": {"a": {"method": "reward_model", "train": {"steps": 50}}, "b": GRPO["phases"]["a"]},
    "rewards": [{"role": "reward_model"}],
}
TAUGHT: dict[str, Any] = {  # by what the teacher samples
    "phases": {"a": {"method": "gkd", "options": {"lmbda": 0, "seq_kd": True}, "train": {"steps": 50}}},
    "roles": {"teacher": {"model": "big"}},
}
EXPLORED: dict[str, Any] = {**GRPO, "phases": {"a": {"method": "xpo", "train": {"steps": 50}}}}
OPPOSED: dict[str, Any] = {**GRPO, "phases": {"a": {"method": "nash_md", "train": {"steps": 50}}}}
TALKING: dict[str, Any] = {  # episodes with a tool
    **GRPO,
    "phases": {"a": {**GRPO["phases"]["a"], "episode": {"tools": ["add.py:add"]}}},
}
PLAYING: dict[str, Any] = {"phases": {"a": {"episode": {"tools": (), "environment": "game.py:Game"}}}}
LAUNCHES = {  # the others: GRPO
    "environment": TALKING,
    "value": PPO,
    "reward_model": CLASSIC,
    "teacher": TAUGHT,
    "teacher_rollout": TAUGHT,
    "reference_rollout": EXPLORED,
    "mixture_rollout": OPPOSED,
}
JUDGE: dict[str, Any] = {"url": "https://a.example/v1", "model": "m"}
JUDGED: dict[str, Any] = {"rewards": [{"judge": [JUDGE]}]}
ENSEMBLE: dict[str, Any] = {"rewards": [{"role": ["reward_model", "other"]}], "roles": {"other": {"kind": "frozen"}}}
RUBRIC: dict[str, Any] = {"rewards": [{"judge": [{**JUDGE, "kind": "rubric"}]}]}
RENAMED = {"phases": {"a": {"rename_roles": {"reference": "teacher"}}}}
DEEPSPEED = {"roles": {"ROLE": {"backend": "deepspeed"}}}
SELECTED = {"roles": {"ROLE": {"label_selector": {"zone": "a"}}}}
LORA = {"model": {"lora": {}}}
BEMA = {"phases": {"a": {"train": {"bema": {}}}}}


def merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    found = dict(base)
    for key, value in extra.items():
        found[key] = (
            merged(found[key], value) if isinstance(value, dict) and isinstance(found.get(key), dict) else value
        )
    return found


def at(path: list[str], value: Any, tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with a value at a path; `NAME` is the phase, `N` the first of a list."""
    head, *rest = path
    if head == "NAME":
        head = "a"
    if head == "N":
        return [at(rest, value, tree[0] if tree else {})]  # pyright: ignore[reportReturnType, reportArgumentType]
    below = (tree or {}).get(head)
    return {**(tree or {}), head: at(rest, value, below if below is not None else {}) if rest else value}
