"""What the service takes and gives, as JSON. Times are seconds since the epoch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Path as PathParameter
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, WithJsonSchema

from orchestrator.cluster.control import TOKEN
from orchestrator.config.section import RUN_ID, refuse_run_id
from orchestrator.status import State

# A run's id is the name of its folder; a name with a separator, or one that begins with a dot, is none.
Id = Annotated[str, AfterValidator(refuse_run_id), WithJsonSchema({"type": "string", "pattern": f"^{RUN_ID}$"})]
RunId = Annotated[Id, PathParameter(description="A run's id: the name of its folder.")]


class Taken(BaseModel):
    """Base of what clients send: a key that does not exist is an error, not ignored."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Given(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


def _no_other_type(value: Any) -> Any:
    if isinstance(value, bool | str):
        raise ValueError(f"must be a whole number, not {value!r}")
    return value


Whole = Annotated[int, BeforeValidator(_no_other_type)]  # JSON has one kind of numbers: 3.0 is 3
Priority = Annotated[Whole, Field(ge=-1_000_000, le=1_000_000)]


class Recipe(Taken):
    recipe: str | dict[str, Any]
    """The name of a shipped recipe, or a recipe itself: the keys of a YAML file."""
    overrides: list[str] = Field(default=[], max_length=1000)
    """`key.key=value`, as on the command line."""


class Submission(Recipe):
    name: Id | None = None
    """The run's id. Submitting the same again under one name is one run. Default: made from the recipe's name."""
    priority: Priority = 0
    """Its place in the queue: higher ones first. Of a run that was submitted before it is left as it is."""


class AttachedEngine(Taken):
    address: str = Field(max_length=300)
    """HOST:PORT or https://HOST:PORT of a `troupe engine`."""
    token: str = Field(pattern=f"^{TOKEN}$", repr=False)
    """The one that it was started with."""
    role: str | None = Field(default=None, max_length=100)
    """The engine role that it joins; the only one, if there is one."""


class Changes(Taken):
    paused: StrictBool | None = None
    """Hold the run before its next step, or let it go on."""
    scale: dict[str, Annotated[Whole, Field(ge=0, le=10_000)] | Literal["auto"]] = Field(default={}, max_length=100)
    """Elastic role -> how many workers it is to have; "auto": as many as its `autoscale` decides."""
    priority: Priority | None = None
    """Its place in the queue, and who may take its place: higher ones first."""
    attach: list[AttachedEngine] = Field(default=[], max_length=100)
    """Engines that were started elsewhere and join the run."""
    detach: list[Annotated[str, Field(max_length=300)]] = Field(default=[], max_length=100)
    """Addresses of those that leave it, once they have finished what they have."""


class Resumption(Taken):
    overrides: list[str] = Field(default=[], max_length=1000)
    """`key.key=value` that the run has from then on."""


class ChatRequest(BaseModel):
    """As of the OpenAI protocol. What is not named here goes to the run as it is, which refuses what it does not
    support."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    model: str = Field(max_length=300)
    """The id of a run in progress, or RUN/ROLE for one of its engine roles."""
    messages: list[dict[str, Any]] = Field(min_length=1, max_length=10_000)
    stream: StrictBool | None = False


class Model(Given):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["troupe"] = "troupe"


class ModelList(Given):
    object: Literal["list"] = "list"
    data: list[Model]


class RunSummary(Given):
    id: str
    state: State
    detail: str
    """The state in words: why a run waits, how it ended, why it does not answer."""
    step: int
    methods: list[str]
    """Of its phases, in their order."""
    created: float
    priority: int | None
    """Its place in the queue; null for a run that no service was asked for."""
    failures: int
    """How often its process has failed since it saved its newest checkpoint, if the service resumes it then."""


class RunList(Given):
    runs: list[RunSummary]
    """The newest first."""


class Submitted(RunSummary):
    created_now: bool
    """False if it was submitted before."""


class Resumed(RunSummary):
    from_step: int
    """Of the checkpoint that it goes on from; 0: it begins again from the start, because it saved none."""


class WorkerCount(Given):
    desired: int
    serving: int


class DrawnStage(Given):
    stage: str
    writes: list[str]
    """Of stages that infer: the columns that they write. With `stage`, this names it."""
    per: Literal["group", "batch", "data"]
    """What one call of it is for: a prompt group, a batch, or the whole data set before the first step."""
    ahead: bool
    """Whether it may run ahead of training."""


class StageAtWork(Given):
    stage: str
    """As the pipeline names it; or `publish`, `evaluation`, `checkpoint`."""
    writes: list[str]
    calls: int
    """Under way now."""
    share: float
    """Of the last second, for which it was at work: 0 to 1."""


class Wait(Given):
    what: str
    seconds: float


class RunDetail(RunSummary):
    workers: dict[str, WorkerCount]
    """Elastic roles of a run in progress: how many workers are wanted, and how many serve."""
    members: dict[str, list[dict[str, Any]]]
    """Elastic role -> its workers, with state, place, weight version and rate."""
    ranks: dict[str, list[dict[str, Any]]]
    """Role that holds a model (policy, value, reference ...) -> its processes: node, pid and `state` (`idle`,
    `working` in a `verb` for so many `seconds`, `silent`, `dead`)."""
    pipelines: dict[str, list[DrawnStage]]
    """Phase -> its stages in order; empty until the run has read its data."""
    phase: str | None
    """The one under way."""
    at_work: list[StageAtWork]
    """Its stages that are at work."""
    waits: list[Wait]
    """What its driver waits for."""
    autoscale: dict[str, dict[str, Any]]
    """Roles that scale by themselves: bounds, whether held at a number that was asked for, the last decision."""
    metrics: dict[str, Any]
    """What was logged last."""
    config: dict[str, Any]
    """The whole configuration."""


class EventLine(Given):
    id: int
    """The number of the line, from 1; `Last-Event-ID` of a stream."""
    event: str
    data: dict[str, Any]


class EventList(Given):
    events: list[EventLine]


class MetricLines(Given):
    lines: list[dict[str, Any]]
    """`step`, `phase`, `time`, and the metrics of that line. A value that is not finite is null."""


class TokenSequence(Given):
    """Tokens of one row that was learned from: a sample, or one turn of an episode whose turns are rows."""

    start: int
    """The place of the first token here in its row."""
    total: int
    """Tokens of the row; what is missing here was not kept."""
    pieces: list[str]
    """Texts of the tokens. One that is only a part of a character is empty, and the next one has the character."""
    mask: list[bool]
    """Whether it is learned from: false for prompts, and for what a tool or an environment said."""
    values: dict[str, list[float | None]]
    """Column per token (`sample_logps`, `advantages` ...) -> its values; null where the model did not write."""


class Samples(Given):
    steps: list[int]
    """Those that have samples."""
    step: int | None
    """The one whose samples these are; null if there are none yet."""
    total: int
    """How many of them the filter leaves."""
    rows: list[dict[str, Any]]
    tokens: list[list[TokenSequence]] | None
    """Those of each row, if they are asked for; an empty list where none are kept."""


class CheckpointEntry(Given):
    name: str
    step: int
    phase: str
    bytes: int
    files: int
    written: float
    averaged: bool
    """Whether it has the averaged weights, too."""


class CheckpointList(Given):
    checkpoints: list[CheckpointEntry]
    """The oldest first."""


class LogText(Given):
    text: str
    offset: int
    """Where the text begins in the file, in bytes."""
    next_offset: int
    """Give it as `offset` to read on."""
    ended: bool
    """Whether no process writes to it any more, and this is its end."""


class MethodOption(Given):
    name: str
    type: str
    default: str | None
    """As YAML; null for one that must be given."""


class MethodDescription(Given):
    name: str
    summary: str
    source: str
    data: str | None
    """The kind of data it takes; null where an option without a default decides that."""
    roles: list[str]
    stages: list[str]
    options: list[MethodOption]


class MethodList(Given):
    methods: list[MethodDescription]


class PlanReport(Given):
    accepted: bool
    problems: list[str]
    """Why the cluster cannot hold it."""
    warnings: list[str]
    roles: list[dict[str, Any]]
    phases: list[dict[str, Any]]
    bundles: list[dict[str, Any]]
    """What is reserved at the start, each on one node: `roles`, `resources`, `selectors` of nodes."""
    report: str
    """The same as `troupe plan` prints it."""


class Health(Given):
    status: str
