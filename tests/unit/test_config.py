"""Recipes, overrides, and how a wrong one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import ConfigError
from orchestrator.config.error_messages import schema_keys
from orchestrator.config.loading import Draft, load_config, load_run, recipes
from orchestrator.config.overrides import apply, dotted, load_yaml, parse
from orchestrator.config.roles import TrainerRole
from orchestrator.config.schema import RunConfig

SINGLE = """\
# A phase at the top level. More about it.
name: tried
method: grpo
options: {num_generations: 4, epsilon: 1e-1}
data: {path: "example:arithmetic"}
train:
  steps: 3
  learning_rate: 1e-3
rewards: [{fn: exact_match}, {fn: length, weight: 0.5}]
"""
SEVERAL = """\
phases:
  sft: {method: sft, train: {steps: 1}}
  grpo: {method: grpo, train: {steps: 2}}
"""


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return written(tmp_path / "single.yaml", SINGLE)


@pytest.fixture
def several(tmp_path: Path) -> Path:
    return written(tmp_path / "several.yaml", SEVERAL)


def written(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


def refusal(recipe: Path | str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, overrides)
    return str(caught.value)


def test_a_single_phase_at_the_top_level_is_named_after_its_method(single: Path):
    config = load_config(single)
    assert list(config.phases) == ["grpo"]
    assert config.phases["grpo"].train.steps == 3
    assert config.phases["grpo"].options["num_generations"] == 4


def test_a_number_with_an_exponent_is_a_number_in_files_and_in_overrides(single: Path):
    config = load_config(single, ["train.adam_eps=1e-6", "options.epsilon_high=3e-1"])
    phase = config.phases["grpo"]
    assert (phase.train.learning_rate, phase.train.adam_eps) == (1e-3, 1e-6)
    assert (phase.options["epsilon"], phase.options["epsilon_high"]) == (0.1, 0.3)


def test_overrides_reach_single_phases_with_and_without_the_phases_name(single: Path):
    config = load_config(single, ["train.steps=7", "phases.grpo.train.batch_size=2", "seed=5"])
    assert (config.phases["grpo"].train.steps, config.phases["grpo"].train.batch_size, config.seed) == (7, 2, 5)


def test_overriding_the_method_also_renames_the_phase(single: Path):
    config = load_config(single, ["method=sft", "options={}"])
    assert list(config.phases) == ["sft"]


def test_the_last_of_two_overrides_wins(single: Path):
    assert load_config(single, ["seed=1", "seed=2"]).seed == 2


def test_an_override_reaches_into_a_list(single: Path):
    assert load_config(single, ["rewards.1.weight=2"]).rewards[1].weight == 2.0


def test_an_override_past_the_end_of_a_list_is_refused(single: Path):
    assert "2 is not a position in a list of 2" in refusal(single, "rewards.2.weight=2")


def test_a_phase_key_without_a_phase_is_refused_if_there_are_several(several: Path):
    message = refusal(several, "train.steps=9")
    assert "sft, grpo" in message
    assert "phases.sft.train.steps=9" in message


def test_a_phase_key_beside_phases_is_refused_with_its_place(tmp_path: Path):
    message = refusal(written(tmp_path / "both.yaml", SEVERAL + "train: {steps: 3}\n"))
    assert "line 4" in message
    assert "phases.NAME.train" in message


def test_an_unknown_key_is_an_error_with_the_nearest_key_and_the_line(tmp_path: Path):
    message = refusal(written(tmp_path / "a.yaml", SINGLE.replace("learning_rate", "lerning_rate")))
    assert "train.lerning_rate: no such key; did you mean train.learning_rate?" in message
    assert "a.yaml, line 8" in message


def test_an_unknown_top_level_key_is_an_error_with_the_nearest_key_and_the_override(single: Path, several: Path):
    assert refusal(single, "trian.steps=3").splitlines() == [
        "trian: no such key; did you mean train?",
        "  set in override 'trian.steps=3'",
    ]
    assert "did you mean phases.NAME.train?" in refusal(several, "trian.steps=3")


def test_a_key_of_another_section_is_an_error_that_names_its_place(single: Path):
    assert "there is train.batch_size" in refusal(single, "batch_size=3")


def test_a_value_out_of_range_names_value_range_and_override(single: Path):
    message = refusal(single, "roles.rollout.workers=0")
    assert "roles.rollout.workers: 0 is not allowed: it must be greater than or equal to 1" in message
    assert "set in override 'roles.rollout.workers=0'" in message


def test_engines_of_teacher_and_reference_follow_them_whichever_key_of_them_is_set(single: Path):
    names = ("rollout", "teacher_rollout", "reference_rollout")
    roles = load_config(single, [f"roles.{name}.engine=hf" for name in names]).roles
    assert [roles.engine(name).follows for name in names] == ["policy", "teacher", "reference"]
    other = load_config(single, ["roles.teacher_rollout.follows=reference"])
    assert other.roles.teacher_rollout.follows == "reference"


def test_a_role_with_a_new_name_has_the_class_of_its_kind(single: Path):
    roles = load_config(single, ["roles.critic.kind=trainer", "roles.critic.optimizer.learning_rate=0.5"]).roles
    assert isinstance(roles["critic"], TrainerRole) and roles["critic"].optimizer.learning_rate == 0.5
    assert roles["policy"].kind == "trainer" and roles["reward"].kind == "scorers" and "judge" not in roles
    assert {"policy", "critic", "rollout", "reference"} <= {name for name, _ in roles}


def test_a_role_with_a_new_name_needs_a_kind_and_has_the_keys_of_that_kind(single: Path):
    message = refusal(single, "roles.critic.ranks=2")
    assert message.startswith("roles.critic: a role with a name of your own needs a kind: trainer, frozen")
    assert "no such key" in refusal(single, "roles.judge.kind=scorers", "roles.judge.ranks=2")
    assert "roles.reference.optimizer" in refusal(single, "roles.reference.optimizer.learning_rate=1.0")
    assert "roles.policy.kind" in refusal(single, "roles.policy.kind=engine"), "the usual names keep their kind"


@pytest.mark.parametrize("name", ["a/b", "../b", ".", "", "a b", "x" * 101])
def test_a_name_of_a_run_or_phase_that_is_not_a_valid_folder_name_is_refused_with_the_rule(name: str, single: Path):
    message = refusal(single, f"name='{name}'")
    assert message.startswith(f"name: {name!r} is not allowed: it must be a valid" if len(name) < 80 else "name: 'xxx")
    assert "set in override" in message
    with pytest.raises(ValueError, match="it must be a valid folder name"):
        RunConfig.model_validate({"phases": {name: {}}})


def test_every_wrong_key_is_reported_at_once(single: Path):
    message = refusal(single, "sed=1", "train.steps=0", "roles.policy.backend=megatron")
    assert all(part in message for part in ("sed: no such key", "train.steps: 0", "'single' or 'deepspeed'"))


def test_a_value_that_fits_no_member_of_a_union_lists_all_members(single: Path):
    message = refusal(single, "roles.policy.deepspeed=3")
    assert "a valid dictionary" in message
    assert "path" in message


def test_a_missing_key_is_named(single: Path):
    assert "data.mixture.0.fraction: is required" in refusal(single, "data.mixture=[{path: a.jsonl}]")


def test_an_unknown_method_is_an_error_with_the_nearest_name(single: Path):
    message = refusal(single, "method=gropo")
    assert "grpo" in message
    assert "override 'method=gropo'" in message


def test_an_option_that_the_method_does_not_have_is_refused_with_the_place_where_it_was_set(single: Path):
    message = refusal(single, "options.num_generation=4")
    assert "num_generations" in message
    assert "override 'options.num_generation=4'" in message


def test_an_option_out_of_the_methods_range_is_refused_with_its_line(tmp_path: Path):
    message = refusal(written(tmp_path / "a.yaml", SINGLE.replace("num_generations: 4", "num_generations: 1")))
    assert "num_generations" in message
    assert "a.yaml, line 4" in message


def test_an_override_without_a_value_is_refused_with_an_example(single: Path):
    assert "train.learning_rate=1e-4" in refusal(single, "train.steps")


def test_an_override_below_a_plain_value_is_refused(single: Path):
    assert "train.steps is 3, which has no keys" in refusal(single, "train.steps.more=1")


def test_a_key_given_twice_is_refused_with_both_lines(tmp_path: Path):
    assert "lines 2 and 10" in refusal(written(tmp_path / "a.yaml", SINGLE + "name: again\n"))


def test_broken_yaml_is_refused_with_the_line(tmp_path: Path):
    assert "line 2" in refusal(written(tmp_path / "a.yaml", "name: x\nphases: {a: [}\n"))


def test_an_empty_file_is_refused(tmp_path: Path):
    assert "keys and values" in refusal(written(tmp_path / "a.yaml", ""))


def test_an_unknown_recipe_is_an_error_that_lists_the_existing_ones():
    message = refusal("grpo_arithmetik")
    assert "did you mean grpo_arithmetic?" in message


def test_a_file_that_is_not_there_is_named():
    assert "nowhere/x.yaml" in refusal("nowhere/x.yaml")


@pytest.mark.parametrize("name", recipes())
def test_a_shipped_recipe_loads_and_has_a_description(name: str):
    assert load_config(name).phases
    assert recipes()[name]


def test_a_run_is_resumed_with_the_configuration_that_it_was_started_with(single: Path, tmp_path: Path):
    config = load_config(single, ["train.steps=7", "roles.rollout.gpus=0.5"])
    (tmp_path / "config.json").write_text(config.model_dump_json(indent=2))
    assert load_run(tmp_path) == config


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="not a run's folder"):
        load_run(tmp_path)


def test_every_key_of_the_configuration_can_be_named_in_an_override():
    """No section hides behind a type that the error messages cannot look into."""
    keys = {dotted(keys) for keys in schema_keys(RunConfig)}
    assert {"phases.NAME.train.learning_rate", "roles.reference.model", "rewards.N.fn", "model.lora.r"} <= keys


@given(st.lists(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), min_size=1, max_size=4), st.integers() | st.booleans())
def test_an_override_sets_exactly_its_own_path(path: list[str], value: int | bool):
    tree: dict[str, object] = {"untouched-key": 1}
    apply(tree, parse(f"{'.'.join(path)}={str(value).lower()}"))
    node: object = tree
    for key in path:
        assert isinstance(node, dict)
        node = node[key]
    assert node == value
    assert tree["untouched-key"] == 1


def test_lines_are_known_inside_lists_and_mappings():
    _, lines = load_yaml("a:\n  - b: 1\n    c: 2\n", "x")
    assert lines[("a", 0, "c")] == 3


def test_an_error_in_an_overridden_setting_names_the_override_and_not_the_file(single: Path):
    draft = Draft.read(single)
    draft.override(parse("train={steps: 1}"))
    assert draft.where(("train", "learning_rate")) == "override 'train={steps: 1}'"
