"""The JSON schema for editors agrees with what `troupe run` accepts and refuses."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from actors.errors import ConfigError
from orchestrator.cli import main
from orchestrator.config.json_schema import recipe_schema
from orchestrator.config.keys import every_key
from orchestrator.config.loading import RECIPES, config_of, recipe_name
from orchestrator.config.overrides import load_yaml
from orchestrator.methods import METHODS

FILES = sorted(RECIPES.rglob("*.yaml"))


@cache
def schema() -> Draft202012Validator:
    return Draft202012Validator(recipe_schema())


def accepted(tree: dict[str, Any]) -> tuple[bool, bool]:
    """By the schema, and by Troupe."""
    try:
        config_of(copy.deepcopy(tree), [], "test")
        ours = True
    except ConfigError:
        ours = False
    return schema().is_valid(tree), ours


def test_it_is_a_schema():
    Draft202012Validator.check_schema(recipe_schema())


@pytest.mark.parametrize("file", FILES, ids=recipe_name)
def test_every_shipped_recipe_is_valid(file: Path):
    tree, _ = load_yaml(file.read_text(), str(file))
    assert [error.message for error in schema().iter_errors(tree)] == []


GOOD: list[dict[str, Any]] = [
    {},
    {"options": {"beta": 0.1}},
    {"method": "dpo", "options": {"beta": 0.2}, "train": {"steps": 3}},
    {"method": "my/methods.py:mine", "options": {"anything": 1}},
    {"phases": {"a": {"method": "sft"}, "b": {"method": "grpo", "options": {"num_generations": 4}}}},
    {"rewards": [{"url": "https://a.example"}, {"url": ["https://a.example", "https://b.example"]}]},
    {"rewards": [{"judge": {"url": "https://a.example/v1", "model": "m"}}]},
    {"roles": {"rollout": {"label_selector": {"role": "rollout"}}, "second": {"kind": "frozen", "model": "m"}}},
    {"roles": {"policy": {"deepspeed": "zero.json"}}, "model": {"lora": {}}, "output": "runs"},
    {"evaluation": None, "logging": {"trackers": ["wandb", "mlflow"]}},
]
BAD: list[dict[str, Any]] = [
    {"sed": 1},
    {"method": "gropo"},
    {"options": {"num_generatons": 4}},
    {"options": {"num_generations": 1}},
    {"method": "sft", "options": {"beta": 0.1}},
    {"phases": {"a": {"method": "sft", "options": {"beta": 0.1}}}},
    {"phases": {"a": {"method": "sft"}}, "train": {"steps": 3}},
    {"train": {"steps": 0}},
    {"train": {"steps": "ten"}},
    {"train": {"scheduler": "cosin"}},
    {"sampling": {"top_p": 1.5}},
    {"logging": {"trackers": ["weights"]}},
    {"roles": {"rollout": {"wokers": 3}}},
    {"roles": {"second": {"model": "m"}}},
    {"rewards": [{"url": []}]},
    {"model": "gpt2"},
]  # fmt: skip


@pytest.mark.parametrize("tree", GOOD, ids=json.dumps)
def test_what_troupe_accepts_is_valid(tree: dict[str, Any]):
    assert schema().is_valid(tree), [error.message for error in schema().iter_errors(tree)]
    if "my/methods.py:mine" not in tree.values():  # which there is no file of
        assert accepted(tree) == (True, True)


@pytest.mark.parametrize("tree", BAD, ids=json.dumps)
def test_what_is_misspelt_or_out_of_range_is_invalid_and_troupe_refuses_it_too(tree: dict[str, Any]):
    assert accepted(tree) == (False, False)


def test_every_key_of_a_recipe_is_in_the_schema_with_its_help():
    whole = recipe_schema()

    def descriptions(node: Any) -> set[str]:
        if isinstance(node, dict):
            own = {node["description"]} if isinstance(node.get("description"), str) else set[str]()
            return own.union(*map(descriptions, node.values()))
        return set[str]().union(*map(descriptions, node)) if isinstance(node, list) else set()

    said = {" ".join(text.split()) for text in descriptions(whole)}
    missing = [key.name for key in every_key() if key.help and not any(text.startswith(key.help) for text in said)]
    assert missing == []


def test_every_method_is_offered_with_what_it_does_and_with_its_options():
    phase = recipe_schema()["$defs"]["PhaseConfig"]
    choices = phase["properties"]["method"]["anyOf"]
    offered = {each["const"]: each["description"] for each in choices if "const" in each}
    assert offered.keys() == METHODS.keys() and all(offered.values())
    options = {
        case["if"]["properties"]["method"]["const"]: case["then"]["properties"]["options"] for case in phase["allOf"]
    }
    assert options["grpo"]["properties"]["num_generations"] == {"type": "integer", "minimum": 2, "default": 8}
    assert "$ref" not in json.dumps(list(options.values())), "a reference would point outside of the option"


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["schema"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out) == recipe_schema()
