"""The example `arithmetic`: two-digit additions, of which most worked examples omit the carry of the ones, so that
supervised fine-tuning alone stops improving; and what other methods continue with.

arithmetic                    problems with their answers
_sft                          worked additions that omit most carries
_pairs, _triples, _labelled   right answers beside wrongly carried ones, for preference optimisation
_worked, _steps               additions worked in three steps; such steps with labels, of which one is wrong in half of
                              the answers
_judgements                   answered problems, and for each digit of the answer whether it is right
_revisions                    conversations in which the answer is wrong as often as in `_sft`, then its ones are
                              added, then it is revised (for the model `calculator`, which has a chat template)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

SPLITS = ("train", "test")
_SPLIT_SEED = 20_240_229  # of the held-out problems: the same for every run, so that no phase trains on another's test


def arithmetic(
    *, seed: int, split: str, rows: int | None = None, conversation: bool = False, kinds: bool = False
) -> dict[str, list[Any]]:
    """Two-digit additions: `prompt` (37+58=) and `answer` (95). No problem of `test`, nor its mirror, is in `train`.
    `conversation`: the prompt is a message of the user's (37+58). `kinds`: `kind` says whether the ones `carry` or the
    problem is `plain`."""
    problems = shuffled(number_pairs(split), seed, rows)
    prompts = [_asked(f"{a}+{b}") if conversation else f"{a}+{b}=" for a, b in problems]
    told = {"kind": ["carry" if _carries(a, b) else "plain" for a, b in problems]} if kinds else {}
    return {"prompt": prompts, "answer": [str(a + b) for a, b in problems], **told}


def arithmetic_sft(
    *,
    seed: int,
    split: str,
    rows: int | None = None,
    forgotten: float = 0.7,
    hinted: float = 0.0,
    carries: bool | None = None,
) -> dict[str, list[str]]:
    """Worked additions: `prompt`, `completion`. In `train`, a carry of the ones is omitted with probability
    `forgotten`: the likeliest answer is then wrong on every problem with a carry, which are 45 % of all. `hinted`: of
    this share of `train`, the prompt begins with the right answer ((95)37+58=), and the completion is that.
    `carries`: only problems whose ones carry, or only the others."""
    rng, hints = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 2])
    problems = shuffled(number_pairs(split, carries), seed, rows)
    told = hints.random(len(problems)) < (hinted if split == "train" else 0.0)
    forgets = (rng.random(len(problems)) < (forgotten if split == "train" else 0.0)) & ~told
    answers = [_without_carry(a, b) if forget else str(a + b) for (a, b), forget in zip(problems, forgets, strict=True)]
    prompts = [f"({a + b}){a}+{b}=" if hint else f"{a}+{b}=" for (a, b), hint in zip(problems, told, strict=True)]
    return {"prompt": prompts, "completion": answers}


def arithmetic_pairs(*, seed: int, split: str, rows: int | None = None, slips: float = 0.0) -> dict[str, list[str]]:
    """Additions: `prompt`, `chosen` (the sum), `rejected` (the sum without its carry, or where there is none, with one:
    otherwise always carrying would be preferred). With probability `slips` the rejected answer is wrong in any other
    way, by 1 to 20: a reward model that has seen one kind of mistake only likes all others."""
    rng = np.random.default_rng([seed, 4])
    problems = shuffled(number_pairs(split), seed, rows)
    slipped = rng.random(len(problems)) < slips
    off_by = rng.integers(1, 21, len(problems)) * rng.choice([-1, 1], len(problems))
    rejected = [
        str(a + b + off) if slip else _with_wrong_carry(a, b)
        for (a, b), slip, off in zip(problems, slipped, off_by, strict=True)
    ]
    return {
        "prompt": [f"{a}+{b}=" for a, b in problems],
        "chosen": [str(a + b) for a, b in problems],
        "rejected": rejected,
    }


def arithmetic_triples(*, seed: int, split: str, rows: int | None = None) -> dict[str, list[str]]:
    """As `arithmetic_pairs`, but of the chosen answer only the carry is right: in half of the rows its last digit is
    off by one; `reference` is the sum."""
    problems = shuffled(number_pairs(split), seed, rows)
    sums = np.array([a + b for a, b in problems])
    slips = np.random.default_rng([seed, 2]).random(len(problems)) < 0.5
    chosen = sums // 10 * 10 + (sums + slips) % 10
    pairs = arithmetic_pairs(seed=seed, split=split, rows=rows)
    return {**pairs, "chosen": [str(answer) for answer in chosen], "reference": [str(answer) for answer in sums]}


def arithmetic_labelled(
    *, seed: int, split: str, rows: int | None = None, desirable: float = 0.5
) -> dict[str, list[str] | list[bool]]:
    """Additions with one answer each: `prompt`, `completion`, `label`. With probability `desirable` the answer is the
    sum and the label true; else it is the rejected answer of `arithmetic_pairs`."""
    problems = shuffled(number_pairs(split), seed, rows)
    labels = (np.random.default_rng([seed, 3]).random(len(problems)) < desirable).tolist()
    answers = [str(a + b) if right else _with_wrong_carry(a, b) for (a, b), right in zip(problems, labels, strict=True)]
    return {"prompt": [f"{a}+{b}=" for a, b in problems], "completion": answers, "label": labels}


def arithmetic_worked(
    *, seed: int, split: str, rows: int | None = None, forgotten: float = 0.0
) -> dict[str, list[str]]:
    """Additions worked in three steps of a line each: `prompt` (37+58=), `completion` (7+8=15, 30+50=80, 15+80=95). In
    `train`, the first step omits its carry with probability `forgotten` (7+8=5), and the last goes on from that."""
    rng = np.random.default_rng([seed, 1])
    problems = shuffled(number_pairs(split), seed, rows)
    forgets = rng.random(len(problems)) < (forgotten if split == "train" else 0.0)
    steps = [
        _worked(a, b, 0 if forget and _carries(a, b) else 3) for (a, b), forget in zip(problems, forgets, strict=True)
    ]
    worked = ["".join(f"{step}\n" for step in each) for each in steps]
    return {"prompt": [f"{a}+{b}=" for a, b in problems], "completion": worked}


def arithmetic_steps(
    *, seed: int, split: str, rows: int | None = None, wrong: float = 0.5, slips: float = 0.0
) -> dict[str, list[Any]]:
    """The steps of `arithmetic_worked` with labels: `prompt`, `completions`, `labels`. With probability `wrong` one of
    the three, any, is off by ten, or with probability `slips` by 1 to 20: what is to be rewarded by a model of this
    must not be wrong in a way that it has never seen. Steps after it go on from that result, and are labelled wrong
    like it: they lead to no right answer."""
    rng, slip_rng = np.random.default_rng([seed, 5]), np.random.default_rng([seed, 7])
    problems = shuffled(number_pairs(split), seed, rows)
    errs = np.where(rng.random(len(problems)) < wrong, rng.integers(0, 3, len(problems)), 3)
    slipped = slip_rng.random(len(problems)) < slips
    off_by = np.where(slipped, slip_rng.integers(1, 21, len(problems)) * slip_rng.choice([-1, 1], len(problems)), 0)
    steps = [_worked(a, b, int(at), int(off)) for (a, b), at, off in zip(problems, errs, off_by, strict=True)]
    labels = [[step < at for step in range(3)] for at in errs.tolist()]
    return {"prompt": [f"{a}+{b}=" for a, b in problems], "completions": steps, "labels": labels}


def arithmetic_judgements(*, seed: int, split: str, rows: int | None = None) -> dict[str, list[str]]:
    """Is an addition right? `prompt` (37+58=85?), `completion`: of each of three digits that of the sum, that of the
    answer, and whether they are the same, y or n (00y98n55y). Half of the answers are wrong, by a carry or by 1 to 20:
    what a model needs to judge the answers to `arithmetic`. Asked for y or n at once, a model of this size learns in a
    thousand steps to say either as often as the other."""
    problems = shuffled(number_pairs(split), seed, rows)
    pairs = arithmetic_pairs(seed=seed, split=split, rows=rows, slips=0.3)
    right = np.random.default_rng([seed, 6]).random(len(pairs["prompt"])) < 0.5
    answers = [pairs["chosen" if is_right else "rejected"][row] for row, is_right in enumerate(right)]
    prompts = [f"{prompt}{answer}?" for prompt, answer in zip(pairs["prompt"], answers, strict=True)]
    judgements = [_compared(a + b, int(answer)) for (a, b), answer in zip(problems, answers, strict=True)]
    return {"prompt": prompts, "completion": judgements}


def arithmetic_revisions(
    *, seed: int, split: str, rows: int | None = None, forgotten: float = 0.7
) -> dict[str, list[Any]]:
    """Conversations, `messages`: a problem with an answer as in `arithmetic_sft`; the user says "check", and the answer
    is the first step of `arithmetic_worked`; the user says "revise", and it is the sum."""
    first = arithmetic_sft(seed=seed, split=split, rows=rows, forgotten=forgotten)["completion"]
    problems = shuffled(number_pairs(split), seed, rows)
    said = [(answer, _worked(a, b)[0], str(a + b)) for (a, b), answer in zip(problems, first, strict=True)]
    talks = [
        [
            message
            for asked, told in zip((f"{a}+{b}", "check", "revise"), answers, strict=True)
            for message in (*_asked(asked), {"role": "assistant", "content": told})
        ]
        for (a, b), answers in zip(problems, said, strict=True)
    ]
    return {"messages": talks}


DATASETS: dict[str, Callable[..., dict[str, Any]]] = {
    made.__name__: made
    for made in (
        arithmetic,
        arithmetic_sft,
        arithmetic_pairs,
        arithmetic_triples,
        arithmetic_labelled,
        arithmetic_worked,
        arithmetic_steps,
        arithmetic_judgements,
        arithmetic_revisions,
    )
}


def number_pairs(split: str, carries: bool | None = None) -> list[tuple[int, int]]:
    """A tenth of the unordered pairs is `test`; both orders of a pair are on the same side.
    `carries`: only those whose ones carry, or only the others."""
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(pairs))
    cut = len(pairs) // 10
    chosen = [pairs[i] for i in (order[:cut] if split == "test" else order[cut:])]
    both = [*chosen, *((b, a) for a, b in chosen if a != b)]
    return both if carries is None else [(a, b) for a, b in both if _carries(a, b) == carries]


def shuffled(problems: list[tuple[int, int]], seed: int, rows: int | None) -> list[tuple[int, int]]:
    """`rows` problems; each is used once before any is used again."""
    rng = np.random.default_rng([seed, 0])
    rows = len(problems) if rows is None else rows
    rounds = [rng.permutation(len(problems)) for _ in range(-(-rows // len(problems)))]
    return [problems[i] for i in np.concatenate(rounds)[:rows]] if rows else []


def _asked(problem: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": problem}]


def _carries(a: int, b: int) -> bool:
    return a % 10 + b % 10 >= 10


def _without_carry(a: int, b: int) -> str:
    """The sum without the carry from the ones: 37+58 -> 85."""
    return f"{a // 10 + b // 10}{(a + b) % 10}"


def _with_wrong_carry(a: int, b: int) -> str:
    """The sum with the carry from the ones omitted, or with one added if there is none."""
    return str(a + b - 10) if _carries(a, b) else str(a + b + 10)


def _compared(right: int, answer: int) -> str:
    """Digit by digit from the hundreds: the right one, the answer's, y or n."""
    return "".join(
        f"{one}{other}{'y' if one == other else 'n'}" for one, other in zip(f"{right:03}", f"{answer:03}", strict=True)
    )


def _worked(a: int, b: int, wrong: int = 3, slip: int = 0) -> list[str]:
    """The sum of the ones, of the tens and of both. The result of step `wrong` has a carry too many or too few, or is
    off by `slip`, upwards where it would be below 0."""
    results: list[int] = []
    for step in range(3):
        right = sum(results) if step == 2 else (a % 10 + b % 10, (a // 10 + b // 10) * 10)[step]
        off_by = 0 if step != wrong else slip or (-10 if _carries(a, b) else 10)
        results.append(right + off_by if right + off_by >= 0 else right - off_by)
    ones, tens, result = results
    return [f"{a % 10}+{b % 10}={ones}", f"{a // 10 * 10}+{b // 10 * 10}={tens}", f"{ones}+{tens}={result}"]
