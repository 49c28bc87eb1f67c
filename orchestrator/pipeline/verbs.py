"""One function per verb, which returns a stage. Methods are written with these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from actors.columns import SPLIT, STEP_REWARDS, Head
from actors.errors import ConfigError
from orchestrator.pipeline.stage import DRIVER, Stage, Verb


def generate(
    role: str = "rollout", *, n: int = 1, mixture: float | Sequence[float] | None = None, turns: bool = False
) -> Stage:
    """Sample `n` completions of each prompt. Several such stages add their samples to the same group; `sampler` says
    which stage a row is of, from 0. `mixture`: sample every token from the geometric mixture of the engine's own model
    and its second one, of which that is the share; or one share per epoch of the data, the last for all later ones.
    `turns`: samples must be episodes each turn of which is a row of its own, and say which episode a row is of."""
    shares = (mixture,) if isinstance(mixture, float | int) else tuple(mixture or ())
    writes = {"tokens", "mask", "sample_logps", "version", "group", "truncated", "sampler", "sample"}
    writes |= {"completion_tokens"}
    writes |= SPLIT if turns else frozenset()
    options = {"n": n, **({"mixture": shares} if shares else {})}
    return Stage(Verb.GENERATE, role, frozenset(), frozenset(writes), options=options)


def take() -> Stage:
    """The data's own completion of each prompt becomes a row of its group, as if it had been sampled. What nobody knows
    of it, its log-probability under a sampler, is NaN, and its version is -1."""
    return Stage(Verb.TAKE, DRIVER, frozenset(), generate().writes, options={"n": 1})


def one_of(share: float, first: Stage, other: Stage) -> tuple[Stage, Stage]:
    """The one stage for a share of the prompt groups, and the other one for the rest. Which group is which is a
    function of seed and position, so it is the same after a resume and for a group that is drawn again."""
    return replace(first, share=(0.0, share)), replace(other, share=(share, 1.0))


def score(role: str = "reward", *, parts: bool = False, win_rates: bool = False, steps: bool = False) -> Stage:
    """Reward each completion, by all rewards of the run. `parts`: write each of the rewards and its weight, too;
    `win_rates`: and what a pairwise judge prefers, where it is the only one of them; `steps`: and what a process reward
    model says of each step, which the run must then have."""
    writes = {"reward", *(("reward_parts", "reward_weights") if parts else ()), *(("win_rate",) if win_rates else ())}
    writes |= STEP_REWARDS if steps else frozenset()
    return Stage(Verb.SCORE, role, frozenset({"tokens", "mask"}), frozenset(writes))


def keep(predicate: Callable[..., bool], **options: Any) -> Stage:
    """Keep a prompt group only if `predicate(rewards [G], **options)`; others are replaced by new prompts."""
    return Stage(Verb.KEEP, DRIVER, frozenset({"reward"}), frozenset(), predicate, options)


def regroup(call: Callable[..., Any], *, rows: int | None = None, **options: Any) -> Stage:
    """Make other rows of a prompt group's: `call(table, **options)` returns the new table, or None to have the group
    replaced by another prompt's. `rows`: how many there are then, if that is known. `call.reads` and `call.writes` name
    its columns."""
    reads = getattr(call, "reads", frozenset({"reward", "group"}))
    writes = getattr(call, "writes", frozenset[str]())
    return Stage(Verb.REGROUP, DRIVER, frozenset(reads), frozenset(writes), call, {"rows": rows, "call": options})


def replay(*, size: int, max_age: int, scale: str) -> Stage:
    """Put earlier prompt groups in the places of those that teach nothing, all of whose samples have one reward. Of the
    groups that were trained on, the `size` best are kept, each for `max_age` steps at most. `scale`: of the advantages
    by which they are compared (`advantages.zscore_by_group`). A replayed group is as it was sampled: its importance
    ratio is to the sampler of its own version."""
    rows = generate().writes | {"reward"}
    options = {"size": size, "max_age": max_age, "scale": scale}
    return Stage(Verb.REPLAY, DRIVER, frozenset({"reward", "group"}), rows, options=options)


def infer(
    role: str, *, into: str, head: Head = Head.VOCABULARY, adapters: bool = True, precomputed: bool | None = False
) -> Stage:
    """What a role's model says of each token or row, written to the column `into`: log-probabilities, values, scores.
    `precomputed`: of the whole data set, once before the first step; None: if the phase passes over its data more than
    once."""
    options = {"into": (into,), "head": head, "adapters": adapters, "precomputed": precomputed}
    return Stage(Verb.INFER, role, frozenset({"tokens"}), frozenset({into}), options=options)


def only_where(column: str, value: int, stage: Stage) -> Stage:
    """The `infer` stage of a column per token, for those rows alone that have this value in a column per row. What it
    writes, other stages write for the other rows; each row must get it from one of them."""
    return replace(stage, reads=stage.reads | {column}, only=(column, value))


def infer_top_k(
    role: str, *, into: tuple[str, ...], k: int, temperature: float | None = 1.0, beside: bool = False
) -> Stage:
    """The `k` tokens that a role's model finds most likely at each position, at a temperature (None: that at which the
    phase takes log-probabilities), written to three columns: their ids [T, k], their log-probabilities [T, k], and the
    log-probability of all other tokens [T, 1]. A fourth column takes the log-probability of the row's own token [T].
    `beside`: each token's values are added to those that an earlier stage wrote to these columns."""
    options = {"into": into, "head": Head.VOCABULARY, "adapters": True, "top_k": k, "temperature": temperature}
    options |= {"beside": True} if beside else {}
    return Stage(Verb.INFER, role, frozenset({"tokens"}), frozenset(into), options=options)


def behind_teacher_prompts(stage: Stage, *, demonstrated: bool = False) -> Stage:
    """The `infer` stage of columns per token, for the same completions behind other prompts: each row's column
    `teacher_prompt`, with `demonstrated` together with the completion of another row. The columns are written to the
    tokens of the completions, as if these stood behind their own prompts."""
    names = {"teacher_prompt", "teacher_row_tokens", "completion_tokens"}
    names |= {"demonstration", "truncated"} if demonstrated else set()
    return replace(stage, reads=stage.reads | names, options={**stage.options, "other_prompts": True})


def retokenised(stage: Stage) -> Stage:
    """`behind_teacher_prompts`, of a role whose model has another tokenizer: prompts and completions are in its tokens.
    The columns are known, and not NaN, where one of our tokens begins at the same character as one of its."""
    stage = behind_teacher_prompts(stage)
    return replace(stage, options={**stage.options, "retokenised": True})


def credit(call: Callable[..., Any], **options: Any) -> Stage:
    """Turn rewards into advantages, by what `orchestrator/credit/advantages.py` calls a credit call. `call.reads` and
    `call.writes` name its columns: one that reads columns per token runs where the tokens are, on the ranks of the
    first trained role, any other in the driver. It writes columns per token or columns per row, not both."""
    reads = getattr(call, "reads", frozenset({"reward", "group"}))
    writes = getattr(call, "writes", frozenset({"advantages"}))
    return Stage(Verb.CREDIT, DRIVER, frozenset(reads), frozenset(writes), call, options)


def update(
    role: str,
    loss: Callable[..., Any],
    *,
    reduce: Callable[..., Any] | None = None,
    companion: str | None = None,
    epochs: int = 1,
    minibatches: int = 1,
    **options: Any,
) -> Stage:
    """Optimise a role. What the loss reads is declared beside it (see `orchestrator/losses/declare.py`). A `Sum` of
    losses has reductions and options of its own. `companion`: the role whose frozen model lives in the ranks of this
    one, for a loss that compares whole distributions."""
    from orchestrator.losses.declare import columns_of, has_companion, head_of  # torch is loaded when a method is built

    if has_companion(loss) != (companion is not None):
        needs = "compares with a companion: update(role, loss, companion=ROLE)" if companion is None else "has none"
        raise ConfigError(f"stage {role}.update names {companion or 'no companion'}, and its loss {needs}")
    plan = {"reduce": reduce, "epochs": epochs, "minibatches": minibatches, "loss_options": options}
    plan |= {"head": head_of(loss), "companion": companion}
    return Stage(Verb.UPDATE, role, frozenset(columns_of(loss, options)), frozenset(), loss, plan)


def write(call: Callable[..., Any], **options: Any) -> Stage:
    """Add the batch to the data set that the phase makes: `call(answered, **options)` returns the records of one
    prompt's rows (`batches/records.py`). `call.reads` names the columns that it reads, `call.columns` those of
    the data set that it fills."""
    reads = frozenset({"tokens", "mask", "group"}) | getattr(call, "reads", frozenset[str]())
    return Stage(Verb.WRITE, DRIVER, reads, frozenset(), call, options)


def mix(role: str, source: str, *, share: float, every: int) -> Stage:
    """Move the weights of a role that is not trained towards those of one that is: after every `every`-th step,
    `share` of the source and the rest of its own."""
    options = {"source": source, "share": share, "every": every}
    return Stage(Verb.MIX, role, frozenset(), frozenset(), options=options)


def when(condition: Any, *stages: Stage) -> tuple[Stage, ...]:
    """The stages if the condition holds, else none: `*when(beta, infer("reference", into="ref_logps"))`."""
    return stages if condition else ()
