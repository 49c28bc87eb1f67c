"""The `roles:` section: the four kinds of role, and the roles that methods use, with their defaults."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import ConfigDict, Discriminator, Field, Tag

from actors.specs import BackendKind, BackendSpec, Scheduler
from orchestrator.config.autoscale import AutoscaleConfig
from orchestrator.config.section import DType, LabelSelector, Positive, Seconds, Section
from rollout.engine import EngineSpec

AUTO_ENGINE = "auto"  # the plan chooses one


class OptimizerConfig(Section):
    """The optimizer of one trained role, where it differs from its phase's `train`."""

    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak of the schedule. None: train.learning_rate."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Applies to matrices, never to biases and norms. None: train.weight_decay."""
    scheduler: Scheduler | None = None
    """Course of the learning rate after the warm-up. None: train.scheduler."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Optimizer steps until the learning rate reaches its peak. None: train.warmup_steps."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Norm to which gradients are clipped. None: train.max_grad_norm."""


class RanksRole(Section):
    """A role whose processes hold one model together, as ranks of a gang."""

    model: str | None = None
    """Folder or hub name of its model, or ${phases.NAME.model}: the one that this phase saves. Default: the run's."""
    dtype: DType | None = None
    """Type of its weights. Default: the model's."""

    backend: BackendKind = BackendSpec.kind
    """Plain torch or DeepSpeed."""
    ranks: Positive = 1
    """Number of processes; each computes a shard of every batch."""
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
    """ZeRO stage, unless `deepspeed` sets one."""
    colocate: str | None = None
    """Share that role's bundles, and sleep while it works; `gpus` may be a fraction."""
    call_timeout_s: Seconds = 3600.0
    """Deadline of one verb (a step, a pass of log-probabilities, a save); if a rank takes longer, the run ends."""
    ping_timeout_s: Seconds = 60.0
    """A rank that answers no ping for this long counts as hung, and the run ends."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom Ray resources reserved per rank."""
    label_selector: LabelSelector = Field(default_factory=dict)
    """Labels of the nodes that it may run on."""


class TrainerRole(RanksRole):
    """A role whose weights may be trained; the methods of the phases decide which phases train it."""

    kind: Literal["trainer"] = "trainer"
    """Kind of the role."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """Settings of its optimizer that differ from the phase's."""


class FrozenRole(RanksRole):
    """A role whose weights do not change during a phase: the same processes without an optimizer."""

    kind: Literal["frozen"] = "frozen"
    """Kind of the role."""
    copies: str = "policy"
    """The role whose weights it copies at the start of a phase, unless `model` is set."""


class UserCodeRole(Section):
    """A pool of processes that run users' code; each may be killed and replaced at any time."""

    workers: Positive = 1
    """Number of processes; `troupe scale RUN ROLE=N` changes the number of a running job."""
    autoscale: AutoscaleConfig | None = None
    """Bounds within which the number of processes follows the load, beginning with `workers`. None: it does not."""
    cpus: Annotated[float, Field(ge=0)] = 0.5
    """CPUs reserved per worker, in Ray's book-keeping."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs reserved per worker."""
    start_timeout_s: Seconds = 300.0
    """Deadline of a worker's start, including the imports and models of users' classes."""
    max_restarts: Annotated[int, Field(ge=0)] = 1000
    """Replacements of dead workers in a run."""
    colocate: str | None = None
    """Share that role's bundles."""


class ScorersRole(UserCodeRole):
    """A pool of reward actors."""

    kind: Literal["scorers"] = "scorers"
    """Kind of the role."""
    concurrency: Positive = 4
    """Groups scored by one worker at a time."""
    timeout_s: Seconds = 60.0
    """Deadline of one call; after it the worker is killed and replaced, and the group is tried again."""
    max_attempts: Positive = 3
    """Attempts to score a group."""
    on_failure: Literal["drop", "abort"] = "drop"
    """A group that cannot be scored is dropped and counted, or ends the run. It never gets a reward of zero."""


class EnvironmentsRole(UserCodeRole):
    """A pool of processes that host the tools and environments of episodes."""

    kind: Literal["environments"] = "environments"
    """Kind of the role."""
    concurrency: Positive = 64
    """Episodes hosted by one worker at a time."""
    timeout_s: Seconds = 60.0
    """Deadline of one call; after it the worker is replaced, and its episodes are generated again from their start."""
    max_attempts: Positive = 3
    """Attempts of an episode whose environment died or did not answer."""


class Fallback(Section):
    """An alternative choice of nodes, in Ray's notation. An empty selector matches every node."""

    label_selector: LabelSelector
    """Labels of the nodes; empty: every node."""


class EngineRole(Section):
    """A fleet of rollout workers; each has a placement group of its own and may join or leave at any time."""

    kind: Literal["engine"] = "engine"
    """Kind of the role."""
    follows: str = "policy"
    """The role that it samples from: its weights are published to every worker."""
    mixes: str | None = None
    """A second role whose weights its engines hold, for stages that sample from a mixture of both. None: none."""
    engine: str = AUTO_ENGINE
    """vllm, hf, scripted, or path/to/file.py:Class; auto: hf for short samples of a small model on a CPU, else vllm."""
    workers: Positive = 1
    """Number of processes; `troupe scale RUN rollout=N` changes the number of a running job."""
    autoscale: AutoscaleConfig | None = None
    """Bounds within which the number of processes follows the load, beginning with `workers`. None: it does not."""
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
    kv_cache_gib: Annotated[float, Field(gt=0)] | None = EngineSpec.kv_cache_gib
    """Memory of each worker's key-value cache. None: on a GPU what the model leaves of it, on a CPU 0.25."""
    max_concurrency: Positive = EngineSpec.max_concurrency
    """Sequences decoded by one worker at a time."""
    max_model_len: Positive | None = None
    """Tokens of prompt and completion. Default: the longest prompt allowed plus sampling.max_tokens."""
    engine_options: dict[str, Any] = Field(default_factory=dict)
    """Arguments passed to the engine as they are."""
    colocate: str | None = None
    """Share that role's bundles, and sleep while it works, unless a phase samples ahead (train.max_staleness)."""
    start_timeout_s: Seconds = 300.0
    """Deadline of a worker's start: process, engine, model."""
    request_timeout_s: Seconds = 600.0
    """Deadline of one request; after it the request is tried on another worker."""
    max_attempts: Positive = 5
    """Attempts to complete a request, each on another worker if there is one."""
    max_restarts: Annotated[int, Field(ge=0)] = 100
    """Replacements of dead workers in a run."""


class ReferenceEngineRole(EngineRole):
    """The same with another role to sample from, whichever other keys of it are set."""

    follows: str = "reference"
    """The role that it samples from: its weights are published to every worker."""


class TeacherEngineRole(EngineRole):
    """The same with another role to sample from, whichever other keys of it are set."""

    follows: str = "teacher"
    """The role that it samples from: its weights are published to every worker."""


class MixtureEngineRole(EngineRole):
    """The same with a second role to mix in, whichever other keys of it are set."""

    mixes: str | None = "reference"
    """A second role whose weights its engines hold, for stages that sample from a mixture of both. None: none."""


Role = TrainerRole | FrozenRole | EngineRole | ScorersRole | EnvironmentsRole


def count(settings: Role) -> int:
    """Number of processes of a role at the start."""
    return settings.ranks if isinstance(settings, RanksRole) else settings.workers


def most(settings: Role) -> int:
    """Number of processes that a role may come to have by itself."""
    if isinstance(settings, RanksRole) or settings.autoscale is None:
        return count(settings)
    return max(settings.workers, settings.autoscale.max)


def _kind_of(role: Any) -> Any:
    return cast(dict[str, Any], role).get("kind") if isinstance(role, dict) else getattr(role, "kind", None)


RoleConfig = Annotated[
    Annotated[TrainerRole, Tag("trainer")]
    | Annotated[FrozenRole, Tag("frozen")]
    | Annotated[EngineRole, Tag("engine")]
    | Annotated[ScorersRole, Tag("scorers")]
    | Annotated[EnvironmentsRole, Tag("environments")],
    Discriminator(
        _kind_of,
        custom_error_type="role_kind",
        custom_error_message="a role with a name of your own needs a kind: trainer, frozen, engine, scorers or "
        "environments",
    ),
]


class RolesConfig(Section):
    """Roles by name, each of one of five kinds: `trainer`, `frozen`, `engine`, `scorers`, `environments`. The kind
    decides what a role does; the names here are those that methods use, with their defaults. Others may be added, with
    their `kind`. Which roles are launched follows from the pipelines, the rewards and the episodes, not from here."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, RoleConfig]  # pyright: ignore[reportIncompatibleVariableOverride]

    policy: TrainerRole = Field(default_factory=TrainerRole)
    """The role that policies are trained in."""
    value: TrainerRole = Field(default_factory=TrainerRole)
    """The critic of methods that train one in addition to the policy."""
    reward_model: TrainerRole = Field(default_factory=TrainerRole)
    """A model that scores completions; reward modelling trains it."""
    reference: FrozenRole = Field(default_factory=FrozenRole)
    """The model from which a KL term or a log-ratio measures the policy's distance."""
    teacher: FrozenRole = Field(default_factory=FrozenRole)
    """The model whose distribution or completions a student learns."""
    reward: ScorersRole = Field(default_factory=ScorersRole)
    """The pool that calls reward functions."""
    environment: EnvironmentsRole = Field(default_factory=EnvironmentsRole)
    """The pool that hosts the tools and environments of episodes."""
    rollout: EngineRole = Field(default_factory=EngineRole)
    """The fleet that samples completions."""
    teacher_rollout: TeacherEngineRole = Field(default_factory=TeacherEngineRole)
    """The fleet that samples the teacher's completions."""
    reference_rollout: ReferenceEngineRole = Field(default_factory=ReferenceEngineRole)
    """The fleet that samples the reference's completions."""
    mixture_rollout: MixtureEngineRole = Field(default_factory=MixtureEngineRole)
    """The fleet that samples, token by token, from a mixture of the policy and the reference."""

    def __contains__(self, name: str) -> bool:
        return name in type(self).model_fields or name in self.__pydantic_extra__

    def __getitem__(self, name: str) -> Role:
        return getattr(self, name)

    def get(self, name: str) -> Role | None:
        if name not in self:
            return None
        return self[name]

    def engine_of(self, trained: Sequence[str], preferred: Collection[str]) -> str | None:
        """The engine role that samples from the first of the `trained` roles: one of `preferred` if there is any, else
        the first. Where nothing is trained, the first engine of `preferred`."""
        engines = [name for name, role in self if isinstance(role, EngineRole)]
        if not trained:
            return next((name for name in preferred if name in engines), None)
        following = [name for name in engines if self.engine(name).follows == trained[0]]
        return min(following, key=lambda name: name not in preferred, default=None)

    def ranks(self, name: str) -> RanksRole:
        """The settings of a role that holds a model."""
        role = self[name]
        assert isinstance(role, RanksRole), f"{name} is a pool"
        return role

    def engine(self, name: str) -> EngineRole:
        role = self[name]
        assert isinstance(role, EngineRole), f"{name} is no engine"
        return role

    def environments(self, name: str) -> EnvironmentsRole:
        role = self[name]
        assert isinstance(role, EnvironmentsRole), f"{name} hosts no episodes"
        return role

    def scorers(self, name: str) -> ScorersRole:
        role = self[name]
        assert isinstance(role, ScorersRole), f"{name} scores nothing"
        return role
