"""The `roles:` section: the four kinds of role, and the roles that methods use, with their defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import ConfigDict, Discriminator, Field, Tag

from actors.specs import BackendKind, BackendSpec, Scheduler
from orchestrator.config.section import DType, LabelSelector, Positive, Seconds, Section
from rollout.engine import EngineSpec


class OptimizerConfig(Section):
    """Of one trained role, where it differs from its phase's `train`."""

    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak of the schedule. None: train.learning_rate."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Of matrices; never of biases and norms. None: train.weight_decay."""
    scheduler: Scheduler | None = None
    """Course of the learning rate after the warm-up. None: train.scheduler."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Optimizer steps until the learning rate is reached. None: train.warmup_steps."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Norm to which gradients are clipped. None: train.max_grad_norm."""


class RanksRole(Section):
    """A role whose processes hold a model together, as ranks of a gang."""

    model: str | None = None
    """Folder or hub name of its model, or ${phases.NAME.model}: what that phase leaves. Default: the run's model."""
    dtype: DType | None = None
    """Type of its weights. Default: the model's."""

    backend: BackendKind = BackendSpec.kind
    """What trains: plain torch or DeepSpeed."""
    ranks: Positive = 1
    """Processes that train together, each on its share of a batch."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs reserved per rank."""
    cpus: Annotated[float, Field(gt=0)] = 1.0
    """CPUs reserved per rank, in Ray's book-keeping; `threads` says how many are used."""
    threads: Positive | None = None
    """Threads of torch per rank. None: the plan decides."""
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory reserved per rank, in Ray's book-keeping. None: none."""
    deepspeed: dict[str, Any] | Path | None = None
    """A DeepSpeed configuration, inline or a JSON file, passed through."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = BackendSpec.zero_stage
    """ZeRO stage, used when `deepspeed` does not say."""
    colocate: str | None = None
    """Share that role's bundles; `gpus` may be a fraction."""
    call_timeout_s: Seconds = 3600.0
    """Deadline of one verb (a step, a pass of log-probabilities, a save); a rank inside it for longer ends the run."""
    ping_timeout_s: Seconds = 60.0
    """A rank that answers no ping for that long hangs, and the run ends."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom Ray resources reserved per rank."""
    label_selector: LabelSelector = Field(default_factory=dict)
    """Labels of the nodes that it may run on."""


class TrainerRole(RanksRole):
    """A role whose weights may be trained; which phases train it, their methods say."""

    kind: Literal["trainer"] = "trainer"
    """What the role is."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """Its optimizer, where it is another than the phase's."""


class FrozenRole(RanksRole):
    """A role whose weights stay while a phase lasts: the same machinery without an optimizer."""

    kind: Literal["frozen"] = "frozen"
    """What the role is."""
    copies: str = "policy"
    """The role whose weights it has, as a phase finds them, unless it has a `model` of its own."""


class ScorersRole(Section):
    """A pool of reward actors."""

    kind: Literal["scorers"] = "scorers"
    """What the role is."""
    workers: Positive = 1
    """Number of processes; `troupe scale RUN reward=N` changes the number of a running job."""
    cpus: Annotated[float, Field(ge=0)] = 0.5
    """CPUs reserved per worker, in Ray's book-keeping."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs reserved per worker."""
    concurrency: Positive = 4
    """Groups scored by one worker at a time."""
    timeout_s: Seconds = 60.0
    """Deadline of one call; then the worker is killed, replaced, and the group tried again."""
    max_attempts: Positive = 3
    """How often a group is tried."""
    on_failure: Literal["drop", "abort"] = "drop"
    """What becomes of a group that cannot be scored: dropped and counted, or the run ends. Never a reward of zero."""
    start_timeout_s: Seconds = 120.0
    """Deadline of a worker's start: its imports, and whatever reward classes load."""
    max_restarts: Annotated[int, Field(ge=0)] = 1000
    """Replacements of dead workers in a run."""
    colocate: str | None = None
    """Share that role's bundles."""


class Fallback(Section):
    """Another choice of nodes, as Ray writes it. An empty selector takes every node."""

    label_selector: LabelSelector
    """Labels of the nodes; empty: every node."""


class EngineRole(Section):
    """A fleet of rollout workers; each has a placement group of its own and may join or leave at any time."""

    kind: Literal["engine"] = "engine"
    """What the role is."""
    follows: str = "policy"
    """The trained role that it samples from: its weights are published to every worker."""
    engine: str = "vllm"
    """What samples: vllm, hf or scripted."""
    workers: Positive = 1
    """Number of processes; `troupe scale RUN rollout=N` changes the number of a running job."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs reserved per worker."""
    cpus: Annotated[float, Field(gt=0)] = 1.0
    """CPUs reserved per worker, in Ray's book-keeping; `threads` says how many are used."""
    threads: Positive | None = None
    """Threads of each worker's engine. None: the plan decides."""
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory reserved per worker, in Ray's book-keeping. None: none."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom Ray resources reserved per worker."""
    label_selector: LabelSelector = Field(default_factory=dict)
    """Labels of the nodes that it may run on, e.g. {role: rollout}."""
    fallback_strategy: tuple[Fallback, ...] = ()
    """Other nodes, tried in turn if there is no room, each for cluster.placement_timeout_s."""
    tensor_parallel: Positive = EngineSpec.tensor_parallel
    """GPUs over which each worker's engine splits the model."""
    dtype: DType | None = None
    """Type in which the engine holds the weights. Default: the model's."""
    kv_cache_gib: Annotated[float, Field(gt=0)] = EngineSpec.kv_cache_gib
    """Memory of each worker's key-value cache."""
    max_concurrency: Positive = EngineSpec.max_concurrency
    """Sequences decoded by one worker at a time."""
    max_model_len: Positive | None = None
    """Tokens of prompt and completion. Default: the longest prompt allowed plus sampling.max_tokens."""
    engine_options: dict[str, Any] = Field(default_factory=dict)
    """Arguments passed to the engine as they are."""
    colocate: str | None = None
    """Share that role's bundles."""
    start_timeout_s: Seconds = 300.0
    """Deadline of a worker's start: process, engine, model."""
    request_timeout_s: Seconds = 600.0
    """Deadline of one request; then it is tried on another worker."""
    max_attempts: Positive = 5
    """How often a request is tried, each time on another worker if there is one."""
    max_restarts: Annotated[int, Field(ge=0)] = 100
    """Replacements of dead workers in a run."""


def _kind_of(role: Any) -> Any:
    return cast(dict[str, Any], role).get("kind") if isinstance(role, dict) else getattr(role, "kind", None)


RoleConfig = Annotated[
    Annotated[TrainerRole, Tag("trainer")]
    | Annotated[FrozenRole, Tag("frozen")]
    | Annotated[EngineRole, Tag("engine")]
    | Annotated[ScorersRole, Tag("scorers")],
    Discriminator(
        _kind_of,
        custom_error_type="role_kind",
        custom_error_message="a role of a name of its own says its kind: trainer, frozen, engine or scorers",
    ),
]


class RolesConfig(Section):
    """Roles by name, each of one of four kinds: `trainer`, `frozen`, `engine`, `scorers`. The kind decides what a role
    does; the names here are those that methods use, with their defaults. Others may be added, with their `kind`. Which
    roles are launched follows from the pipelines and the rewards, not from here."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, RoleConfig]  # pyright: ignore[reportIncompatibleVariableOverride]

    policy: TrainerRole = Field(default_factory=TrainerRole)
    """The role that policies are trained in."""
    value: TrainerRole = Field(default_factory=TrainerRole)
    """The critic of methods that train one beside the policy."""
    reward_model: TrainerRole = Field(default_factory=TrainerRole)
    """A model that scores; methods of reward modelling train it."""
    reference: FrozenRole = Field(default_factory=FrozenRole)
    """What the policy is held near to."""
    teacher: FrozenRole = Field(default_factory=FrozenRole)
    """What a student learns from."""
    reward: ScorersRole = Field(default_factory=ScorersRole)
    """The pool that calls reward functions."""
    rollout: EngineRole = Field(default_factory=EngineRole)
    """The fleet that samples completions."""
    teacher_rollout: EngineRole = Field(default_factory=lambda: EngineRole(follows="teacher"))
    """A fleet that samples the teacher's completions."""

    def __contains__(self, name: str) -> bool:
        return name in type(self).model_fields or name in self.__pydantic_extra__

    def __getitem__(self, name: str) -> TrainerRole | FrozenRole | EngineRole | ScorersRole:
        return getattr(self, name)

    def get(self, name: str) -> TrainerRole | FrozenRole | EngineRole | ScorersRole | None:
        if name not in self:
            return None
        return self[name]

    def ranks(self, name: str) -> RanksRole:
        """The settings of a role that holds a model."""
        role = self[name]
        assert isinstance(role, RanksRole), f"{name} is a pool"
        return role

    def engine(self, name: str) -> EngineRole:
        role = self[name]
        assert isinstance(role, EngineRole), f"{name} is no engine"
        return role

    def scorers(self, name: str) -> ScorersRole:
        role = self[name]
        assert isinstance(role, ScorersRole), f"{name} scores nothing"
        return role
