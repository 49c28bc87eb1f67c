"""A method is a pipeline: the kind of data it takes, then stages, each one verb by one role.

The roles to launch, the columns that flow and the part that may run ahead are all derived from the stages; a pipeline
that does not close (a column is read that no stage writes) is refused before anything is launched. Pure: neither Ray
nor torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from actors.columns import COLUMNS, Axis, Head
from actors.errors import ConfigError

DRIVER = "driver"  # the role of stages that run in the driver itself


class Verb(StrEnum):
    GENERATE = "generate"
    TAKE = "take"
    SCORE = "score"
    KEEP = "keep"
    REGROUP = "regroup"
    INFER = "infer"
    CREDIT = "credit"
    UPDATE = "update"
    MIX = "mix"


ROW_SOURCES = frozenset({Verb.GENERATE, Verb.TAKE})  # they bring rows into a prompt group
GROUPWISE = ROW_SOURCES | {Verb.SCORE, Verb.KEEP, Verb.REGROUP}  # they run for each prompt group separately


@dataclass(frozen=True)
class DataKind:
    """What a row of the data source supplies. `columns`: those that its batch has from the start. Which columns of a
    data set can be read as which kind is decided by `orchestrator/data/formats.py`."""

    name: str
    columns: frozenset[str]
    rows_per_item: int = 1
    prompts_only: bool = False
    answered: bool = False  # prompts, each with a completion that a `take` stage makes a row of the group
    uncut: bool = False  # a row is judged as a whole: an item with one that is too long is left out, not cut


def items_of(kind: DataKind) -> str:
    """What the items of a data set are called in messages."""
    return kind.name if kind.name in ("prompts", "pairs") else "examples"


_ROWS = frozenset({"tokens", "mask", "group"})

Completions = DataKind("completions", _ROWS)
Prompts = DataKind("prompts", frozenset(), prompts_only=True)
AnsweredPrompts = DataKind("answered_prompts", frozenset(), answered=True, uncut=True)
Pairs = DataKind("pairs", _ROWS | {"preferred"}, rows_per_item=2)
UncutPairs = replace(Pairs, uncut=True)
PairsWithMargin = DataKind("pairs_with_margin", Pairs.columns | {"margin"}, rows_per_item=2, uncut=True)
Triples = DataKind("triples", _ROWS | {"preferred", "gold"}, rows_per_item=3)
Labelled = DataKind("labelled", _ROWS | {"label"})
WeightedLabelled = DataKind("weighted_labelled", Labelled.columns | {"weight"})  # by density ratio
MismatchedLabelled = DataKind(  # each row with a second one: its prompt with another row's completion
    "mismatched_labelled", Labelled.columns | {"mismatched"}, rows_per_item=2
)
StepLabels = DataKind("step_labels", _ROWS | {"step_label"})


@dataclass(frozen=True)
class Stage:
    """One verb by one role. `call` is what is executed, with `options` as its keyword arguments. `share`: the part of
    [0, 1) for whose prompt groups the stage runs; where a group stands in it, its seed and position decide."""

    verb: Verb
    role: str
    reads: frozenset[str]
    writes: frozenset[str]
    call: Callable[..., Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    share: tuple[float, float] = (0.0, 1.0)

    def covers(self, place: float) -> bool:
        """Whether the stage runs for a prompt group that stands there."""
        return self.share[0] <= place < self.share[1]

    @property
    def name(self) -> str:
        return f"{self.role}.{self.verb}"

    @property
    def head(self) -> Head | None:
        """What the stage asks of its role's model; None if it asks nothing."""
        return self.options.get("head")

    @property
    def reads_tokens(self) -> bool:
        """It looks at values per token, which the driver does not have."""
        return any(COLUMNS[name].axis is Axis.TOKEN for name in self.reads)

    @property
    def top_k(self) -> int | None:
        """How many of its most likely tokens a model says at each position; None if the stage does not ask that."""
        return self.options.get("top_k")

    @property
    def precomputed(self) -> bool:
        """It runs over the whole data set before the first step, once."""
        return bool(self.options.get("precomputed"))


@dataclass(frozen=True)
class Pipeline:
    """A data kind and its stages, checked when it is built. `warnings`: what the user may not expect of the options.
    `temperature`: at which log-probabilities are taken; None for the one that completions are sampled at."""

    data: DataKind
    stages: tuple[Stage, ...]
    warnings: tuple[str, ...] = field(default=(), compare=False)
    temperature: float | None = None

    def __init__(
        self, data: DataKind, *stages: Stage, warnings: tuple[str, ...] = (), temperature: float | None = None
    ) -> None:
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "stages", stages)
        object.__setattr__(self, "warnings", warnings)
        object.__setattr__(self, "temperature", temperature)
        _check_closes(self)
        _check_precomputed(self)

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles to launch, in order of appearance; the trained ones first."""
        seen = dict.fromkeys([*self.trained, *(stage.role for stage in self.stages if stage.role != DRIVER)])
        return tuple(seen)

    @property
    def trained(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(stage.role for stage in self.stages if stage.verb is Verb.UPDATE))

    @property
    def mixed(self) -> tuple[str, ...]:
        """Roles that are not trained and whose weights change all the same, by those of a trained one."""
        return tuple(dict.fromkeys(stage.role for stage in self.mixes))

    @property
    def collect(self) -> tuple[Stage, ...]:
        """The longest prefix of stages that touches no role whose weights change: it may run ahead of learning."""
        changing = {*self.trained, *self.mixed}
        count = 0
        for stage in self.stages:
            if stage.role in changing or stage.verb is Verb.CREDIT:
                break
            count += 1
        return self.stages[:count]

    @property
    def learn(self) -> tuple[Stage, ...]:
        return self.stages[len(self.collect) :]

    @property
    def group_stages(self) -> tuple[Stage, ...]:
        """The stages of `collect` that run for each prompt group separately."""
        return tuple(stage for stage in self.collect if stage.verb in GROUPWISE)

    @property
    def batch_stages(self) -> tuple[Stage, ...]:
        """Of `collect`: what runs on whole batches, so that its arithmetic does not depend on arrival order."""
        return tuple(stage for stage in self.collect if stage.verb not in GROUPWISE and not stage.precomputed)

    @property
    def precomputed(self) -> tuple[Stage, ...]:
        """What runs once, before the first step (`orchestrator/collection/precompute.py`), and in no step."""
        return tuple(stage for stage in self.stages if stage.precomputed)

    def without_stage(self, stage: Stage) -> Pipeline:
        """The pipeline for data that brings what this stage writes."""
        data = replace(self.data, columns=self.data.columns | stage.writes)
        others = (other for other in self.stages if other is not stage)
        return Pipeline(data, *others, warnings=self.warnings, temperature=self.temperature)

    def with_roles(self, names: Mapping[str, str]) -> Pipeline:
        """The pipeline with other roles in the places of those that are named. Raises ConfigError for one that no stage
        names."""
        if unknown := names.keys() - {*self.roles, *self.companions.values()}:
            known = ", ".join(dict.fromkeys((*self.roles, *self.companions.values())))
            raise ConfigError(f"rename_roles: the method has no role {sorted(unknown)[0]!r}; it has {known}")

        def renamed(stage: Stage) -> Stage:
            options = {
                key: names.get(value, value) if key in ("source", "companion") else value
                for key, value in stage.options.items()
            }
            return replace(stage, role=names.get(stage.role, stage.role), options=options)

        stages = map(renamed, self.stages)
        return Pipeline(self.data, *stages, warnings=self.warnings, temperature=self.temperature)

    @property
    def generates(self) -> tuple[Stage, ...]:
        return tuple(stage for stage in self.stages if stage.verb is Verb.GENERATE)

    @property
    def row_sources(self) -> tuple[Stage, ...]:
        """The stages that bring rows into a prompt group."""
        return tuple(stage for stage in self.stages if stage.verb in ROW_SOURCES)

    @property
    def samples_per_prompt(self) -> int:
        """Completions that are drawn for a prompt, at most, by all `generate` stages together; 0 if there are none."""
        return max(_rows_by_share(self.generates))

    @property
    def rows_per_item(self) -> int:
        """Rows that reach the updates from each item of the data, at most."""
        rows = max(_rows_by_share(self.row_sources)) or self.data.rows_per_item
        for stage in self.stages:
            rows = int(stage.options["rows"] or rows) if stage.verb is Verb.REGROUP else rows
        return rows

    @property
    def heads(self) -> Mapping[str, Head]:
        """What each role's model must have as its last layer; roles without a model are left out."""
        return {stage.role: stage.head for stage in self.stages if stage.head is not None}

    @property
    def companions(self) -> Mapping[str, str]:
        """Of trained roles, the one whose frozen model lives in their ranks. It is no role to launch by itself."""
        named = ((stage.role, stage.options["companion"]) for stage in self.updates)
        return {role: companion for role, companion in named if companion is not None}

    @property
    def teachers(self) -> tuple[str, ...]:
        """Roles whose distributions over the vocabulary a loss compares with those of a trained role."""
        asked = (stage.role for stage in self.stages if stage.top_k is not None)
        return tuple(dict.fromkeys([*self.companions.values(), *asked]))

    @property
    def held_out(self) -> DataKind | None:
        """The kind of rows whose loss can be taken without sampling: those that the phase learns from; or completions,
        where no stage needs more of samples than a data set has. None if there is no such kind."""
        if not self.row_sources:
            return self.data
        others = (stage for stage in self.stages if stage.verb not in GROUPWISE)
        try:
            return Pipeline(Completions, *others).data
        except ConfigError:
            return None

    @property
    def updates(self) -> tuple[Stage, ...]:
        return tuple(stage for stage in self.stages if stage.verb is Verb.UPDATE)

    @property
    def optimizer_steps_per_batch(self) -> int:
        """Of the role that makes the most."""
        return max((self.optimizer_steps_of(role) for role in self.trained), default=1)

    def optimizer_steps_of(self, role: str) -> int:
        """Optimizer steps of a role on each batch."""
        mine = (stage for stage in self.updates if stage.role == role)
        return sum(int(stage.options["epochs"] * stage.options["minibatches"]) for stage in mine)

    @property
    def mixes(self) -> tuple[Stage, ...]:
        return tuple(stage for stage in self.stages if stage.verb is Verb.MIX)


def generate(role: str = "rollout", *, n: int = 1) -> Stage:
    """Sample `n` completions of each prompt. Several such stages add their samples to the same group; `sampler` says
    which stage a row is of, from 0."""
    writes = {"tokens", "mask", "sample_logps", "version", "group", "truncated", "sampler", "completion_tokens"}
    return Stage(Verb.GENERATE, role, frozenset(), frozenset(writes), options={"n": n})


def take() -> Stage:
    """The data's own completion of each prompt becomes a row of its group, as if it had been sampled. What nobody knows
    of it, its log-probability under a sampler, is NaN, and its version is -1."""
    return Stage(Verb.TAKE, DRIVER, frozenset(), generate().writes, options={"n": 1})


def one_of(share: float, first: Stage, other: Stage) -> tuple[Stage, Stage]:
    """The one stage for a share of the prompt groups, and the other one for the rest. Which group is which is a
    function of seed and position, so it is the same after a resume and for a group that is drawn again."""
    return replace(first, share=(0.0, share)), replace(other, share=(share, 1.0))


def score(role: str = "reward", *, parts: bool = False) -> Stage:
    """Reward each completion, by all rewards of the run. `parts`: write each of the rewards and its weight, too."""
    writes = {"reward", *(("reward_parts", "reward_weights") if parts else ())}
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


def infer(
    role: str, *, into: str, head: Head = Head.VOCABULARY, adapters: bool = True, precomputed: bool = False
) -> Stage:
    """What a role's model says of each token or row, written to the column `into`: log-probabilities, values, scores.
    `precomputed`: of the whole data set, once before the first step."""
    options = {"into": (into,), "head": head, "adapters": adapters, "precomputed": precomputed}
    return Stage(Verb.INFER, role, frozenset({"tokens"}), frozenset({into}), options=options)


def infer_top_k(role: str, *, into: tuple[str, str, str], k: int, temperature: float = 1.0) -> Stage:
    """The `k` tokens that a role's model finds most likely at each position, at a temperature, written to three
    columns: their ids [T, k], their log-probabilities [T, k], and the log-probability of all other tokens [T]."""
    options = {"into": into, "head": Head.VOCABULARY, "adapters": True, "top_k": k, "temperature": temperature}
    return Stage(Verb.INFER, role, frozenset({"tokens"}), frozenset(into), options=options)


def credit(call: Callable[..., Any], **options: Any) -> Stage:
    """Turn rewards into advantages, by what `orchestrator/advantages.py` calls a credit call. `call.reads` and
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


def mix(role: str, source: str, *, share: float, every: int) -> Stage:
    """Move the weights of a role that is not trained towards those of one that is: after every `every`-th step,
    `share` of the source and the rest of its own."""
    options = {"source": source, "share": share, "every": every}
    return Stage(Verb.MIX, role, frozenset(), frozenset(), options=options)


def when(condition: Any, *stages: Stage) -> tuple[Stage, ...]:
    """The stages if the condition holds, else none: `*when(beta, infer("reference", into="ref_logps"))`."""
    return stages if condition else ()


def in_conflict(one: Stage, other: Stage) -> bool:
    """Whether two stages must keep their order: they share a role, or one writes what the other reads or writes."""
    roles = {one.role, one.options.get("source")} & {other.role, other.options.get("source")} - {None, DRIVER}
    return bool(roles or one.writes & (other.reads | other.writes) or one.reads & other.writes)


def _check_closes(pipeline: Pipeline) -> None:
    written = set(pipeline.data.columns)
    for stage in pipeline.stages:
        unknown = sorted((stage.reads | stage.writes) - set(COLUMNS))
        if unknown:
            raise ConfigError(f"stage {stage.name} names unknown column(s) {', '.join(unknown)}")
        if stage.verb is Verb.CREDIT and stage.reads_tokens and len({COLUMNS[name].axis for name in stage.writes}) > 1:
            raise ConfigError(
                f"stage {stage.name} runs where the tokens are and writes {', '.join(sorted(stage.writes))}, of which "
                "some are per token and some per row; make it two credit calls"
            )
        missing = sorted(stage.reads - written)
        if missing:
            raise ConfigError(
                f"stage {stage.name} reads {', '.join(missing)}, which no earlier stage writes "
                f"(written so far: {', '.join(sorted(written)) or 'nothing'})"
            )
        written |= stage.writes
    _check_row_sources(pipeline)
    for role in pipeline.heads:
        asked = {stage.head for stage in pipeline if stage.role == role and stage.head is not None}
        if len(asked) > 1:
            raise ConfigError(
                f"the stages of role {role} ask for models with different heads ({', '.join(sorted(asked))}); use a "
                "role for each"
            )
    for role in pipeline.trained:
        named = sorted({str(stage.options["companion"]) for stage in pipeline.updates if stage.role == role} - {"None"})
        if len(named) > 1 or set(named) & set(pipeline.trained):
            raise ConfigError(
                f"role {role} has the companions {', '.join(named)}: it may have one, which is not trained in the phase"
            )
    for stage in pipeline.mixes:
        source = stage.options["source"]
        if source not in pipeline.trained or stage.role in pipeline.trained:
            raise ConfigError(
                f"stage {stage.name} moves {stage.role} towards {source}: the one must not be trained and the other "
                f"must be (trained: {', '.join(pipeline.trained) or 'nothing'})"
            )


def _rows_by_share(stages: Sequence[Stage]) -> list[int]:
    """Rows that the stages bring into a prompt group, for each part of [0, 1) in which the same ones of them run."""
    places = sorted({0.0, *(edge for stage in stages for edge in stage.share)} - {1.0})
    return [sum(int(stage.options["n"]) for stage in stages if stage.covers(place)) for place in places]


def _check_row_sources(pipeline: Pipeline) -> None:
    for stage in pipeline.stages:
        if stage.verb is Verb.TAKE and not pipeline.data.answered:
            raise ConfigError(f"stage {stage.name} takes completions, and {pipeline.data.name} bring none apart")
        if stage.share != (0.0, 1.0) and stage.verb not in ROW_SOURCES:
            raise ConfigError(f"stage {stage.name} runs for a share of the prompt groups; only generate and take may")
    if pipeline.row_sources and not all(_rows_by_share(pipeline.row_sources)):
        shares = ", ".join(f"{stage.name} {stage.share[0]:g} to {stage.share[1]:g}" for stage in pipeline.row_sources)
        raise ConfigError(f"some prompt groups get no rows: {shares}; together they must cover 0 to 1")


def _check_precomputed(pipeline: Pipeline) -> None:
    """Values that are computed once must hold for the whole phase: the rows are there, and the weights stay."""
    data = pipeline.data
    for stage in pipeline.precomputed:
        problem = None
        if data.prompts_only or data.answered:
            problem = f"{data.name} have no rows before they are answered"
        elif "mismatched" in data.columns:
            problem = f"mismatched rows are made anew of each batch, and {data.name} needs them"
        elif stage.role in pipeline.trained:
            problem = f"the weights of {stage.role} change in every step"
        elif stage.role in pipeline.mixed:
            problem = f"the weights of {stage.role} follow those of another role"
        if problem:
            raise ConfigError(
                f"options.precompute_ref_log_probs: {problem}, so {stage.name} cannot run beforehand; leave it out"
            )
