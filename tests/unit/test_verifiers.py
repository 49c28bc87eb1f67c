"""Rewards that check: unit tests of code in the sandbox, regular expressions, JSON schemas."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import Any

import pytest
from jsonschema import SchemaError

from actors.errors import ConfigError
from rewards.formats import json_schema, regex
from rewards.unit_tests import UnitTests, code_of
from tests.unit.reward_stage import load_reward

ADD = "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
ADD_TESTS = ["assert add(2, 3) == 5", "assert add(-1, 1) == 0", "assert add(2, 2) == 5"]


@pytest.fixture(scope="module")
def unit_tests() -> UnitTests:
    try:
        return UnitTests(cpu_limit_s=0.4, deadline_s=10)
    except ConfigError as error:
        pytest.skip(str(error))


def scored(reward: UnitTests, completion: str, tests: Any) -> float | None:
    return reward([completion], [tests], lambda column, values: None)[0]


def test_the_share_of_tests_that_pass_is_the_reward(unit_tests: UnitTests):
    logged: dict[str, Any] = {}
    answers = [ADD, ADD.replace("+", "-"), "I cannot program."]
    scores = unit_tests(answers, [ADD_TESTS] * 3, lambda column, values: logged.update({column: values}))
    assert scores == [2 / 3, 0.0, 0.0] and logged == {"unit_tests": ["2/3", "0/3", "0/3"]}


def test_all_or_nothing_gives_one_only_if_every_test_passes():
    strict = UnitTests(all_or_nothing=True)
    assert (scored(strict, ADD, ADD_TESTS), scored(strict, ADD, ADD_TESTS[:2])) == (0.0, 1.0)


def test_a_row_without_tests_has_no_opinion(unit_tests: UnitTests):
    assert scored(unit_tests, ADD, None) is scored(unit_tests, ADD, []) is scored(unit_tests, ADD, "") is None


def test_functions_named_test_count_one_by_one_and_programs_by_what_they_print(unit_tests: UnitTests):
    text = "import math\ndef test_sum(): assert add(math.inf, 1) == math.inf\ndef test_no(): assert add(1, 1) == 3\n"
    assert scored(unit_tests, ADD, text) == 0.5
    program = "```\na, b = map(int, input().split())\nprint(a + b, '')\n```"
    tests = [{"input": "2 3\n", "output": "5\n\n"}, {"input": "2 3", "output": "6"}, {"input": "x", "output": ""}]
    assert scored(unit_tests, program, tests) == 1 / 3
    assert scored(unit_tests, program, [*tests[:1], "assert True"]) == 0.5  # imported, the program has no input


def test_code_that_ends_early_passes_no_test(unit_tests: UnitTests):
    """Ways to end with exit code 0, or to claim success."""
    for trick in (
        "import os; os._exit(0)",
        "exit(0)",
        "raise SystemExit",
        "import os; os.write(3, b'0\\n1\\n2\\n')",
        "import builtins; builtins.add = lambda a, b: 5",
        "def add(a, b): import os; os._exit(0)",
        "def add(a, b): exit()",
        "while True: pass",
        "def add(a, b):\n    while True: pass",
        "x = [0] * 10**10",
        "def add(a, b): return add(a, b)",
        "not python",
    ):
        answer = f"```python\n{trick}\n```"
        passed = scored(unit_tests, answer, ["assert add(2, 3) == 6"])
        assert passed == 0.0, trick


def test_what_one_test_does_to_a_name_does_not_reach_the_next(unit_tests: UnitTests):
    assert scored(unit_tests, ADD, ["add = None", "assert add(1, 1) == 2"]) == 1.0


def test_tests_that_passed_before_a_limit_count(unit_tests: UnitTests):
    code = "```python\ndef f(x):\n    while x: pass\n    return x\n```"
    assert scored(unit_tests, code, ["assert f(0) == 0", "f(1)", "assert f(0) == 0"]) == 1 / 3


@pytest.mark.parametrize("tests", [[3], [{"input": "1"}], "def broken(:"], ids=["a number", "no output", "no Python"])
def test_tests_that_are_none_are_an_error_and_no_score(unit_tests: UnitTests, tests: Any):
    with pytest.raises(ValueError, match="the column `tests` has"):
        scored(unit_tests, ADD, tests)


def test_the_code_is_the_last_block_that_may_be_python():
    two = "```py\nfirst = 1\n```\nbetter:\n```\nsecond = 2\n```\noutput:\n```text\n2\n```"
    assert code_of(two) == "second = 2\n"
    assert code_of("x = 1") is None and code_of("```python\nnever closed") is None
    loose = UnitTests(require_fence=False)
    assert (scored(loose, "x = 1", "assert x == 1"), scored(loose, two, "assert second == 2")) == (1.0, 1.0)


def test_a_machine_that_cannot_isolate_fails_when_the_reward_is_loaded():
    """Not when the first completion is scored, and never with a score of zero."""
    if not shutil.which("unshare"):
        pytest.skip("no command `unshare`")
    command = "from rewards.loading import *\nRewardSpec('unit_tests').located().load()"
    script = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" -c "$1"'
    unable = ["unshare", "--user", "--map-root-user", "sh", "-c", script, sys.executable, command]
    found = subprocess.run(unable, capture_output=True, text=True)
    assert found.returncode == 1 and "ConfigError: reward unit_tests:" in found.stderr
    assert "it lacks namespaces" in found.stderr


def test_a_regular_expression_matches_the_whole_text_or_anywhere():
    texts = ["answer: 42", "I say answer: 42", "answer: x\nanswer: 1"]
    assert regex(texts, r"answer: \d+") == [1.0, 0.0, 0.0]
    assert regex(texts, r"answer: \d+", match="anywhere") == [1.0, 1.0, 1.0]
    assert regex(["a", "a"], ["a", "b"]) == [1.0, 0.0]  # a column
    bound = load_reward("regex", {"pattern": "a.b"})
    assert bound.call(completions=["a\nb", "ab"], pattern=["column", "column"]) == [1.0, 0.0]


def test_a_pattern_that_backtracks_without_end_is_an_error_and_no_score():
    with pytest.raises(TimeoutError, match="backtracks without end"):
        regex(["a" * 60 + "b"], r"(?:a|aa)+")


SCHEMA = {"type": "object", "required": ["x"], "properties": {"x": {"type": "integer", "maximum": 9}}}


def test_a_text_that_fits_a_json_schema_is_worth_one():
    texts = ['{"x": 3}', 'Sure:\n```json\n{"x": 3}\n```', '{"x": 30}', '{"x": NaN}', "{'x': 3}", "[" * 100_000]
    assert json_schema(texts, SCHEMA) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert json_schema(['{"x": 3}'] * 2, [json.dumps(SCHEMA), '{"type": "array"}']) == [1.0, 0.0]


def test_a_schema_that_is_none_is_an_error_and_no_score():
    with pytest.raises(SchemaError):
        json_schema(["{}"], {"type": "number of things"})
    with pytest.raises(ValueError):
        json_schema(["{}"], "{")
    with pytest.raises(Exception, match=r"Unresolvable|unresolvable"):
        json_schema(["{}"], {"$ref": "http://127.0.0.1:9/schema.json"})
