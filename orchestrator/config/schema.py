"""The configuration of a run: every key, its type, its range and its default, in one place.

Files are YAML; `a.b=c` on the command line overrides (`orchestrator/config/overrides.py`). Everything is frozen. A key that
does not exist is an error that names the nearest one that does. A method's `options` are validated against the method's
own signature.

A run is one phase, or several in sequence that share the policy: a phase is a method with its data and its schedule.
A file with one phase writes `method`, `data`, `train` ... at the top level; a file with several writes `phases`, a
mapping from phase name to the same keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from orchestrator.planning import node_selectors as labels

Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
LabelSelector = Annotated[dict[str, str], AfterValidator(labels.check)]  # see orchestrator/planning/node_selectors.py
DType = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """Frozen; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class LoraConfig(Section):
    """PEFT adapters; only they are trained."""

    r: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Fraction = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False


class ModelConfig(Section):
    """A causal language model: a folder, a hub name, or `example:NAME` for one that Troupe makes itself, seeded."""

    path: str = "example:arithmetic"
    tokenizer: str | None = None  # default: the model's own
    dtype: DType = "float32"
    lora: LoraConfig | None = None
    gradient_checkpointing: bool = False
    neftune_noise_alpha: Annotated[float, Field(ge=0)] = 0.0
    router_aux_loss_coef: float | None = None  # None: the model's own value
    chat_template: str | None = None  # a file
    trust_remote_code: bool = False


class MixtureEntry(Section):
    path: str
    fraction: Annotated[float, Field(gt=0)]
    split: str = "train"


class DataConfig(Section):
    """A data set: hub name, file (JSONL, JSON, CSV, Parquet, Arrow, text), folder, `example:NAME`, or a mixture."""

    path: str | None = None
    mixture: tuple[MixtureEntry, ...] = ()
    split: str = "train"
    columns: dict[str, str] = Field(default_factory=dict)  # our name -> the data set's name
    max_length: Positive | None = (
        None  # tokens of prompt and completion; what is longer is handled as `truncation` says
    )
    max_prompt_length: Positive | None = None
    truncation: Literal["keep_start", "keep_end", "drop", "error"] = "keep_start"
    packing: Literal["none", "bfd", "bfd_split", "wrapped"] = "none"
    completion_only: bool | None = None  # None: true exactly when the data has a prompt column
    assistant_only: bool = False
    append_eos: bool = True  # to rows that are not conversations
    shuffle: bool = True
    streaming: bool = False
    max_bad_rows: Annotated[int, Field(ge=0)] = 0
    limit: Positive | None = None  # use only that many rows
    cache_dir: Path | None = None
    options: dict[str, Any] = Field(default_factory=dict)  # of `example:NAME`, or passed to datasets.load_dataset


class BemaConfig(Section):
    """A bias-corrected moving average of the trained weights (arXiv:2508.00180), saved as `bema/` beside `model/`.
    Steps are optimizer steps of the phase."""

    update_freq: Positive = 400  # steps from one average to the next
    ema_power: Annotated[float, Field(ge=0)] = 0.5
    bias_power: Annotated[float, Field(ge=0)] = 0.2
    lag: Annotated[float, Field(ge=1)] = 10.0
    multiplier: Annotated[float, Field(ge=0)] = 1.0
    update_after: Annotated[int, Field(ge=0)] = 0  # the step whose weights it starts from
    min_ema_multiplier: Fraction = 0.0


class TrainConfig(Section):
    """The schedule of a phase. `batch_size` counts items of the data set per optimizer step: prompts, examples,
    pairs."""

    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    batch_size: Positive = 32
    token_budget: Positive = 8192  # tokens per micro-batch and rank
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    adam_eps: Annotated[float, Field(gt=0)] = 1e-8
    scheduler: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    min_lr_ratio: Fraction = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    max_staleness: Annotated[int, Field(ge=0)] = 0  # optimizer steps that a token may lag behind the weights it trains
    bema: BemaConfig | None = None  # average the weights; `{}`: with its defaults


class SamplingConfig(Section):
    """How completions are drawn in a phase that generates."""

    max_tokens: Positive = 256
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: int = -1
    min_p: Fraction = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


class RewardConfig(Section):
    """One reward: a name of `rewards.functions.REWARDS`, `package.module:function` or `path/to/file.py:function`."""

    fn: str
    weight: float = 1.0
    name: str | None = None  # in metrics; default: the function's name
    options: dict[str, Any] = Field(default_factory=dict)  # keyword arguments bound once


class EvaluationConfig(Section):
    """What is measured on held-out data at a phase's start and end, and in between. `data`: prompts, answered greedily
    and scored by the run's rewards. `rows`: rows as the phase learns from them; its loss and metrics, without learning.
    One of the two, or both."""

    data: DataConfig | None = None
    rows: DataConfig | None = None
    every: Positive | None = None  # steps; None: only at the start and the end of the phase
    max_tokens: Positive | None = None  # default: the phase's sampling.max_tokens
    at_start: bool = True


class PhaseConfig(Section):
    """One method on one data set with one schedule."""

    method: str = "grpo"
    options: dict[str, Any] = Field(default_factory=dict)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig | None = None


class TrainedRole(Section):
    """A role whose weights are trained (`policy`)."""

    backend: Literal["single", "deepspeed"] = "single"
    ranks: Positive = 1
    gpus: Annotated[float, Field(ge=0)] = 0.0  # per rank
    cpus: Annotated[float, Field(gt=0)] = 1.0  # per rank, for Ray's book-keeping
    threads: Positive | None = None  # per rank; None: the plan decides
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    deepspeed: dict[str, Any] | Path | None = None  # a DeepSpeed configuration, inline or a JSON file, passed through
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2  # used when `deepspeed` does not say
    colocate: str | None = None  # share that role's bundles; `gpus` may be a fraction
    call_timeout_s: Seconds = 3600.0  # of one verb: a step, a pass of log-probabilities, a save
    resources: dict[str, float] = Field(default_factory=dict)  # custom Ray resources
    label_selector: LabelSelector = Field(default_factory=dict)  # of the nodes that it may run on


class FrozenRole(TrainedRole):
    """A role whose weights stay (`reference`, `teacher`): the same machinery without an optimizer."""

    model: str | None = None  # default: the policy's initial weights
    dtype: DType | None = None


class RewardRole(Section):
    """The pool of reward actors."""

    workers: Positive = 1
    cpus: Annotated[float, Field(ge=0)] = 0.5
    gpus: Annotated[float, Field(ge=0)] = 0.0
    concurrency: Positive = 4  # groups scored by one worker at a time
    timeout_s: Seconds = 60.0  # then the worker is killed, replaced, and the group tried again
    max_attempts: Positive = 3
    on_failure: Literal["drop", "abort"] = "drop"  # of a group whose attempts are used up; never a reward of zero
    colocate: str | None = None


class Fallback(Section):
    """Another choice of nodes, as Ray writes it. An empty selector takes every node."""

    label_selector: LabelSelector


class RolloutRole(Section):
    """The fleet of rollout workers; each has a placement group of its own and may join or leave at any time."""

    engine: str = "vllm"  # vllm | hf | scripted
    workers: Positive = 1
    gpus: Annotated[float, Field(ge=0)] = 0.0
    cpus: Annotated[float, Field(gt=0)] = 1.0
    threads: Positive | None = None
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    resources: dict[str, float] = Field(default_factory=dict)  # custom Ray resources
    label_selector: LabelSelector = Field(default_factory=dict)  # of the nodes that it may run on, e.g. {role: rollout}
    fallback_strategy: tuple[Fallback, ...] = ()  # if there is no room: tried in turn, each for placement_timeout_s
    tensor_parallel: Positive = 1
    dtype: DType | None = None  # default: the model's
    kv_cache_gib: Annotated[float, Field(gt=0)] = 0.25
    max_concurrency: Positive = 256  # sequences decoded by one worker at a time
    max_model_len: Positive | None = None  # default: the longest prompt allowed plus sampling.max_tokens
    engine_options: dict[str, Any] = Field(default_factory=dict)
    colocate: str | None = None
    start_timeout_s: Seconds = 300.0
    request_timeout_s: Seconds = 600.0
    max_attempts: Positive = 5  # per request, each on another worker if there is one
    max_restarts: Annotated[int, Field(ge=0)] = 100  # replacements of dead workers in a run


class RolesConfig(Section):
    """Sizes per role. Which roles are launched follows from the pipeline, not from here."""

    policy: TrainedRole = Field(default_factory=TrainedRole)
    reference: FrozenRole = Field(default_factory=FrozenRole)
    reward: RewardRole = Field(default_factory=RewardRole)
    rollout: RolloutRole = Field(default_factory=RolloutRole)


class WeightsConfig(Section):
    """How published weights reach the rollout workers."""

    transport: Literal["collective", "object_store", "disk"] = "collective"
    topology: Literal["each", "all"] = "each"  # collective: a broadcast for every worker, or one for all of them
    bucket_mib: Annotated[float, Field(gt=0)] = 4.0
    timeout_s: Seconds = 120.0
    dtype: DType | None = None  # on the wire; default: the rollout dtype


class CheckpointConfig(Section):
    every: Positive | None = None  # steps; None: only at the end of a phase
    keep: Positive = 2


class LoggingConfig(Section):
    every: Positive = 1
    completions_every: Positive | None = 10  # steps between two tables of sampled completions
    completions_shown: Positive = 4
    tensorboard: bool = True
    ray_metrics: bool = True


class ClusterConfig(Section):
    """Where Ray is. `address=None`: RAY_ADDRESS if set, else a local Ray of our own."""

    address: str | None = None
    num_cpus: Positive | None = None  # of the local Ray; default: what the plan needs, at least the machine's cores
    object_store_mib: Positive = 512
    dashboard: bool = False
    placement_timeout_s: Seconds = 30.0
    watchdog_s: Seconds = 30.0


class RunConfig(Section):
    """A whole run."""

    name: str = "run"
    seed: int = 0
    output: Path = Path("runs")
    model: ModelConfig = Field(default_factory=ModelConfig)
    phases: dict[str, PhaseConfig] = Field(min_length=1)
    rewards: tuple[RewardConfig, ...] = ()
    roles: RolesConfig = Field(default_factory=RolesConfig)
    weights: WeightsConfig = Field(default_factory=WeightsConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    debug: bool = False
