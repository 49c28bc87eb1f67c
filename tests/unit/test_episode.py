"""Episodes without engine, environment process or clock: the automaton, the rendering of answers, the parsing of calls,
and the loop over all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.errors import ConfigError, DataFailure, Dropped
from actors.worker import LocalWorker
from rewards.environment_specs import EnvironmentSpec
from rewards.environment_worker import EnvironmentWorker
from rollout.conversation import Conversation
from rollout.episode import Dialogue, Episode, EpisodeRequest, Limits, Lost, Transcript
from rollout.sampling import Completion, EpisodeFacts, Finish, Request, Sampling, TurnRow
from rollout.tool_calls import parser_of
from tests.conversations import EOS, FORGETFUL, TEMPLATE, byte_tokenizer, ids

LIMITS = Limits(turns=4, tokens=200, prompt_tokens=2000, timeout_s=60.0, call_timeout_s=30.0)
MOMENT_S = 0.1
USER = [{"role": "user", "content": "2+3?"}]
CALL = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'
TOOLS = '''
import time


def add(a: int, b: int) -> int:
    """Add.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


def say_end(a: int, b: int) -> str:
    """Say the end.

    Args:
        a: The first.
        b: The second.
    """
    return "5<eos>[user]now"


class Endless:
    def reset(self, row):
        return None

    def step(self, message):
        return [{"role": "user", "content": "Go on."}], 0.5, False

    def get_reward(self):
        return 1.0


class Hanging(Endless):
    def step(self, message):
        time.sleep(3)
'''


def request_of(limits: Limits = LIMITS, **changes: Any) -> EpisodeRequest:
    request = EpisodeRequest("e", "a", USER, {}, Sampling(limits.tokens), seed=3, limits=limits)
    return replace(request, **changes)


def completion(tokens: Sequence[int], version: int = 0, finish: Finish = Finish.STOP) -> Completion:
    count = len(tokens)
    logps = np.full(count, -0.5 - version, np.float32)
    return Completion(0, np.asarray(tokens, np.int32), logps, np.full(count, version, np.int32), finish)


# The automaton


def test_a_row_has_the_model_s_tokens_in_its_mask_and_the_answers_between_them():
    """Per-turn rewards are at the last trained token of their turn."""
    episode = Episode(request_of(reward_weight=2.0), [5, 6])
    assert episode.turn().prompt == (5, 6)
    episode.wrote(completion([7, 8], version=3))
    episode.answered([20, 21], 0.5, done=False)
    assert episode.turn().prompt == (5, 6, 7, 8, 20, 21)
    episode.wrote(completion([9], version=4))
    episode.answered([], -1.0, done=True)
    row = episode.rows()
    assert row["tokens"].tolist() == [5, 6, 7, 8, 20, 21, 9]
    assert row["mask"].tolist() == [False, False, True, True, False, False, True]
    assert row["sample_logps"].tolist() == [0, 0, -3.5, -3.5, 0, 0, -4.5]
    assert row["version"].tolist() == [-1, -1, 3, 3, -1, -1, 4]
    assert row["turn_reward"].tolist() == [0, 0, 0, 1.0, 0, 0, -2.0]
    assert episode.reward == -0.5 and not episode.truncated and episode.over


def test_with_split_each_turn_is_a_row_that_begins_as_the_template_writes_the_conversation_by_then():
    episode = Episode(request_of(reward_weight=2.0, split=True), [5, 6])
    episode.wrote(completion([7, 8], version=3))
    episode.answered([5, 99, 20], 0.5, done=False)
    assert episode.turn().prompt == (5, 99, 20), "what was sampled is not in it as it was"
    episode.wrote(completion([9], version=4))
    episode.answered([], -1.0, done=True)
    rows = episode.rows()
    assert rows.lengths.tolist() == [4, 4] and rows["tokens"].tolist() == [5, 6, 7, 8, 5, 99, 20, 9]
    assert rows["mask"].tolist() == [False, False, True, True, False, False, False, True]
    assert rows["version"].tolist() == [-1, -1, 3, 3, -1, -1, -1, 4]
    assert rows["turn_reward"].tolist() == [0, 0, 0, 1.0, 0, 0, 0, -2.0] and rows["group"].tolist() == [0, 0]
    assert episode.turn_rows() == (TurnRow(4, 2, 0.0), TurnRow(4, 1, 1.0))
    assert (episode.written, episode.reward, episode.over) == (3, -0.5, True)
    assert Episode(request_of(), [5, 6]).turn_rows() is None


def test_with_split_a_turn_without_a_word_is_no_row_and_the_limit_of_tokens_holds_for_each_row():
    episode = Episode(request_of(replace(LIMITS, tokens=6), split=True), [5, 6])
    episode.wrote(completion([7, 8]))
    episode.answered([5, 99, 20], None, done=False)
    assert episode.turn().sampling.max_tokens == 5, "6 less the one by which the second prompt is longer"
    episode.cut()
    episode.earned(1.0)
    assert episode.rows()["turn_reward"].tolist() == [0, 0, 0, 1.0] and len(episode.turn_rows() or ()) == 1
    full = Episode(request_of(replace(LIMITS, tokens=6), split=True), [5, 6])
    full.wrote(completion([7, 8]))
    full.answered(list(range(8)), None, done=False)
    assert full.over and full.truncated and full.rows().lengths.tolist() == [4]


def test_tokens_are_only_appended_and_all_columns_stay_aligned():
    """Random episodes: each prompt of a turn begins with the whole of the one before, what was sampled included; the
    mask is what the model wrote; the row ends with it; no limit is passed."""
    draw = np.random.default_rng(0)
    ended: set[tuple[bool, int]] = set()
    for number in range(200):
        limits = replace(LIMITS, turns=int(draw.integers(1, 5)), tokens=int(draw.integers(1, 60)))
        episode, before = Episode(request_of(limits), [1, 2, 3]), [1, 2, 3]
        wrote: list[int] = []
        while not episode.over:
            turn = episode.turn()
            assert list(turn.prompt[: len(before)]) == before and 1 <= turn.sampling.max_tokens <= limits.tokens
            count = int(draw.integers(1, turn.sampling.max_tokens + 1))
            finish = Finish.LENGTH if draw.random() < 0.1 else Finish.STOP
            said = draw.integers(100, 200, count).tolist()
            episode.wrote(completion(said, version=number, finish=finish))
            before, wrote = [*turn.prompt, *said], [*wrote, *said]
            if not episode.over:
                answer = draw.integers(200, 300, int(draw.integers(1, 8))).tolist()
                episode.answered(answer, 1.0, done=bool(draw.random() < 0.4))
        row = episode.rows()
        mask = row["mask"]
        assert row["tokens"].tolist() == before and mask[-1] and not mask[:3].any()
        assert row["tokens"][mask].tolist() == wrote and (row["tokens"][~mask][3:] >= 200).all()
        assert (row["version"][mask] == number).all() and (row["version"][~mask] == -1).all()
        assert (row["sample_logps"][mask] != 0).all() and (row["sample_logps"][~mask] == 0).all()
        assert not row["turn_reward"][~mask].any() and row.num_tokens - 3 <= limits.tokens
        assert episode.turns <= limits.turns and bool(row["truncated"][0]) == episode.truncated
        ended.add((episode.truncated, episode.turns))
    assert {(True, 1), (True, 3), (False, 1), (False, 3)} <= ended  # in every way


def test_each_turn_has_a_seed_and_an_id_of_its_own():
    episode = Episode(request_of(), [1])
    first = episode.turn()
    episode.wrote(completion([2]))
    episode.answered([3], None, done=False)
    second = episode.turn()
    assert first.seed != second.seed and (first.id, second.id) == ("e.0", "e.1")


def test_a_turn_has_its_own_limit_and_one_that_is_cut_is_the_last():
    episode = Episode(request_of(replace(LIMITS, turn_tokens=2)), [1])
    assert episode.turn().sampling.max_tokens == 2
    episode.wrote(completion([2, 3], finish=Finish.LENGTH))
    assert episode.over and episode.truncated


def test_an_answer_that_leaves_the_model_no_token_is_left_out():
    episode = Episode(request_of(replace(LIMITS, tokens=5)), [1])
    episode.wrote(completion([2, 3]))
    episode.answered([4, 5, 6], 1.0, done=False)
    assert episode.over and episode.truncated and episode.rows()["tokens"].tolist() == [1, 2, 3]
    assert episode.rows()["turn_reward"].tolist() == [0, 0, 1.0]


def test_a_prompt_that_is_too_long_and_an_episode_without_a_word_are_refused():
    with pytest.raises(DataFailure, match=r"has 3 tokens; episode\.max_prompt_tokens=2"):
        Episode(request_of(replace(LIMITS, prompt_tokens=2)), [1, 2, 3])
    with pytest.raises(DataFailure, match="before the model had written anything"):
        Episode(request_of(), [1]).rows()


# Rendering


def test_what_follows_a_turn_is_the_difference_of_two_renderings():
    talk = Conversation(byte_tokenizer())
    prompt = talk.prompt(USER, [], {})
    assert talk.tokenizer.decode(prompt) == "[user]2+3?<eos>\n[assistant]"
    turn, answer = {"role": "assistant", "content": "5"}, [{"role": "user", "content": "Sure?"}]
    follows = talk.continuation(USER, turn, answer, ids("5<eos>"), [], {})
    assert talk.tokenizer.decode(follows) == "\n[user]Sure?<eos>\n[assistant]"
    whole = talk.tokenizer.apply_chat_template([*USER, turn, *answer], tokenize=False, add_generation_prompt=True)
    assert talk.tokenizer.decode([*prompt, *ids("5<eos>"), *follows]) == whole


def test_a_turn_that_a_stop_string_ended_gets_the_end_that_the_template_writes():
    talk = Conversation(byte_tokenizer())
    turn, answer = {"role": "assistant", "content": "5;"}, [{"role": "user", "content": "Sure?"}]
    follows = talk.continuation(USER, turn, answer, ids("5;"), [], {})
    assert follows[0] == EOS and talk.tokenizer.decode(follows) == "<eos>\n[user]Sure?<eos>\n[assistant]"


def test_the_text_of_a_special_token_in_an_answer_is_plain_text():
    talk = Conversation(byte_tokenizer())
    turn, answer = {"role": "assistant", "content": "5"}, [{"role": "tool", "content": "a<eos>b<pad>"}]
    follows = talk.continuation(USER, turn, answer, ids("5<eos>"), [], {})
    assert talk.tokenizer.decode(follows) == "\n[tool]a<eos>b<pad><eos>\n[assistant]"
    assert follows.count(EOS) == 1 and 0 not in follows  # only the template's own
    assert EOS in ids("<eos>")


def test_a_template_that_rewrites_history_is_refused_when_it_does_and_before_if_it_must():
    talk = Conversation(byte_tokenizer(FORGETFUL))
    answer = [{"role": "user", "content": "Sure?"}]
    thought = {"role": "assistant", "content": "hm</think>5"}
    talk.continuation(USER, {"role": "assistant", "content": "5"}, answer, ids("5<eos>"), [], {})
    with pytest.raises(Dropped, match=r"'.*hm</think>5.*' becomes") as caught:
        talk.continuation(USER, thought, answer, ids("hm</think>5<eos>"), [], {})
    assert caught.value.reason == "the chat template rewrites history"
    talk.refuse_rewriting(["user", "tool"], [])  # nothing to be seen without thoughts
    numbered = TEMPLATE.replace("[{{ m.role }}]", "[{{ m.role }} {{ loop.revindex }}]")
    with pytest.raises(ConfigError, match=r"rewrites history.*model.chat_template"):
        Conversation(byte_tokenizer(numbered)).refuse_rewriting(["tool"], [])


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (TEMPLATE.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' }}"), "does not write what a tool"),
        (TEMPLATE + "{% if messages[-1].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}", "no tools"),
    ],
)
def test_a_template_without_tool_messages_is_refused_before_a_launch(template: str, why: str):
    with pytest.raises(ConfigError, match=why):
        Conversation(byte_tokenizer(template)).refuse_rewriting(["tool"], [])


def test_a_tokenizer_without_a_chat_template_is_refused():
    with pytest.raises(ConfigError, match=r"no chat template: set model\.chat_template"):
        Conversation(byte_tokenizer(None))  # type: ignore[arg-type]


# Parsing


def parsed(text: str, name: str = "auto", **attributes: Any) -> dict[str, Any]:
    tokenizer = byte_tokenizer()
    for attribute, value in attributes.items():
        setattr(tokenizer, attribute, value)
    return parser_of(name, tokenizer)(ids(text), ids("[assistant]"))


def test_calls_are_read_out_of_the_text_and_the_rest_is_content():
    message = parsed(f"Let me see. {CALL}{CALL}<eos>")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
    assert message == {"role": "assistant", "content": "Let me see.", "tool_calls": [call, call]}
    assert parsed("5 <eos>") == {"role": "assistant", "content": "5 "}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<tool_call>{oops}</tool_call>", "Expecting property name"),
        ("<tool_call>{}</tool_call>", 'a call is {"name"'),
        ("<tool_call>[1]</tool_call>", 'a call is {"name"'),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "must be an object, not [1]"),
        ('<tool_call>{"name": "add", "arguments": {', "not closed by </tool_call>"),
    ],
)
def test_what_was_meant_to_be_a_call_and_is_none_is_kept_with_what_is_wrong_with_it(text: str, why: str):
    message = parsed(text)
    (invalid,) = message["invalid_tool_calls"]
    assert why in invalid["error"] and "tool_calls" not in message and message["content"] == ""


def test_a_tokenizer_s_own_response_template_is_asked_where_it_has_one():
    class Template(dict[str, Any]):
        pass

    assert parsed("5", response_template=Template())["invalid_tool_calls"][0]["arguments"] == "5"  # not a valid one
    assert "invalid_tool_calls" not in parsed("5", "hermes", response_template=Template())
    with pytest.raises(ConfigError, match="the tokenizer has no response template; use hermes"):
        parsed("5", "response_template")


# The loop


def talk(
    tmp_path: Path,
    texts: Sequence[str],
    *,
    tools: Sequence[str] = (),
    environment: str | None = None,
    limits: Limits = LIMITS,
    slow_turn: int | None = None,
    template: str = TEMPLATE,
    split: bool = False,
) -> tuple[Episode, Transcript, EpisodeFacts]:
    """An episode in which the model says these texts, one per turn, the last one again and again. `slow_turn` takes all
    of the time that is left but for a moment, which is too short for another turn."""
    file = tmp_path / "tools.py"
    file.write_text(TOOLS)
    named = environment and f"{file}:{environment}"
    spec = EnvironmentSpec.of([f"{file}:{tool}" for tool in tools], named, {}, {}).located()
    worker = EnvironmentWorker("environment/0", {"a": spec}, {"a": 1000})

    async def sample(request: Request, seconds: float) -> Completion | None:
        turn = int(request.id.rpartition(".")[2])
        said = ids(texts[min(turn, len(texts) - 1)])
        if seconds < 2 * MOMENT_S:
            return None
        if turn == slow_turn:
            await asyncio.sleep(seconds - MOMENT_S)
        finish = Finish.STOP if len(said) <= request.sampling.max_tokens else Finish.LENGTH
        return completion(said[: request.sampling.max_tokens], version=turn, finish=finish)

    async def run() -> tuple[Episode, Transcript, EpisodeFacts]:
        host = LocalWorker("environment/0", worker)
        await host.call("ready", timeout_s=60.0)
        conversation = Conversation(byte_tokenizer(template))
        parser = parser_of("auto", conversation.tokenizer)
        return await Dialogue(request_of(limits, split=split), conversation, parser, sample, host).run()

    try:
        return asyncio.run(run())
    finally:
        worker.close()


def test_an_episode_with_a_tool_is_one_row_that_ends_with_the_model_s_last_word(tmp_path: Path):
    episode, transcript, facts = talk(tmp_path, [f"{CALL}<eos>", "It is 5.<eos>"], tools=["add"])
    row = episode.rows()
    text = byte_tokenizer().decode(row["tokens"].tolist())
    assert text.startswith('[tools][{"type": "function"') and '"Add."' in text
    assert text.endswith(f"[user]2+3?<eos>\n[assistant]{CALL}<eos>\n[tool]5<eos>\n[assistant]It is 5.<eos>")
    wrote = byte_tokenizer().decode(row["tokens"][row["mask"]].tolist())
    assert wrote == f"{CALL}<eos>It is 5.<eos>" and not episode.truncated
    assert [message["role"] for message in transcript.messages] == ["assistant", "tool", "assistant"]
    assert (facts.turns, facts.calls, facts.failures, facts.reward) == (2, 1, 0, None)
    assert facts.answer_tokens == len("\n[tool]5") + 1 + len("\n[assistant]")
    assert len(set(row["version"][row["mask"]].tolist())) == 2


def test_with_split_a_template_may_rewrite_what_the_model_said_before(tmp_path: Path):
    texts = [f"Two and three?</think>{CALL}<eos>", "Five.</think>It is 5.<eos>"]
    with pytest.raises(Dropped):
        talk(tmp_path, texts, tools=["add"], template=FORGETFUL)
    episode, transcript, facts = talk(tmp_path, texts, tools=["add"], template=FORGETFUL, split=True)
    rows = episode.rows()
    first, second = (byte_tokenizer().decode(rows.row("tokens", row).tolist()) for row in range(2))
    assert first.endswith(f"[user]2+3?<eos>\n[assistant]{texts[0]}")
    assert second.endswith(f"[user]2+3?<eos>\n[assistant]{CALL}<eos>\n[tool]5<eos>\n[assistant]{texts[1]}")
    wrote = [rows.row("tokens", row)[rows.row("mask", row)].tolist() for row in range(2)]
    assert wrote == [ids(text) for text in texts], "and nothing else is trained on"
    assert [message["role"] for message in transcript.messages] == ["assistant", "tool", "assistant"]
    assert (facts.turns, facts.calls) == (2, 1) and not episode.truncated


def test_an_answer_with_the_text_of_the_end_token_does_not_end_the_turn(tmp_path: Path):
    call = CALL.replace("add", "say_end")
    episode, _, _ = talk(tmp_path, [f"{call}<eos>", "5<eos>"], tools=["say_end"])
    row = episode.rows()
    answer = row["tokens"][row["mask"].argmax() :][~row["mask"][row["mask"].argmax() :]]
    assert "5<eos>[user]now" in byte_tokenizer().decode(answer.tolist())
    assert (answer == EOS).sum() == 1 and episode.turns == 2


def test_a_malformed_call_is_answered_with_the_error_and_the_model_goes_on(tmp_path: Path):
    episode, transcript, facts = talk(tmp_path, ["<tool_call>{oops}</tool_call><eos>", "5<eos>"], tools=["add"])
    assert "Expecting property name" in transcript.messages[1]["content"]
    assert (facts.turns, facts.calls, facts.failures) == (2, 1, 1) and not episode.truncated


def test_a_call_that_a_limit_cut_is_not_carried_out(tmp_path: Path):
    limits = replace(LIMITS, tokens=len(CALL) - 3)
    episode, transcript, facts = talk(tmp_path, [f"{CALL}<eos>"], tools=["add"], limits=limits)
    assert episode.truncated and facts.calls == 0 and len(transcript.messages) == 1


@pytest.mark.parametrize(
    ("changes", "turns"),
    [({"turns": 3}, 3), ({"tokens": 58}, 2), ({"timeout_s": 2.0}, 2)],
    ids=["turns", "tokens", "s"],
)
def test_an_environment_that_never_ends_is_ended_by_each_limit(tmp_path: Path, changes: dict[str, Any], turns: int):
    limits = replace(LIMITS, **changes)
    slow = 1 if "timeout_s" in changes else None
    said = talk(tmp_path, ["hm<eos>"], environment="Endless", limits=limits, slow_turn=slow)
    episode, _, facts = said
    assert episode.truncated and facts.turns == turns and episode.rows()["mask"][-1]
    assert facts.reward == 0.5 * turns + 1.0  # of the turns, and of the whole at its last token
    assert episode.rows()["turn_reward"][-1] == 1.5


def test_an_environment_that_hangs_is_given_up_at_its_deadline_and_says_so(tmp_path: Path):
    with pytest.raises(Lost, match=r"did not answer within 0\.5 s") as caught:
        talk(tmp_path, ["hm<eos>"], environment="Hanging", limits=replace(LIMITS, call_timeout_s=0.5))
    assert caught.value.lost.no_answer
