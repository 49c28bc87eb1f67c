"""The tools and environments that come with Troupe, by themselves and in an environment worker."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from transformers.utils import get_json_schema

from actors.errors import ConfigError
from rewards.environment_specs import EnvironmentSpec
from rewards.environment_worker import EnvironmentWorker
from rewards.environments.calculator import calculator
from rewards.environments.corpus_search import CorpusSearch
from rewards.environments.critique_and_revision import CRITIQUE, REVISION, CritiqueAndRevision
from rewards.environments.guessing_game import GuessingGame
from rewards.environments.python_sandbox import PythonSandbox
from rewards.shipped_environments import ENVIRONMENTS, FACTORIES, TOOLS


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("37+58", "95"),
        ("(12.5 + 3) * 4", "62"),
        ("7/2", "3.5"),
        ("2^90", "1237940039285380274899124224"),
        ("1/3", "0.333333333333"),
        ("sqrt(2)^2", "2"),
        ("-3 - -4", "1"),
        ("1,000 + 1", "1001"),
        ("10^40", "1.0e+40"),
    ],
)
def test_the_calculator_gives_a_value(expression: str, value: str):
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression", ["1/0", "x+1", "1+1=2", "(1, 2)", "sqrt(-1)", "", "__import__('os')", "9^9^9^9", "2+"]
)
def test_what_the_calculator_cannot_work_out_is_an_error_and_nothing_is_run(expression: str):
    with pytest.raises(ValueError, match=r"cannot work out|not a real number"):
        calculator(expression)


def test_every_tool_has_a_schema_for_the_chat_template(tmp_path: Path):
    (tmp_path / "corpus.txt").write_text("one passage")
    tools = [calculator, CorpusSearch(str(tmp_path / "corpus.txt")).search, PythonSandbox.python]
    names = [get_json_schema(tool)["function"]["name"] for tool in tools]
    assert names == ["calculator", "search", "python"]


def say(game: GuessingGame, text: str) -> tuple[str, float | None, bool]:
    return game.step({"role": "assistant", "content": text})


def test_the_game_answers_guesses_and_an_early_find_is_worth_more():
    game = GuessingGame(guesses=3)
    assert game.reset({"secret": 42}) == "Guess a whole number from 1 to 100. You have 3 guesses."
    assert say(game, "50?") == ("Lower.", None, False)
    assert say(game, "between 1 and 40") == ("Higher.", None, False)
    assert say(game, "42") == ("Right.", 0.5, True)
    game.reset({"secret": 42})
    assert say(game, "It is 42.") == ("Right.", 1.0, True)


def test_the_game_ends_with_its_guesses_and_a_turn_without_a_number_uses_one_up():
    game = GuessingGame(guesses=2)
    game.reset({"secret": "7"})
    assert say(game, "hm") == ("Say a number.", None, False)
    assert say(game, "9" * 5000) == ("It was 7.", 0.0, True)
    with pytest.raises(ValueError, match="`secret` is 101"):
        game.reset({"secret": 101})


PRINCIPLES = ["Be brief.", {"critique": "Is it kind?", "revision": "Be kind."}]


def asks(environment: CritiqueAndRevision, prompt: str) -> list[str]:
    environment.reset({"prompt": prompt})
    asked: list[str] = []
    while not (reply := environment.step({"role": "assistant", "content": "words"}))[2]:
        assert reply[1] is None and reply[0] is not None
        asked.append(reply[0])
    assert reply == (None, None, True)
    return asked


def test_each_revision_follows_a_critique_by_the_same_principle_and_the_episode_ends_with_the_last_one():
    asked = [asks(CritiqueAndRevision(PRINCIPLES, revisions=3), f"p{i}") for i in range(16)]
    own, written = (
        ("Is it kind?", "Be kind."),
        tuple(text.format(principle="Be brief.") for text in (CRITIQUE, REVISION)),
    )
    for each in asked:
        assert len(each) == 6 and {*zip(each[::2], each[1::2], strict=True)} <= {own, written}
    assert len({tuple(each) for each in asked}) > 4  # prompts go by different ones
    assert asked[3] == asks(CritiqueAndRevision(PRINCIPLES, revisions=3), "p3")
    assert asks(CritiqueAndRevision([{"revision": "Be kind."}], critiques=False), "p") == ["Be kind."]


@pytest.mark.parametrize(
    ("principles", "options", "message"),
    [
        ([], {}, "a list of at least one"),
        ("Be kind.", {}, "a list of at least one"),
        (["Be kind."], {"revisions": 0}, "revisions=0"),
        ([{"revision": "Be kind."}], {}, "must have a text 'critique'"),
    ],
)
def test_principles_that_say_nothing_are_refused(principles: Any, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        CritiqueAndRevision(principles, **options)


def test_the_python_tool_shows_what_was_printed_and_why_it_ended():
    try:
        tool = PythonSandbox(cpu_limit_s=0.25, output_kib=1)
    except ConfigError as error:
        pytest.skip(str(error))
    assert tool.python("print(sum(range(10)))") == "45"
    assert tool.python("x = 1") == "it printed nothing"
    assert tool.python("print(1); 1/0").startswith("1\nTraceback") and "ZeroDivisionError" in tool.python("1/0")
    assert tool.python("while True: pass") == "ended: it computed for more than 0.25 s"
    assert tool.python("while True: print('x')").endswith("ended: it printed more than 1 KiB")
    assert tool.python("exit(3)") == "ended with exit code 3"


PASSAGES = [
    {"title": "Bern", "text": "Bern is the seat of the Swiss government, on the river Aare."},
    {"title": "Aare", "text": "A river that flows through Bern and Thun."},
    {"title": "Oslo", "text": "Oslo is the capital of Norway. Oslo has a fjord."},
]


def test_search_finds_the_passages_that_have_rare_words_of_the_query_first(tmp_path: Path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps(each) for each in PASSAGES))
    found = CorpusSearch(str(corpus), results=2)
    assert found.search("capital of NORWAY").startswith("[1] Oslo: Oslo is the capital of Norway.")
    assert [line[:8] for line in found.search("river Thun").split("\n\n")] == ["[1] Aare", "[2] Bern"]
    assert found.search("xylophone") == found.search("?!") == "nothing was found"
    assert CorpusSearch(str(corpus), results=1, max_passage_chars=7).search("fjord") == "[1] Oslo: O"


def test_a_corpus_is_read_from_each_kind_of_file(tmp_path: Path):
    text, table = tmp_path / "corpus.txt", tmp_path / "corpus.parquet"
    text.write_text("first passage\nof two lines\n\nsecond passage\n")
    parquet.write_table(pa.table({"text": ["first passage", "second passage"]}), table)
    for path in (text, table):
        assert CorpusSearch(str(path)).search("second") == "[1] second passage"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "cannot be read: FileNotFoundError"),
        ("bad.jsonl", "{", "cannot be read: JSONDecodeError"),
        ("column.jsonl", '{"body": "x"}', "each row needs a column `text`"),
        ("empty.txt", "\n\n", "has no passage"),
        ("table.csv", "text\nx", "none of .jsonl, .parquet, .txt"),
    ],
)
def test_a_corpus_that_is_none_is_refused(tmp_path: Path, name: str, content: str | None, message: str):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        CorpusSearch(str(tmp_path / name))


def test_each_is_found_by_its_name_and_answers_in_an_environment_worker(tmp_path: Path):
    (tmp_path / "corpus.txt").write_text("Bern lies on the Aare.")
    specs = {
        "tools": EnvironmentSpec.of(["calculator"], None, {}, {}),
        "game": EnvironmentSpec.of([], "guessing_game", {}, {"high": 9}),
        "revision": EnvironmentSpec.of([], "critique_and_revision", {}, {"principles": ["Be kind."]}),
        "search": EnvironmentSpec.of(["calculator"], None, {"": "search"}, {"corpus": str(tmp_path / "corpus.txt")}),
        "python": EnvironmentSpec.of([], None, {"": "python"}, {"without": ["namespaces", "landlock", "seccomp"]}),
    }
    assert {*TOOLS, *ENVIRONMENTS, *FACTORIES} == {
        *("calculator", "critique_and_revision", "guessing_game", "search", "python")
    }

    def calls(name: str, **arguments: str) -> dict[str, object]:
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": name, "arguments": arguments}}],
        }

    turns = {
        "tools": calls("calculator", expression="6*7"),
        "game": {"role": "assistant", "content": "5"},
        "revision": {"role": "assistant", "content": "5"},
        "search": calls("search", query="aare"),
        "python": calls("python", code="print('é')"),
    }

    async def answers() -> dict[str, str]:
        worker = EnvironmentWorker(
            "environment/0", {name: spec.located() for name, spec in specs.items()}, dict.fromkeys(specs, 99)
        )
        await worker.ready()
        found: dict[str, str] = {}
        for name, turn in turns.items():
            await worker.open(name, name, "question", {"secret": 5})
            reply = await worker.step(name, turn)
            found[name] = reply.messages[0]["content"]
        worker.close()
        return found

    assert asyncio.run(answers()) == {
        "tools": "42",
        "game": "Right.",
        "revision": CRITIQUE.format(principle="Be kind."),
        "search": "[1] Bern lies on the Aare.",
        "python": "é",
    }
