"""`troupe keys`: every key of the configuration, with its type, its default and a line of help."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from actors.errors import ConfigError
from orchestrator.cli import main
from orchestrator.config.error_messages import schema_keys
from orchestrator.config.keys import every_key, keys_below
from orchestrator.config.schema import PhaseConfig, RunConfig

Keys = Callable[..., list[str]]


@pytest.fixture
def keys(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Keys:
    """The lines that the command prints on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: str) -> list[str]:
        with pytest.raises(SystemExit) as ended:
            main(["keys", *arguments])
        assert not ended.value.code
        return capsys.readouterr().out.splitlines()

    return call


def test_every_key_of_the_schema_has_one_line_of_help_that_ends_a_sentence():
    found = {key.path: key for key in every_key()}
    assert set(found) == set(schema_keys(RunConfig))
    assert [key.name for key in found.values() if not re.fullmatch(r"[^\n]{8,119}\.", key.help)] == []


def test_no_two_keys_of_a_section_share_their_help():
    said = [(key.path[:-1], key.help) for key in every_key()]
    assert len(said) == len(set(said))


def test_a_key_shows_its_type_its_range_its_default_and_its_help(keys: Keys):
    head, what = keys("train.max_grad_norm")
    assert head == "train.max_grad_norm  float > 0 | none, default 1.0"
    assert what == "    Longer gradients are scaled to this norm. None: no limit."


def test_a_key_without_a_default_is_called_required(keys: Keys):
    assert keys("phases.main.data.mixture.N.path")[0] == "data.mixture.N.path  str, required"


def test_a_section_shows_all_of_its_keys_and_nothing_else(keys: Keys):
    named = [line.split()[0] for line in keys("checkpoint") if not line.startswith(" ")]
    assert named == ["checkpoint", "checkpoint.every", "checkpoint.keep", "checkpoint.grace_s"]


def test_a_phases_keys_are_found_with_and_without_the_phases_name():
    assert keys_below("phases.sft.train.bema") == keys_below("train.bema")
    assert [key.name for key in keys_below("train.bema")][:2] == ["train.bema", "train.bema.update_freq"]


def test_the_beginning_of_a_name_finds_the_keys_that_begin_with_it():
    assert [key.name for key in keys_below("roles.rollout.max_m")] == ["roles.rollout.max_model_len"]


@pytest.mark.parametrize(
    ("asked", "hint"),
    [("trian", "did you mean train?"), ("batch_size", "there is train.batch_size"), ("zzz", "troupe keys --all")],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(asked: str, hint: str):
    with pytest.raises(ConfigError, match=re.escape(hint)):
        keys_below(asked)


def test_without_a_prefix_there_is_a_line_for_each_key_of_the_top_level(keys: Keys):
    lines = keys()
    for name in ("seed", "train", "roles", "phases"):
        assert sum(line.split()[:1] == [name] for line in lines) == 1, name
    assert not any(line.startswith("train.") for line in lines)


def test_all_shows_every_key_and_no_line_is_wider_than_the_terminal(keys: Keys):
    lines = keys("--all")
    assert {line.split()[0] for line in lines if not line.startswith(" ")} == {key.name for key in every_key()}
    assert max(map(len, lines)) <= 80


def test_the_default_that_is_shown_is_the_one_that_a_run_gets():
    shown = {key.name: key.default for key in every_key()}
    config = RunConfig(phases={"sft": PhaseConfig()})
    assert shown["sampling.top_p"] == str(config.phases["sft"].sampling.top_p)
    assert shown["roles.policy.zero_stage"] == str(config.roles.policy.zero_stage)
    assert shown["logging.trackers"] == "[tensorboard]"
