"""The automaton of an episode, without engine, environment process or clock: the tokens of a row, and when it ends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from actors.errors import DataFailure
from rollout.episode import Episode
from rollout.sampling import Finish, TurnRow
from tests.unit.episode_stage import LIMITS, completion, request_of


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
