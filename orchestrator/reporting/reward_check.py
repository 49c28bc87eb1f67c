"""`troupe check-reward`: one reward, called with a few rows as a run would call it, and what is wrong with its answer.

rows, of a file or examples ─► the caller of a reward worker ─► rewards, or the failure and what was returned
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.text import Text

from actors.batch import Array
from actors.errors import ConfigError, DataError, RunError
from orchestrator.config.schema import ClusterConfig, DataConfig, RewardConfig, RunConfig
from orchestrator.reporting.terminal_tables import Rows
from rewards.attempts import CallStatistics
from rewards.caller import RewardCaller
from rewards.calls import Log, Samples, TrainerState
from rewards.judge import JudgeCaller, JudgeSpec
from rewards.reward import OnFailure, Reward
from rewards.specs import AnySpec, check_columns, check_reward

EXAMPLES: tuple[dict[str, Any], ...] = (  # right, wrong, empty, and with what is no ASCII
    {"prompt": "12+34=", "completion": "46", "answer": "46", "solution": "$46$"},
    {"prompt": "7+8=", "completion": "16", "answer": "15", "solution": "$15$"},
    {"prompt": "1+1=", "completion": "", "answer": "2", "solution": "$2$"},
    {"prompt": "5+5=", "completion": "<think>zehn — 十</think>10", "answer": "10", "solution": "$10$"},
)
JUDGE = "judge"  # in place of a reward's name: its keys say which
SHOWN = 60  # characters of a text in the table
SHOWN_ANSWER = 300  # characters of an answer that is none
FOLLOWS: dict[str, str] = {  # on_failure
    "retry": "in a run: tried on another worker if the machinery failed; then as roles.reward.on_failure says",
    "drop": "in a run, on_failure=drop: the prompt group would be dropped, and counted",
    "fail": "in a run, on_failure=fail: the run would end",
}


@dataclass(frozen=True)
class Outcome:
    """`values` [n], NaN for None; None if the reward gave none, which `failure` says why. `returned`: what came
    back, of each attempt. `hangs`: a function that cannot be stopped still runs in this process."""

    values: Array | None
    failure: str | None
    returned: Sequence[Any]
    log: Log | None
    statistics: CallStatistics | None
    hangs: bool


def settings_of(reward: str, overrides: Sequence[str]) -> tuple[RewardConfig, RunConfig]:
    """The reward that a command line names; overrides are keys of it. Raises ConfigError."""
    from orchestrator.config.loading import config_of

    kind = "actor" if reward.startswith("ray://") else "url" if "://" in reward else "fn"
    given: dict[str, Any] = {"judge": {}} if reward == JUDGE else {kind: reward}
    tree = {"phases": {"check": {}}, "rewards": [given]}
    config = config_of(tree, [f"rewards.0.{override}" for override in overrides], "troupe check-reward")
    return config.rewards[0], config


def rows_of(path: str | None, split: str, count: int, completions: str) -> list[dict[str, Any]]:
    """Rows with `prompt` and `completion`, of a data set or of `EXAMPLES`. `completions`: the column that holds what
    the reward is to score."""
    from orchestrator.data import mixtures
    from orchestrator.data.report import BadRows

    if path is None:
        return [dict(row) for row in EXAMPLES[:count]]
    bad = BadRows(0)
    rows = mixtures.load(DataConfig(path=path, split=split), 0, bad)
    bad.check()
    missing = [name for name in ("prompt", completions) if name not in rows.columns]
    if missing:
        raise DataError(
            f"{rows.name} has no column {missing[0]!r}, but {', '.join(rows.columns)}; a prompt is in `prompt`, and "
            "--completions NAME says which column to score, for example one with right answers"
        )
    found = [row for _, row in islice(chain.from_iterable(rows.chunks(rows.columns)), count)]
    return [{**row, "completion": row[completions]} for row in found]


def examine(spec: AnySpec, rows: Sequence[Mapping[str, Any]], where: str, ids: Callable[[str], list[int]]) -> Outcome:
    """Call the reward with the rows. Raises ConfigError if it needs a column that they lack; `where`: what to call
    them."""
    check_columns([spec], set(rows[0]) - {"prompt", "completion"}, where)
    texts = [_text(row["completion"]) for row in rows]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "completion")}
    samples = Samples([row["prompt"] for row in rows], texts, list(map(ids, texts)), columns, TrainerState(0))
    return asyncio.run(_asked(spec, samples) if isinstance(spec, JudgeSpec) else _called(spec.load(), samples))


async def _asked(spec: JudgeSpec, samples: Samples) -> Outcome:
    """As `_called`. What a judge said is what it logged."""
    caller = JudgeCaller(replace(spec, handling=replace(spec.handling, on_failure="retry")))
    try:
        scored = await caller.score(samples)
        return Outcome(scored.values, None, (), scored.log, scored.statistics, False)
    except RunError as error:
        return Outcome(None, str(error), (), None, None, False)
    finally:
        await asyncio.to_thread(caller.close)


async def _called(reward: Reward, samples: Samples) -> Outcome:
    """Not as `on_failure` says: a constant would hide what is wrong."""
    recorded = _Recorded(reward.call, len(samples))
    handling = replace(reward.handling, on_failure="retry")
    watched = replace(reward, call=recorded.awaited if reward.is_async else recorded.called, handling=handling)
    caller = RewardCaller(watched, ThreadPoolExecutor(1))
    try:
        scored = await caller.score(samples)
        return Outcome(scored.values, None, recorded.answers, scored.log, scored.statistics, False)
    except RunError as error:
        return Outcome(None, str(error), recorded.answers, None, None, caller.hanging > 0)
    finally:
        await asyncio.to_thread(reward.close)


class _Recorded:
    """A reward's call that keeps what it returned last."""

    def __init__(self, call: Callable[..., Any], count: int) -> None:
        self._call, self._count = call, count
        self.answers: list[Any] = []

    def called(self, **arguments: Any) -> Any:
        return self._kept(self._call(**arguments))

    async def awaited(self, **arguments: Any) -> Any:
        return self._kept(await self._call(**arguments))

    def _kept(self, answer: Any) -> Any:
        if isinstance(answer, Iterator):  # which can be read once, and need not end
            answer = list(islice(answer, self._count + 1))
        self.answers.append(answer)
        return answer


@dataclass(frozen=True)
class Check:
    """How a reward's call went. `asked`: in words; `limit_s`: the call's deadline."""

    asked: str
    rows: Sequence[Mapping[str, Any]]
    outcome: Outcome
    on_failure: OnFailure
    limit_s: float

    def lines(self) -> list[RenderableType]:
        """For people."""
        lines: list[RenderableType] = [Text(self.asked, style="bold")]
        if self.outcome.values is None:
            return [*lines, *_about_failure(self.outcome, self.on_failure)]
        return [*lines, _table(self.rows, self.outcome.values), *_about_answer(self.outcome, self.limit_s)]

    def as_data(self) -> dict[str, Any]:
        """For programs. `rows`: with `reward`, null for no opinion, and what was logged for each; none after a
        failure."""
        outcome = self.outcome
        texts = [{"prompt": _text(row["prompt"]), "completion": _text(row["completion"])} for row in self.rows]
        head: dict[str, Any] = {"asked": self.asked, "deadline_s": self.limit_s}
        if outcome.values is None:
            returned = _short(repr(outcome.returned[-1]), SHOWN_ANSWER) if outcome.returned else None
            follows = _follows(self.on_failure)
            return {**head, "rows": [], "failure": outcome.failure, "returned": returned, "follows": follows}
        assert outcome.statistics is not None and outcome.log is not None
        rows: list[dict[str, Any]] = []
        for index, (text, value) in enumerate(zip(texts, outcome.values, strict=True)):
            logged = {name: column[index] for name, column in outcome.log.extra.items()}
            rows.append({**text, "reward": None if np.isnan(value) else float(value), "logged": logged})
        metrics = {name: value if np.isfinite(value) else None for name, value in outcome.log.metrics.items()}
        warnings = _warnings(outcome, outcome.values, self.limit_s)
        told = {"seconds": outcome.statistics.seconds, "metrics": metrics, "warnings": warnings}
        return {**head, "rows": rows, "failure": None, **told}


def check_call(
    reward: str,
    overrides: Sequence[str],
    *,
    data: str | None,
    split: str,
    rows: int,
    completions: str,
    model: str | None,
    address: str | None,
) -> Check:
    """Call a reward. Raises ConfigError or DataError for what is no call."""
    settings, config = settings_of(reward, overrides)
    given = rows_of(data, split, rows, completions)
    if not given:
        raise DataError(f"{data} has no rows in the split {split}")
    spec = check_reward(settings)
    if settings.actor is not None:
        _connect(address)
    limit_s = settings.timeout_s or config.roles.reward.timeout_s
    spec = replace(spec, handling=replace(spec.handling, timeout_s=limit_s))
    outcome = examine(spec, given, data or "the example data", _tokens_of(model))
    asked = f"{spec.label}: {len(given)} completions, {'examples' if data is None else data}"
    return Check(asked, given, outcome, settings.on_failure, limit_s)


def _table(rows: Sequence[Mapping[str, Any]], values: Array) -> Rows:
    table = Rows("prompt", "completion", "reward", prose=("prompt", "completion"), numbers=("reward",))
    for row, value in zip(rows, values, strict=True):
        said = "no opinion" if np.isnan(value) else f"{value:g}"
        table.add(_short(_text(row["prompt"]), SHOWN), _short(_text(row["completion"]), SHOWN), said)
    return table


def _about_answer(outcome: Outcome, limit_s: float) -> list[Text]:
    assert outcome.statistics is not None and outcome.log is not None and outcome.values is not None
    lines = [Text(f"{outcome.statistics.seconds:.3f} s; the deadline is {limit_s:g} s")]
    lines += [Text(f"! {text}", style="yellow") for text in _warnings(outcome, outcome.values, limit_s)]
    logged = [*(f"{name} {value:g}" for name, value in outcome.log.metrics.items()), *outcome.log.extra]
    if logged:
        lines.append(Text(f"logged: {', '.join(logged)}"))
    return lines


def _warnings(outcome: Outcome, values: Array, limit_s: float) -> list[str]:
    assert outcome.statistics is not None
    found: list[str] = []
    failed = ", ".join(f"{count} {kind}" for kind, count in outcome.statistics.failures.items())
    if failed:
        found.append(f"attempts failed before this one: {failed}")
    if outcome.statistics.seconds > limit_s / 2:
        found.append("it took more than half of its deadline; raise timeout_s, or score fewer samples")
    opinions = values[~np.isnan(values)]
    if not len(opinions):
        found.append("no opinion on any of them: a group of samples like these is dropped")
    elif len(values) > 1 and np.ptp(opinions) == 0:
        found.append("all rewards are the same: from a group of samples like these nothing is learned")
    return found


def _about_failure(outcome: Outcome, on_failure: OnFailure) -> list[Text]:
    lines = [Text.assemble(("no rewards: ", "bold red"), str(outcome.failure))]
    if outcome.returned:
        lines.append(Text(f"returned: {_short(repr(outcome.returned[-1]), SHOWN_ANSWER)}"))
    return [*lines, Text(_follows(on_failure))]


def _follows(on_failure: OnFailure) -> str:
    constant = f"in a run: each reward of the prompt group would be {on_failure}, as on_failure says"
    return FOLLOWS.get(str(on_failure), constant)


def _text(content: Any) -> str:
    """Of a conversation, that of its last message."""
    return content if isinstance(content, str) else str(content[-1]["content"])


def _short(text: str, limit: int) -> str:
    text = text.replace("\n", "⏎")
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _tokens_of(model: str | None) -> Callable[[str], list[int]]:
    """`completion_ids`: bytes, where no tokenizer is named."""
    if model is None:
        return lambda text: list(text.encode(errors="replace"))
    from orchestrator.planning.resolve import load_tokenizer, resolve_model

    tokenizer = load_tokenizer(resolve_model(model, seed=0), None, False)
    return lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _connect(address: str | None) -> None:
    """To the Ray that the actor is in. Raises ConfigError or PlacementError."""
    import logging

    import ray

    from actors.worker import NAMESPACE
    from orchestrator.cluster.ray_address import LOCAL, chosen_address, refuse_unreachable, set_by

    cluster = ClusterConfig(address=address)
    found = chosen_address(cluster)
    if found == LOCAL:
        raise ConfigError("an actor is in a running Ray: say which by --address HOST:PORT, or set RAY_ADDRESS")
    refuse_unreachable(found, "--address" if address else set_by(cluster))
    ray.init(address=found, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
