"""How a reward is found and loaded, and what is said of one that cannot be."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from actors.errors import ConfigError
from orchestrator.config.schema import RewardConfig
from rewards.loading import RewardSpec
from rewards.specs import check_columns, check_names, check_reward
from tests.unit.reward_stage import SCORING, file, load_reward

__all__ = ["file"]  # a fixture


def test_a_function_of_a_file_named_like_our_own_package_is_found(file: Path) -> None:
    before = list(sys.path)
    reward = load_reward(f"{file}:length")
    assert reward.call(completions=["abc"]) == [3.0]
    assert sys.path == before
    assert sys.modules["rewards"].__file__ != str(file)


def test_a_located_reward_needs_neither_its_file_nor_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SCORING)
    monkeypatch.chdir(tmp_path)
    spec = RewardSpec("mine.py:length").located()
    path.unlink()
    monkeypatch.chdir("/")
    assert spec.load().call(completions=["ab"]) == [2.0]


def test_a_class_is_made_once_with_its_options(file: Path) -> None:
    reward = load_reward(f"{file}:Threshold", {"at": 2})
    assert reward.call(completion_ids=[[1, 2], [1, 2, 3]]) == [0.0, 1.0]


def test_a_class_is_not_built_to_be_checked_and_once_to_be_used(tmp_path: Path) -> None:
    built = tmp_path / "built"
    (tmp_path / "judge.py").write_text(
        "class Judge:\n"
        "    def __init__(self, into):\n"
        "        open(into, 'a').write('x')\n"
        "    def __call__(self, completions, answer):\n"
        "        return [1.0]\n"
    )
    spec = check_reward(RewardConfig(fn=f"{tmp_path}/judge.py:Judge", options={"into": str(built)}))
    check_columns([spec], ["answer"], "the data set")
    with pytest.raises(ConfigError, match="needs the column 'answer'"):
        check_columns([spec], ["gold"], "the data set")
    assert not built.exists()
    assert spec.load().call(completions=["a"], answer=["b"]) == [1.0]
    assert built.read_text() == "x"


def test_a_class_that_cannot_be_built_is_named_with_its_options_when_a_worker_starts(tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(
        "class Judge:\n    def __init__(self, at): raise OSError('no such model')\n    def __call__(self): ...\n"
    )
    spec = RewardSpec(f"{tmp_path}/judge.py:Judge", options={"at": 3}).located()
    with pytest.raises(ConfigError, match=r"Judge\(at=3\) failed: OSError: no such model"):
        spec.load()


TYPED = """
from __future__ import annotations
from collections.abc import Mapping, Sequence
from typing import Literal

class Ours: ...

def typed(completions, *, count: int = 1, share: float = 0.5, strict: bool = True, words: tuple[str, ...] = (),
          mode: Literal["a", "b"] = "a", ours: Ours | None = None, plain=3):
    return [(count, share, strict, words, mode, plain)]
"""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"count": "three"}, "options.count='three': Input should be a valid integer"),
        ({"count": "3"}, "options.count='3'"),
        ({"count": True}, "options.count=True"),
        ({"count": 2.5}, "options.count=2.5"),
        ({"share": "half"}, "options.share='half': Input should be a valid number"),
        ({"share": True}, "options.share=True"),
        ({"strict": "no"}, "options.strict='no': Input should be a valid boolean"),
        ({"strict": 1}, "options.strict=1"),
        ({"words": "abc"}, "options.words='abc': Input should be a valid array"),
        ({"words": [1]}, r"options.words=\[1\]: Input should be a valid string"),
        ({"mode": "c"}, "options.mode='c': Input should be 'a' or 'b'"),
    ],
)
def test_an_option_of_the_wrong_type_is_refused_with_its_value(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    (tmp_path / "mine.py").write_text(TYPED)
    with pytest.raises(ConfigError, match=said):
        RewardSpec(f"{tmp_path}/mine.py:typed", options=options).located()


def test_an_option_arrives_as_its_parameter_has_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TYPED)
    options = {"count": 2, "share": 1, "strict": False, "words": ["x", "y"], "mode": "b", "plain": "free"}
    reward = load_reward(f"{tmp_path}/mine.py:typed", options)
    assert reward.call(completions=[]) == [(2, 1.0, False, ("x", "y"), "b", "free")]


def test_options_of_our_own_rewards_are_tried_with_their_types() -> None:
    with pytest.raises(ConfigError, match=r"options\.correct=\['high', 'low'\]"):
        RewardSpec("cosine_scaled", options={"max_len": 8, "correct": ["high", "low"]}).located()
    with pytest.raises(ConfigError, match=r"options\.per_token='-1'"):
        RewardSpec("completion_length", options={"per_token": "-1"}).located()


def test_two_rewards_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="exact_match is the name of two rewards"):
        check_names(["exact_match", "exact_match"])
    check_names([RewardSpec("exact_match").label, RewardSpec("exact_match", name="strict").label])


def test_a_file_imports_what_lies_beside_it_wherever_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {
        "scoring.py": "import helper\nfrom parts.deep import one\nimport parts.deep\nfrom parts import deep\n"
        "def score(completions):\n    import late\n"
        "    return [helper.TWO + one() + parts.deep.one() + deep.one() + late.five()] * len(completions)\n",
        "helper.py": "import random\nTWO = 2\nassert hasattr(random, 'shuffle')\n",
        "late.py": "from helper import TWO\ndef five(): return TWO + 3\n",
        "random.py": "raise RuntimeError('the standard library keeps its names')\n",
        "parts/__init__.py": "",
        "parts/deep.py": "from . import number\ndef one(): return number.ONE\n",
        "parts/number.py": "ONE = 1\n",
        "unused.py": "raise RuntimeError('nobody imports this')\n",
    }.items():
        (tmp_path / "user" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "user" / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    spec = RewardSpec("user/scoring.py:score").located()
    assert spec.code is not None and "unused" not in {file.name for file in spec.code.files}
    shutil.rmtree(tmp_path / "user")
    alone = (
        "import pickle, sys; spec = pickle.load(open(sys.argv[1], 'rb')); print(spec.load().call(completions=['a']))"
    )
    (tmp_path / "spec").write_bytes(pickle.dumps(spec))
    command = [sys.executable, "-c", alone, str(tmp_path / "spec")]
    there = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60)
    assert (there.stdout, there.stderr) == ("[10]\n", "")


def test_two_files_may_each_have_a_helper_of_the_same_name(tmp_path: Path) -> None:
    found = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "helper.py").write_text(f"NUMBER = {number}\n")
        (folder / "mine.py").write_text("import helper\ndef score(completions): return [helper.NUMBER]\n")
        found.append(load_reward(f"{folder}/mine.py:score").call(completions=["a"]))
    assert found == [[1], [2]]
    assert "helper" not in sys.modules


def test_a_file_that_ends_the_process_is_a_few_lines(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("raise SystemExit(4)")
    with pytest.raises(ConfigError, match=r"bad\.py failed: SystemExit: 4"):
        load_reward(f"{tmp_path}/bad.py:f")


def test_the_configuration_of_a_reward_becomes_its_spec(file: Path) -> None:
    spec = check_reward(RewardConfig(fn=f"{file}:half", weight=0.5, name="mine", options={"factor": 3}))
    reward = spec.load()
    assert (reward.name, reward.weight, reward.is_async) == ("mine", 0.5, True)
    with pytest.raises(ConfigError, match="did you mean exact_match"):
        check_reward(RewardConfig(fn="exact_mach"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"role": ["a", "b", "a"]}, "role names a twice"),
        ({"role": "a", "combine": "min"}, "role names a alone"),
        ({"role": ["a", "b"], "combine": "min", "deviations": 2.0}, "deviations=2 is for combine=mean_minus_std"),
        ({"fn": "exact_match", "combine": "min"}, "combine is for a model's score"),
        ({"role": ["a", "b"], "steps": "each"}, "steps=each takes the steps of one model"),
        ({"role": "a", "steps": "each", "on_failure": 0.5}, "on_failure=0.5 would be the reward of an answer"),
        ({"role": []}, "at least 1 item"),
    ],
)
def test_settings_of_an_ensemble_that_say_nothing_are_refused(given: dict[str, Any], said: str) -> None:
    RewardConfig.model_validate({"role": ["a", "b"], "combine": "mean_minus_std", "deviations": 2.0})
    with pytest.raises(ValidationError) as caught:
        RewardConfig.model_validate(given)
    assert said in str(caught.value)


def test_an_importable_module_is_found() -> None:
    assert load_reward("rewards.functions:exact_match").call(completions=["1"], answer=["1"]) == [1.0]


@pytest.mark.parametrize(
    ("fn", "options", "named"),
    [
        ("exact_mach", {}, "did you mean exact_match"),
        ("{file}:lenght", {}, "did you mean length"),
        ("{file}", {}, "no function"),
        ("{file}:", {}, "no function"),
        ("{file}:NOT_CALLABLE", {}, "not callable, but a int"),
        ("{file}:half", {"facto": 1}, "did you mean factor"),
        ("{file}:half", {"completions": 1}, "cannot be an option"),
        ("{file}:Threshold", {"above": 1}, "no option 'above'. There are: at"),
        ("{file}:Threshold", {}, "Threshold needs the option 'at'"),
        ("{file}:Silent", {}, "instances of Silent cannot be called"),
        ("nowhere.to.be.found:f", {}, "importing nowhere.to.be.found failed"),
        ("missing.py:f", {}, "relative paths start at"),
    ],
)
def test_a_reward_that_cannot_be_used_says_what_is_there_instead(
    file: Path, fn: str, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_reward(fn.format(file=file), options)
    assert named in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 4


def test_a_file_that_fails_is_named_with_its_error(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("1/0")
    with pytest.raises(ConfigError, match=r"bad\.py failed: ZeroDivisionError"):
        load_reward(f"{tmp_path}/bad.py:f")


def test_a_column_that_a_reward_needs_and_the_data_lacks_is_named_with_those_found(file: Path) -> None:
    specs = [RewardSpec("exact_match"), RewardSpec(f"{file}:length").located()]
    check_columns(specs, ["answer"], "the data set")
    with pytest.raises(ConfigError, match="needs the column 'answer', which the data set does not have; it has gold"):
        check_columns(specs, ["gold"], "the data set")
