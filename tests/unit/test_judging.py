"""What a judge is asked, and what its answers make of the completions. No model is asked here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import ConfigError
from orchestrator.config.schema import RewardConfig
from rewards.judge import PROMPTS
from rewards.judging import PATTERNS, Asking, Cases, Judged, Plan, all_true, as_text

PAIR = "{prompt}|{response0}|{response1}"


def asking(kind: Any, template: str, **settings: Any) -> Asking:
    return Asking(kind, template, settings.pop("pattern", PATTERNS[kind]), **settings)


def cases(*completions: str, prompt: str = "q", **columns: list[Any]) -> Cases:
    return Cases([prompt] * len(completions), completions, columns)


def answered(plan: Plan, *by: Any) -> Judged:
    """Judged by functions from question to answer, one per judgement."""
    return plan.judged({text: [each(text) for each in by] for text in plan.questions})


def longer(question: str) -> str:
    _, first, second = question.split("|")
    return f"Verdict: {'A' if len(first) > len(second) else 'tie' if len(first) == len(second) else 'B'}"


def test_a_pair_is_asked_in_both_orders_and_the_win_rate_is_the_share_of_siblings_beaten() -> None:
    plan = asking("pairwise", PAIR).plan(cases("a", "bbb", "cc"))
    assert set(plan.questions) == {"q|a|bbb", "q|bbb|a", "q|a|cc", "q|cc|a", "q|bbb|cc", "q|cc|bbb"}
    judged = answered(plan, longer)
    assert judged.values == (0.0, 1.0, 0.5) and judged.unparsable == 0 and judged.answers == 6
    assert judged.contradictory == 0 and judged.comparisons == 3


def test_a_judge_that_prefers_what_comes_first_calls_ties_and_that_is_counted() -> None:
    judged = answered(asking("pairwise", PAIR).plan(cases("a", "bbb")), lambda _: "Verdict: A")
    assert judged.values == (0.5, 0.5) and (judged.contradictory, judged.comparisons) == (1, 1)


def test_of_a_verdict_that_is_a_tie_in_one_order_only_a_tie_is_made() -> None:
    def says(question: str) -> str:
        return "Verdict: tie" if question == "q|a|bbb" else "Verdict: A"

    assert answered(asking("pairwise", PAIR).plan(cases("a", "bbb")), says).values == (0.5, 0.5)
    assert answered(asking("pairwise", PAIR).plan(cases("a", "bbb")), longer).values == (0.0, 1.0)


def test_an_answer_that_cannot_be_read_takes_part_in_no_win_rate() -> None:
    def says(question: str) -> str:
        return "I cannot say." if "cc" in question else longer(question)

    judged = answered(asking("pairwise", PAIR).plan(cases("a", "bbb", "cc")), says)
    assert judged.values == (0.0, 1.0, None) and (judged.unparsable, judged.answers) == (4, 6)
    alone = answered(asking("pairwise", PAIR).plan(cases("a")), longer)
    assert alone.values == (None,), "a completion without siblings has been compared with nothing"


def test_equal_completions_tie_and_are_asked_about_once() -> None:
    plan = asking("pairwise", PAIR).plan(cases("bb", "a", "bb"))
    assert plan.questions == ("q|bb|a", "q|a|bb")
    assert answered(plan, longer).values == (0.75, 0.0, 0.75)


def test_several_judgements_of_a_pair_are_averaged_over_those_read_in_both_orders() -> None:
    plan = asking("pairwise", PAIR, judgements=3).plan(cases("a", "bbb"))
    judged = answered(plan, longer, lambda _: "Verdict: A", lambda text: longer(text) if "q|a" in text else "?")
    assert judged.values == (0.25, 0.75), "a win, a tie, and one that was read in one order only"


def test_only_completions_of_the_same_prompt_are_siblings() -> None:
    mixed = Cases(["q", "r", "q"], ["a", "bb", "ccc"])
    assert answered(asking("pairwise", PAIR).plan(mixed), longer).values == (0.0, None, 1.0)


def test_completions_can_be_compared_with_a_column_instead_of_their_siblings() -> None:
    plan = asking("pairwise", PAIR, against="gold").plan(cases("a", "bbb", "cc", gold=["xx"] * 3))
    assert len(plan.questions) == 6 and answered(plan, longer).values == (0.0, 1.0, 0.5)
    assert plan.asking.columns == {"gold"}


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Score: 7", 7.0),
        ("**Score: 7.5**", 7.5),
        ("Score: 2. No:\nscore = 3/10", 3.0),
        ("Score: -3", -3.0),
        ("Score: 11", None),
        ("Score: -11", None),
        ("7", None),
        ("Score: seven", None),
        ("", None),
    ],
)
def test_a_score_is_the_last_one_and_outside_its_range_no_opinion(answer: str, score: float | None) -> None:
    plan = asking("rubric", "{completion}", lowest=-10.0).plan(cases("a"))
    assert answered(plan, lambda _: answer).values == (score,)


def test_a_rubric_is_the_mean_over_the_judgements_that_can_be_read() -> None:
    plan = asking("rubric", "{completion}", judgements=3).plan(cases("a", "b"))
    judged = plan.judged({"a": ["Score: 2", "?", "Score: 5"], "b": ["?", "?", "Score: 99"]})
    assert judged.values == (3.5, None) and judged.unparsable == 4
    assert judged.said == (("Score: 2", "?", "Score: 5"), ("?", "?", "Score: 99"))


@pytest.mark.parametrize(
    ("answer", "value"),
    [("Verdict: yes", 1.0), ("verdict - NO.", 0.0), ("Verdict: yes? No.\nVerdict: undecided", None), ("yes", None)],
)
def test_a_binary_judge_says_yes_no_or_nothing(answer: str, value: float | None) -> None:
    assert answered(asking("binary", "{completion}").plan(cases("a")), lambda _: answer).values == (value,)


def test_a_mixture_is_true_if_all_say_so_and_undecided_if_one_is() -> None:
    def judged(*values: float | None) -> Judged:
        return Judged(values, answers=4, unparsable=values.count(None), said=((),) * 4)

    mixture = all_true([judged(1.0, 1.0, 0.0, 0.0), judged(1.0, 0.5, 1.0, None), judged(1.0, 1.0, 1.0, 1.0)])
    assert mixture.values == (1.0, 0.0, 0.0, None) and (mixture.unparsable, mixture.answers) == (1, 12)


@given(st.lists(st.sampled_from(["a", "bb", "ccc", "dddd"]), min_size=2, max_size=6))
def test_win_rates_of_a_judge_that_can_be_read_add_up_to_half_the_group(completions: list[str]) -> None:
    judged = answered(asking("pairwise", PAIR).plan(cases(*completions)), longer)
    assert sum(value or 0.0 for value in judged.values) == pytest.approx(len(completions) / 2)
    order = np.argsort([len(text) for text in completions], kind="stable")
    ranked = [judged.values[row] for row in order]
    assert ranked == sorted(ranked, key=lambda value: value or 0.0), "and rank the group"


def test_a_prompt_is_given_the_columns_that_it_names_and_braces_of_completions_are_text() -> None:
    plan = asking("binary", '{prompt} {rubric} {{"x": 1}} {completion}').plan(cases("{prompt}", rubric=[["a", 1]]))
    assert plan.questions == ("q ['a', 1] {\"x\": 1} {prompt}",) and plan.asking.columns == {"rubric"}


def test_a_conversation_is_read_with_its_roles_and_a_single_message_without() -> None:
    asked = [{"role": "user", "content": "q"}]
    assert as_text(asked) == "q" and as_text("q") == "q"
    assert as_text([{"role": "system", "content": "be brief"}, *asked]) == "system: be brief\n\nuser: q"


@pytest.mark.parametrize(
    ("kind", "template", "pattern", "said"),
    [
        ("pairwise", "{prompt} {response0}", None, "must have the field {response1}; it has prompt, response0"),
        ("rubric", "{prompt}", None, "must have the field {completion}"),
        ("rubric", "{completion} {response0}", None, "has no field {response0}, which is another kind's"),
        ("binary", "{completion} {", None, "the prompt cannot be read: .*write {{ and }} for braces"),
        ("binary", "{completion.__class__}", None, "the field {completion.__class__}; a field is a name"),
        ("binary", "{completion:>999999}", None, "a field is a name and nothing else"),
        ("binary", "{completion}", "(yes", "is no regular expression"),
        ("binary", "{completion}", "(?P<yes>y)", r"\(\?P<no>...\) and \(\?P<yes>...\); it has yes"),
        ("pairwise", PAIR, "(?P<first>0)|(?P<second>1)|(?P<score>2)", "may have .*tie.*; it has first, score, second"),
    ],
)
def test_a_prompt_or_pattern_that_cannot_work_is_refused(
    kind: Any, template: str, pattern: str | None, said: str
) -> None:
    with pytest.raises(ConfigError, match=f"here: .*{said}"):
        asking(kind, template, pattern=pattern or PATTERNS[kind]).check("here")
    asking("pairwise", PAIR, pattern="^(?:(?P<first>0)|(?P<second>1))").check("one that other libraries' prompts need")


@pytest.mark.parametrize("kind", ["pairwise", "rubric", "binary"])
def test_the_prompts_that_come_with_troupe_fit_their_kinds_and_say_what_is_read(kind: Any) -> None:
    ours = asking(kind, (PROMPTS / f"{kind}.txt").read_text(), lowest=1.0, highest=5.0)
    ours.check(kind)
    assert ours.columns == frozenset()
    text = ours.plan(cases("first", "second")).questions[0]
    assert "first" in text and "q" in text and ("from 1 to 5" in text) == (kind == "rubric")
    forms = [line for line in text.splitlines() if line.startswith(("Verdict: ", "Score: "))]
    read = [ours.read(line.replace("NUMBER", "4")) for line in forms]
    assert read == {"pairwise": [1.0, 0.0, 0.5], "rubric": [4.0], "binary": [1.0, 0.0, None]}[kind]


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ({}, "a judge is an endpoint"),
        ({"url": "https://a/v1", "model": "m", "role": "r"}, "a judge is an endpoint"),
        ({"url": "https://a/v1"}, "needs the name of its model"),
        ({"role": "r", "model": "m"}, "model is for a judge with a url"),
        ({"role": "r", "judgements": 3}, "set temperature above 0"),
        ({"role": "r", "kind": "binary", "against": "gold"}, "against is for kind=pairwise"),
        ({"role": "r", "score_range": [1, 5]}, "score_range is for kind=rubric"),
        ({"role": "r", "kind": "rubric", "score_range": [5, 1]}, "must rise"),
        ([{"role": "r", "kind": "binary"}, {"role": "r"}], "each must be kind=binary; one is pairwise"),
        (
            [{"role": "r", "kind": "binary"}, {"url": "https://a/v1", "model": "m", "kind": "binary"}],
            "all endpoints, or all engine roles",
        ),
    ],
)
def test_settings_of_a_judge_that_do_not_go_together_are_refused(judge: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RewardConfig(judge=judge)
    assert RewardConfig.model_validate({"judge": {"role": "r"}}).judges[0].kind == "pairwise"


def test_limits_of_calls_are_refused_for_a_judge_that_is_an_engine_role() -> None:
    with pytest.raises(ValueError, match=r"timeout_s is for a judge with a url.*roles.r.request_timeout_s"):
        RewardConfig.model_validate({"judge": {"role": "r"}, "timeout_s": 3.0})


def test_a_prompt_file_that_is_missing_is_named(tmp_path: Path) -> None:
    from rewards.specs import check_reward

    judge = {"url": "https://a.example/v1", "model": "m", "template": str(tmp_path / "none.txt")}
    with pytest.raises(ConfigError, match=r"template=.*none\.txt cannot be read"):
        check_reward(RewardConfig.model_validate({"judge": judge}))


def test_a_prompt_may_stand_in_the_configuration_itself_and_must_have_its_fields() -> None:
    from rewards.specs import check_reward

    def asked(template: str) -> Any:
        judge = {"kind": "binary", "role": "r", "template": template}
        return check_reward(RewardConfig.model_validate({"judge": judge}))

    assert asked("{prompt}{completion}?").judges[0].asking.template == "{prompt}{completion}?"
    with pytest.raises(ConfigError, match=r"must have the field \{completion\}"):
        asked("{prompt}?")
