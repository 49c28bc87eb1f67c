"""The examples that Troupe makes itself: reproducible, disjoint where they must be, and as skewed as they claim."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.errors import DataError, ModelError
from orchestrator.data import synthetic_examples as examples


def columns_of(name: str, *, seed: int, split: str, **options: Any) -> dict[str, list[Any]]:
    """Of a data set, which would make one row after the other, and take most of the time of a test."""
    return examples.dataset(name, seed=seed, split=split, **options).to_dict()


def problem(prompt: str) -> frozenset[int]:
    return frozenset(int(number) for number in prompt.rstrip("=").split("+"))


def test_answers_are_sums() -> None:
    data = columns_of("arithmetic", seed=0, split="train")
    for prompt, answer in zip(data["prompt"], data["answer"], strict=True):
        a, b = prompt.rstrip("=").split("+")
        assert int(a) + int(b) == int(answer)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_held_out_problem_nor_its_mirror_is_in_any_training_split_of_any_seed(seed: int) -> None:
    held_out = {problem(prompt) for prompt in columns_of("arithmetic", seed=seed, split="test")["prompt"]}
    assert len(held_out) > 300
    for name in ("arithmetic", "arithmetic_sft"):
        trained = {problem(prompt) for prompt in columns_of(name, seed=seed + 1, split="train")["prompt"]}
        assert not trained & held_out
    multiplied = columns_of("calculator_sft", seed=seed + 1, split="train")["messages"]
    assert not {problem(messages[0]["content"].replace("*", "+")) for messages in multiplied} & held_out


def test_sft_data_omits_most_carries_of_the_ones_and_is_otherwise_right() -> None:
    data = columns_of("arithmetic_sft", seed=0, split="train")
    wrong_carries, carries = 0, 0
    for prompt, completion in zip(data["prompt"], data["completion"], strict=True):
        a, b = map(int, prompt.rstrip("=").split("+"))
        if a % 10 + b % 10 < 10:
            assert int(completion) == a + b
        else:
            assert int(completion) in (a + b, a + b - 10)
            carries += 1
            wrong_carries += int(completion) == a + b - 10
    assert wrong_carries / carries == pytest.approx(0.7, abs=0.03)


def test_every_row_of_the_sft_test_split_is_right() -> None:
    data = columns_of("arithmetic_sft", seed=0, split="test")
    sums = [str(sum(map(int, prompt.rstrip("=").split("+")))) for prompt in data["prompt"]]
    assert list(data["completion"]) == sums


@pytest.mark.parametrize("slips", [0.0, 0.5])
def test_labelled_steps_are_right_until_one_has_another_result_than_its_sum(slips: float) -> None:
    data = columns_of("arithmetic_steps", seed=0, split="train", slips=slips)
    worked = columns_of("arithmetic_worked", seed=0, split="train")
    wrong = otherwise = 0
    for steps, labels, right in zip(data["completions"], data["labels"], worked["completion"], strict=True):
        first = labels.index(False) if False in labels else len(labels)
        assert labels == [True] * first + [False] * (3 - first)
        assert steps[:first] == right.split()[:first]
        if first < 3:
            a, b = map(int, steps[first].split("=")[0].split("+"))
            off_by = int(steps[first].split("=")[1]) - (a + b)
            assert 1 <= abs(off_by) <= 20
            wrong += 1
            otherwise += abs(off_by) != 10
    assert wrong / len(data["labels"]) == pytest.approx(0.5, abs=0.02)
    assert otherwise / wrong == pytest.approx(slips * 0.95, abs=0.02)


def test_half_of_the_judgements_are_of_right_sums_and_say_so() -> None:
    data = columns_of("arithmetic_judgements", seed=0, split="train")
    asked = [
        (prompt.rstrip("?").split("="), said) for prompt, said in zip(data["prompt"], data["completion"], strict=True)
    ]
    sums = [sum(map(int, problem.split("+"))) for (problem, _), _ in asked]
    for total, ((_, answer), said) in zip(sums, asked, strict=True):
        assert f"{said[0::3]} {said[1::3]}" == f"{total:03} {int(answer):03}"
        assert [verdict == "y" for verdict in said[2::3]] == [said[at] == said[at + 1] for at in (0, 3, 6)]
    right = [said[2::3] == "yyy" for _, said in asked]
    assert sum(right) / len(right) == pytest.approx(0.5, abs=0.02)


def test_an_answer_that_forgets_its_carry_is_worked_out_and_revised_when_the_user_asks() -> None:
    talks = columns_of("arithmetic_revisions", seed=0, split="train")["messages"]
    asked = columns_of("arithmetic", seed=0, split="train", conversation=True)
    right = 0
    for talk, prompt, answer in zip(talks, asked["prompt"], asked["answer"], strict=True):
        assert talk[:1] == prompt and [said["role"] for said in talk] == ["user", "assistant"] * 3
        assert [talk[2]["content"], talk[4]["content"]] == ["check", "revise"]
        ones, total = talk[3]["content"].split("=")
        assert sum(map(int, ones.split("+"))) == int(total) and int(total) % 10 == int(answer) % 10
        assert talk[5]["content"] == answer
        right += talk[1]["content"] == answer
    assert right / len(talks) == pytest.approx(1 - 0.45 * 0.7, abs=0.02)


def test_each_problem_is_used_once_before_any_is_repeated() -> None:
    all_problems = len(examples.dataset("arithmetic", seed=0, split="train"))
    prompts = list(columns_of("arithmetic", seed=0, split="train", rows=all_problems + 100)["prompt"])
    assert len(set(prompts[:all_problems])) == all_problems
    assert len(prompts) == all_problems + 100


def test_a_seed_gives_the_same_rows_and_another_seed_gives_others() -> None:
    first, again, other = (examples.dataset("skewed", seed=seed, split="train", rows=20) for seed in (0, 0, 1))
    assert first.to_dict() == again.to_dict() != other.to_dict()


def test_skewed_lengths_have_the_mean_of_their_beta_distribution_and_respect_the_maximum() -> None:
    data = columns_of("skewed", seed=0, split="train", rows=4000, max_length=256)
    lengths = np.array([len(p) + len(c) + 1 for p, c in zip(data["prompt"], data["completion"], strict=True)])
    assert lengths.max() <= 256
    assert lengths.mean() / 256 == pytest.approx(0.3, abs=0.02)
    assert all(data["prompt"]) and all(data["completion"])


@pytest.mark.parametrize(
    ("name", "split", "options", "named"),
    [
        ("arithmetics", "train", {}, "arithmetic_sft"),
        ("arithmetic", "validation", {}, "train and test"),
        ("arithmetic_sft", "train", {"forgoten": 0.5}, "forgotten"),
    ],
)
def test_an_unknown_name_split_or_option_is_an_error_that_lists_the_valid_ones(
    name: str, split: str, options: dict, named: str
) -> None:
    with pytest.raises(DataError, match=named):
        examples.dataset(name, seed=0, split=split, **options)


def test_an_unknown_example_model_is_an_error_that_lists_the_existing_ones(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"skewed-2\.6m"):
        examples.model_folder("skewed", 0, tmp_path)


def test_a_model_folder_opens_in_transformers_and_a_seed_fixes_its_weights(tmp_path: Path) -> None:
    folder = examples.model_folder("arithmetic", 0, tmp_path / "a")
    again = examples.model_folder("arithmetic", 0, tmp_path / "b")
    other = examples.model_folder("arithmetic", 1, tmp_path / "a")
    assert (folder / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert (folder / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert 1.2e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.5e6


def test_the_tokenizer_survives_saving_and_encodes_any_text_byte_by_byte(tmp_path: Path) -> None:
    reloaded = AutoTokenizer.from_pretrained(examples.model_folder("arithmetic", 0, tmp_path))
    text = "37+58=95\n grüße ✓"
    tokens = reloaded(text)["input_ids"]
    assert len(tokens) == len(text.encode())
    assert reloaded.decode(tokens) == text
    assert (reloaded.pad_token_id, reloaded.eos_token_id) == (0, 1)


def test_concurrent_requests_for_a_model_get_one_complete_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        folders = list(threads.map(lambda _: examples.model_folder("arithmetic", 3, tmp_path), range(4)))
    assert len(set(folders)) == 1
    assert [path.name for path in tmp_path.iterdir()] == [folders[0].name]
    AutoModelForCausalLM.from_pretrained(folders[0])


def test_the_rate_of_ending_gives_the_requested_mean_length() -> None:
    rate = examples.rate_for(96)
    expected = sum((1 - rate) ** k for k in range(96))
    assert expected == pytest.approx(0.3 * 96, rel=1e-6)


def test_completions_of_a_skewed_model_end_at_a_constant_rate_and_never_pad(tmp_path: Path) -> None:
    folder = examples.model_folder("skewed-2.6m", 0, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert 2.4e6 < sum(parameter.numel() for parameter in model.parameters()) < 2.8e6
    prompts = torch.randint(2, 258, (16, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        probabilities = model(prompts).logits.softmax(-1)
    ending = probabilities[..., 1]
    assert ending.mean().item() == pytest.approx(examples.rate_for(96), rel=0.1)
    assert (ending.std() / ending.mean()).item() < 0.3
    assert ending[:, 48:].mean().item() == pytest.approx(ending[:, :48].mean().item(), rel=0.15)
    assert probabilities[..., 0].max().item() < 1e-9


def test_the_rejected_answer_of_a_pair_omits_or_adds_a_carry() -> None:
    for prompt, chosen, rejected in zip(*_columns("arithmetic_pairs", "prompt", "chosen", "rejected"), strict=True):
        a, b = map(int, prompt.rstrip("=").split("+"))
        assert int(chosen) == a + b
        assert int(rejected) - int(chosen) == (-10 if a % 10 + b % 10 >= 10 else 10)


def test_with_slips_a_share_of_the_rejected_answers_is_wrong_in_other_ways_too() -> None:
    pairs = columns_of("arithmetic_pairs", seed=0, split="train", slips=0.5)
    off_by = [abs(int(wrong) - int(right)) for wrong, right in zip(pairs["rejected"], pairs["chosen"], strict=True)]
    assert min(off_by) >= 1 and set(off_by) == set(range(1, 21))
    assert 0.45 < np.mean([each != 10 for each in off_by]) < 0.5, "the others are carries"


def test_the_gold_answer_of_a_triple_is_right_and_the_chosen_one_is_right_in_its_carry_only() -> None:
    gold, chosen, rejected = _columns("arithmetic_triples", "reference", "chosen", "rejected")
    assert all(abs(int(right) - int(wrong)) == 10 for right, wrong in zip(gold, rejected, strict=True))
    assert all(int(right) // 10 == int(answer) // 10 for right, answer in zip(gold, chosen, strict=True))
    right = np.mean([one == other for one, other in zip(gold, chosen, strict=True)])
    assert right == pytest.approx(0.5, abs=0.03)


def test_a_label_is_true_exactly_for_right_answers_and_with_the_requested_frequency() -> None:
    prompts, completions, labels = _columns("arithmetic_labelled", "prompt", "completion", "label", desirable=0.3)
    sums = [sum(map(int, prompt.rstrip("=").split("+"))) for prompt in prompts]
    assert [int(answer) == right for answer, right in zip(completions, sums, strict=True)] == labels
    assert np.mean(labels) == pytest.approx(0.3, abs=0.03)


def _columns(name: str, *columns: str, **options: float) -> list[list]:
    data = columns_of(name, seed=0, split="train", **options)
    return [data[column] for column in columns]


def test_a_calculators_traces_answer_easy_problems_from_memory_and_mistype_others() -> None:
    data = columns_of("calculator_sft", seed=0, split="train")["messages"]
    by_heart = [len(messages) == 2 for messages in data]
    easy = [min(map(int, messages[0]["content"].split("*"))) < 40 for messages in data]
    assert not np.any(np.array(by_heart) & ~np.array(easy))
    assert np.mean(np.array(by_heart)[easy]) == pytest.approx(0.75, abs=0.02)
    calls = [messages for messages in data if len(messages) == 4]
    typed = [messages[1]["tool_calls"][0]["function"]["arguments"]["expression"] for messages in calls]
    wrong = [a != messages[0]["content"] for a, messages in zip(typed, calls, strict=True)]
    assert np.mean(wrong) == pytest.approx(0.25, abs=0.02)
    for expression, (_, _, tool, last) in zip(typed, calls, strict=True):
        a, b = map(int, expression.split("*"))
        assert tool["content"] == last["content"] == str(a * b)
    guesses = [messages for messages in data if len(messages) == 2]
    assert not any(eval(question["content"]) == int(answer["content"]) for question, answer in guesses)


def test_a_call_of_the_calculator_is_read_back_and_has_few_tokens(tmp_path: Path) -> None:
    words = AutoTokenizer.from_pretrained(examples.model_folder("calculator", seed=0, cache_dir=tmp_path))
    messages = examples.dataset("calculator_sft", seed=0, split="test", rows=1)["messages"][0]
    text = words.apply_chat_template(messages, tokenize=False)
    call = text[text.index("<tool_call>") : text.index("</tool_call>")].removeprefix("<tool_call>")
    assert json.loads(call) == {"name": "calculator", "arguments": {"expression": messages[0]["content"]}}
    assert len(words(text, add_special_tokens=False).input_ids) < 30
    assert words.decode(words(text, add_special_tokens=False).input_ids) == text


def test_problems_that_carry_and_the_others_are_told_apart_and_taken_alone() -> None:
    data = columns_of("arithmetic", seed=0, split="train", kinds=True)
    carries = [sum(int(part) % 10 for part in prompt.rstrip("=").split("+")) >= 10 for prompt in data["prompt"]]
    assert data["kind"] == ["carry" if each else "plain" for each in carries]
    some = {
        which: columns_of("arithmetic_sft", seed=0, split="train", carries=which, forgotten=0.0)["prompt"]
        for which in (True, False)
    }
    assert sorted([*some[True], *some[False]]) == sorted(data["prompt"])
    assert set(some[True]) == {prompt for prompt, each in zip(data["prompt"], carries, strict=True) if each}


def test_worked_additions_forget_their_first_carry_as_often_as_is_said_and_go_on_from_that() -> None:
    right, forgetful = (
        columns_of("arithmetic_worked", seed=0, split="train", **options)["completion"]
        for options in ({}, {"forgotten": 0.7})
    )
    wrong = [(known, said) for known, said in zip(right, forgetful, strict=True) if known != said]
    assert len(wrong) / len(right) == pytest.approx(0.45 * 0.7, abs=0.02)
    for known, said in wrong:
        (first, tens, last), (ones, same, end) = known.split(), said.split()
        assert tens == same and int(first.split("=")[1]) - int(ones.split("=")[1]) == 10
        assert int(last.split("=")[1]) - int(end.split("=")[1]) == 10
