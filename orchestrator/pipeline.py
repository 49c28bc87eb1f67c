"""A method is a pipeline: the kind of data it takes, then stages, each one verb by one role.

The roles to launch, the columns that flow and the part that may run ahead are all derived from the stages; a pipeline
that does not close (a column nobody wrote) is refused before anything is launched. Pure: neither Ray nor torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from actors.columns import COLUMNS
from actors.errors import ConfigError

DRIVER = "driver"  # the role of stages that run in the driver itself


class Verb(StrEnum):
    GENERATE = "generate"
    SCORE = "score"
    KEEP = "keep"
    LOGPS = "logps"
    CREDIT = "credit"
    UPDATE = "update"
    MIX = "mix"


@dataclass(frozen=True)
class DataKind:
    """What a row of the data source supplies. `columns`: those that its batch has from the start. Which columns of a
    data set can be read as which kind is decided by `orchestrator/data/formats.py`."""

    name: str
    columns: frozenset[str]
    rows_per_item: int = 1
    prompts_only: bool = False


def items_of(kind: DataKind) -> str:
    """What the items of a data set are called in messages."""
    return kind.name if kind.name in ("prompts", "pairs") else "examples"


_ROWS = frozenset({"tokens", "mask", "group"})

Completions = DataKind("completions", _ROWS)
Prompts = DataKind("prompts", frozenset(), prompts_only=True)
Pairs = DataKind("pairs", _ROWS | {"preferred"}, rows_per_item=2)
Triples = DataKind("triples", _ROWS | {"preferred", "gold"}, rows_per_item=3)
Labelled = DataKind("labelled", _ROWS | {"label"})
WeightedLabelled = DataKind("weighted_labelled", Labelled.columns | {"weight"})  # by density ratio
MismatchedLabelled = DataKind(  # each row with a second one: its prompt with another row's completion
    "mismatched_labelled", Labelled.columns | {"mismatched"}, rows_per_item=2
)
StepLabels = DataKind("step_labels", _ROWS | {"step_label"})


@dataclass(frozen=True)
class Stage:
    """One verb by one role. `call` is what is executed, with `options` as its keyword arguments."""

    verb: Verb
    role: str
    reads: frozenset[str]
    writes: frozenset[str]
    call: Callable[..., Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.role}.{self.verb}"

    @property
    def precomputed(self) -> bool:
        """It runs over the whole data set before the first step, once."""
        return bool(self.options.get("precomputed"))


@dataclass(frozen=True)
class Pipeline:
    """A data kind and its stages, checked when it is built. `warnings`: what the user may not expect of the options."""

    data: DataKind
    stages: tuple[Stage, ...]
    warnings: tuple[str, ...] = field(default=(), compare=False)

    def __init__(self, data: DataKind, *stages: Stage, warnings: tuple[str, ...] = ()) -> None:
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "stages", stages)
        object.__setattr__(self, "warnings", warnings)
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
        """Of `collect`: what each prompt group passes by itself (generate, score, keep)."""
        return tuple(stage for stage in self.collect if stage.verb in (Verb.GENERATE, Verb.SCORE, Verb.KEEP))

    @property
    def batch_stages(self) -> tuple[Stage, ...]:
        """Of `collect`: what runs on whole batches, so that its arithmetic does not depend on arrival order."""
        each = (stage for stage in self.collect if not stage.precomputed)
        return tuple(stage for stage in each if stage.verb not in (Verb.GENERATE, Verb.SCORE, Verb.KEEP))

    @property
    def precomputed(self) -> tuple[Stage, ...]:
        """What runs once, before the first step (`orchestrator/precompute.py`), and in no step."""
        return tuple(stage for stage in self.stages if stage.precomputed)

    def given(self, stage: Stage) -> Pipeline:
        """The pipeline for data that brings what this stage writes."""
        data = replace(self.data, columns=self.data.columns | stage.writes)
        return Pipeline(data, *(other for other in self.stages if other is not stage), warnings=self.warnings)

    @property
    def generates(self) -> Stage | None:
        return next((stage for stage in self.stages if stage.verb is Verb.GENERATE), None)

    @property
    def updates(self) -> tuple[Stage, ...]:
        return tuple(stage for stage in self.stages if stage.verb is Verb.UPDATE)

    @property
    def optimizer_steps_per_batch(self) -> int:
        return max((int(stage.options["epochs"] * stage.options["minibatches"]) for stage in self.updates), default=1)

    @property
    def mixes(self) -> tuple[Stage, ...]:
        return tuple(stage for stage in self.stages if stage.verb is Verb.MIX)


def generate(role: str = "rollout", *, n: int) -> Stage:
    """Sample `n` completions of each prompt."""
    writes = frozenset({"tokens", "mask", "sample_logps", "version", "group", "truncated"})
    return Stage(Verb.GENERATE, role, frozenset(), writes, options={"n": n})


def score(role: str = "reward") -> Stage:
    """Reward each completion."""
    return Stage(Verb.SCORE, role, frozenset({"tokens", "mask"}), frozenset({"reward"}))


def keep(predicate: Callable[..., bool], **options: Any) -> Stage:
    """Keep a prompt group only if `predicate(rewards [G], **options)`; others are replaced by new prompts."""
    return Stage(Verb.KEEP, DRIVER, frozenset({"reward"}), frozenset(), predicate, options)


def logps(role: str, *, into: str, adapters: bool = True, precomputed: bool = False) -> Stage:
    """Per-token log-probabilities under a role's weights, written to column `into`. `precomputed`: of the whole data
    set, once before the first step."""
    options = {"into": into, "adapters": adapters, "precomputed": precomputed}
    return Stage(Verb.LOGPS, role, frozenset({"tokens"}), frozenset({into}), options=options)


def credit(call: Callable[..., Any], **options: Any) -> Stage:
    """Turn rewards into advantages, in the driver. `call.reads` and `call.writes` name its columns."""
    reads = getattr(call, "reads", frozenset({"reward", "group", "mask"}))
    writes = getattr(call, "writes", frozenset({"advantages"}))
    return Stage(Verb.CREDIT, DRIVER, frozenset(reads), frozenset(writes), call, options)


def update(
    role: str,
    loss: Callable[..., Any],
    *,
    reduce: Callable[..., Any] | None = None,
    epochs: int = 1,
    minibatches: int = 1,
    **options: Any,
) -> Stage:
    """Optimise a role. What the loss reads is declared beside it (see `orchestrator/losses/declare.py`). A `Sum` of
    losses has reductions and options of its own."""
    from orchestrator.losses.declare import columns_of  # torch is loaded when a method is built, not before

    plan = {"reduce": reduce, "epochs": epochs, "minibatches": minibatches, "loss_options": options}
    return Stage(Verb.UPDATE, role, frozenset(columns_of(loss, options)), frozenset(), loss, plan)


def mix(role: str, source: str, *, share: float, every: int) -> Stage:
    """Move the weights of a role that is not trained towards those of one that is: after every `every`-th step,
    `share` of the source and the rest of its own."""
    options = {"source": source, "share": share, "every": every}
    return Stage(Verb.MIX, role, frozenset(), frozenset(), options=options)


def when(condition: Any, *stages: Stage) -> tuple[Stage, ...]:
    """The stages if the condition holds, else none: `*when(beta, logps("reference", into="ref_logps"))`."""
    return stages if condition else ()


def _check_closes(pipeline: Pipeline) -> None:
    written = set(pipeline.data.columns)
    for stage in pipeline.stages:
        unknown = sorted((stage.reads | stage.writes) - set(COLUMNS))
        if unknown:
            raise ConfigError(f"stage {stage.name} names unknown column(s) {', '.join(unknown)}")
        missing = sorted(stage.reads - written)
        if missing:
            raise ConfigError(
                f"stage {stage.name} reads {', '.join(missing)}, which no earlier stage writes "
                f"(written so far: {', '.join(sorted(written)) or 'nothing'})"
            )
        written |= stage.writes
    for stage in pipeline.mixes:
        source = stage.options["source"]
        if source not in pipeline.trained or stage.role in pipeline.trained:
            raise ConfigError(
                f"stage {stage.name} moves {stage.role} towards {source}: the one must not be trained and the other "
                f"must be (trained: {', '.join(pipeline.trained) or 'nothing'})"
            )


def _check_precomputed(pipeline: Pipeline) -> None:
    """Values that are computed once must hold for the whole phase: the rows are there, and the weights stay."""
    data = pipeline.data
    for stage in pipeline.precomputed:
        problem = None
        if data.prompts_only:
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
