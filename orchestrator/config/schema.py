"""The configuration of a run: every key, its type, its range, its default and its line of help, in one place.

Files are YAML; `a.b=c` on the command line overrides (`overrides.py`). Everything is frozen. A key that does
not exist is an error that names the nearest one that does. A method's `options` are validated against the method's
own signature. `troupe keys` prints the string below each key; if a key has none, the first sentence of its section.

A run is one phase, or several in sequence that share the policy: a phase is a method with its data and its schedule.
A file with one phase writes `method`, `data`, `train` ... at the top level; a file with several writes `phases`, a
mapping from phase name to the same keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from actors.specs import LoraSpec, OptimSpec, Scheduler
from orchestrator.config.episode import EpisodeConfig
from orchestrator.config.rewards import RewardConfig
from orchestrator.config.roles import RolesConfig
from orchestrator.config.section import BelowOne, DType, FolderName, Fraction, Positive, Seconds, Section, Seed
from rollout.sampling import Sampling


def _not_zero(count: int) -> int:
    """The number, or ValueError for 0, which some engines read as none and some as all."""
    if count == 0:
        raise ValueError("-1 keeps all tokens, a number above 0 that many of the likeliest; 0 would keep none")
    return count


def _none_twice(names: tuple[str, ...]) -> tuple[str, ...]:
    twice = [name for place, name in enumerate(names) if name in names[:place]]
    if twice:
        raise ValueError(f"{twice[0]} is listed twice")
    return names


TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]  # see orchestrator/reporting/trackers/table.py


class LoraConfig(Section):
    """PEFT adapters; only they are trained."""

    r: Positive = LoraSpec.r
    """Rank of the adapters."""
    alpha: Annotated[float, Field(gt=0)] = LoraSpec.alpha
    """Scale of the adapters: their output is multiplied by alpha / r."""
    dropout: Fraction = LoraSpec.dropout
    """Dropout on the adapters' input while training."""
    target_modules: str | tuple[str, ...] = LoraSpec.target_modules
    """Names or suffixes of the linear layers that get an adapter, a pattern, or `all-linear`."""
    use_rslora: bool = LoraSpec.use_rslora
    """Scale by alpha / sqrt(r) instead of alpha / r."""
    use_dora: bool = LoraSpec.use_dora
    """Weight-decomposed adapters (DoRA): magnitude and direction of each weight are trained separately."""


class ModelConfig(Section):
    """A causal language model: a folder, a hub name, or `example:NAME` for one that Troupe generates from the seed."""

    path: str = "example:arithmetic"
    """A folder, a hub name, or `example:NAME`."""
    tokenizer: str | None = None
    """A folder or hub name of another tokenizer. Default: the model's own."""
    dtype: DType = "float32"
    """Type in which the weights are held and trained."""
    lora: LoraConfig | None = None
    """Train adapters instead of the weights; `{}` takes the defaults. None: train all weights."""
    attention_dtype: Literal["bfloat16"] | None = None
    """Type of queries, keys and values in attention: bfloat16 has the fast kernel on GPUs. None: the model's."""
    fused_kernels: bool | None = None
    """Fused kernels for norms, activations, rotary positions, head. None: on a GPU; true: demand them; false: none."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    neftune_noise_alpha: Annotated[float, Field(ge=0)] = 0.0
    """Magnitude of the noise added to the embeddings in training (NEFTune); 0: none."""
    router_aux_loss_coef: float | None = None
    """Weight of the load-balancing loss of a mixture-of-experts model. None: the model's own value."""
    chat_template: str | None = None
    """A Jinja file that replaces the tokenizer's chat template."""
    lm_head_fp32: bool = False
    """Compute logits in float32 whatever `dtype` is, in training and in rollout (arXiv:2506.13585)."""
    trust_remote_code: bool = False
    """Run Python code from the model's folder."""


class MixtureEntry(Section):
    """One data set of a mixture."""

    path: str
    """Hub name, file, folder or `example:NAME`."""
    fraction: Annotated[float, Field(gt=0)]
    """Share of this data set in the mixture, relative to the others' fractions."""
    split: str = "train"
    """Which split of this data set."""


class DataConfig(Section):
    """A data set: hub name, file (JSONL, JSON, CSV, Parquet, Arrow, text), folder, `example:NAME`, or a mixture."""

    path: str | None = None
    """Hub name, file, folder or `example:NAME`; this or `mixture`."""
    mixture: tuple[MixtureEntry, ...] = ()
    """Several data sets, interleaved; instead of `path`."""
    split: str = "train"
    """Which split of the data set."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Renames columns: our name -> the data set's name, e.g. {chosen: better}."""
    max_length: Positive | None = None
    """Maximum tokens of prompt and completion; `truncation` decides what happens to longer rows."""
    max_prompt_length: Positive | None = None
    """Maximum tokens of the prompt; `truncation` decides what happens to rows with a longer one."""
    truncation: Literal["keep_start", "keep_end", "drop", "error"] | None = None
    """Rows that are too long: truncate, drop or refuse. Default: `keep_start`; `drop` if a method scores rows."""
    packing: Literal["none", "bfd", "bfd_split", "wrapped"] = "none"
    """Several examples per row: best-fit decreasing, the same with long examples split, or one stream cut into rows."""
    completion_only: bool | None = None
    """Train on completions only. None: true if the data has a prompt column."""
    assistant_only: bool = False
    """In conversations, train on the assistant's turns only."""
    append_eos: bool = True
    """End rows that are not conversations with the end-of-sequence token."""
    shuffle: bool = True
    """Draw rows in random order, which the seed decides and which differs in every epoch."""
    streaming: bool = False
    """Read rows during training instead of all of them before it."""
    max_bad_rows: Annotated[int, Field(ge=0)] = 0
    """How many unusable rows are skipped before the data is refused."""
    limit: Positive | None = None
    """Use only that many rows."""
    cache_dir: Path | None = None
    """Where tokenised data is cached. Default: Troupe's own cache folder."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of `example:NAME`, or of datasets.load_dataset."""


class BemaConfig(Section):
    """A bias-corrected moving average of the trained weights (arXiv:2508.00180), saved as `bema/` beside `model/`.
    Steps are optimizer steps of the phase."""

    update_freq: Positive = 400
    """Steps from one average to the next."""
    ema_power: Annotated[float, Field(ge=0)] = 0.5
    """Exponent of the average's decay: the weight of new values is proportional to steps^-ema_power."""
    bias_power: Annotated[float, Field(ge=0)] = 0.2
    """Exponent of the bias correction, which is proportional to steps^-bias_power."""
    lag: Annotated[float, Field(ge=1)] = 10.0
    """Added to the steps in both expressions."""
    multiplier: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the steps in both expressions."""
    update_after: Annotated[int, Field(ge=0)] = 0
    """The step whose weights the average starts from."""
    min_ema_multiplier: Fraction = 0.0
    """Lower bound of the weight of new values in the average."""


DEFAULT_TOKEN_BUDGET = 8192  # for a CPU; `planning/token_budget.py` chooses for GPUs


class TrainConfig(Section):
    """The schedule of a phase. `batch_size` counts items of the data set per optimizer step: prompts, examples,
    pairs."""

    steps: Positive | None = None
    """Optimizer steps of the phase; this or `epochs`."""
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Passes over the data; this or `steps`."""
    batch_size: Positive = 32
    """Items of the data set per optimizer step: prompts, examples, pairs."""
    token_budget: Positive | None = None
    """Tokens per micro-batch and rank. None: 8192; if all models are on GPUs, as many as their memory holds."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """Learning rate of AdamW at the end of the warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = OptimSpec.weight_decay
    """Decoupled weight decay of AdamW."""
    adam_betas: tuple[BelowOne, BelowOne] = OptimSpec.adam_betas
    """Decay rates of AdamW's first and second moment."""
    adam_eps: Annotated[float, Field(gt=0)] = OptimSpec.adam_eps
    """Added to AdamW's denominator."""
    scheduler: Scheduler = OptimSpec.scheduler
    """How the learning rate changes from the end of the warm-up to the last step."""
    warmup_steps: Annotated[int, Field(ge=0)] = OptimSpec.warmup_steps
    """Steps in which the learning rate rises from 0."""
    min_lr_ratio: Fraction = OptimSpec.min_lr_ratio
    """Learning rate at the end of the schedule, as a fraction of `learning_rate`."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = OptimSpec.max_grad_norm
    """Longer gradients are scaled to this norm. None: no limit."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """How many optimizer steps older than the trained weights a sample may be; 0 is synchronous training."""
    deterministic: bool = False
    """The same bits each time on a GPU, too, in all phases of the run; a resumed run is then exact; slower."""
    bema: BemaConfig | None = None
    """Average the weights; `{}` takes the defaults. None: no average."""

    @property
    def micro_batch_tokens(self) -> int:
        """`token_budget`, or the default."""
        return self.token_budget or DEFAULT_TOKEN_BUDGET


class SamplingConfig(Section):
    """How completions are drawn in a phase that generates."""

    max_tokens: Positive = 256
    """Maximum tokens of a completion; of an episode, all tokens after the prompt, answers of tools included."""
    temperature: Annotated[float, Field(ge=0)] = Sampling.temperature
    """0 is greedy; 1 samples from the model's distribution."""
    top_p: Annotated[float, Field(gt=0, le=1)] = Sampling.top_p
    """Sample from the smallest set of likeliest tokens whose total probability reaches this; 1: from all."""
    top_k: Annotated[int, Field(ge=-1), AfterValidator(_not_zero)] = Sampling.top_k
    """Sample from that many likeliest tokens; -1: from all."""
    min_p: Fraction = Sampling.min_p
    """Sample from tokens at least this likely, relative to the likeliest; 0: from all."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Sampling.stop
    """Texts that end a completion."""
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = Sampling.stop_token_ids
    """Tokens that end a completion, in addition to the end-of-sequence token."""
    replay_routing: bool = Sampling.replay_routing
    """Record which experts each token was sent to, and send it to the same in training (mixture of experts)."""
    replay_truncation: bool = Sampling.replay_truncation
    """Record which tokens top_k, top_p and min_p left, and train the distribution over the same; needs top_k."""


class EvaluationConfig(Section):
    """Evaluation on held-out data at a phase's start and end, and in between. `data`: prompts, answered greedily and
    scored by the run's rewards. `rows`: rows like those of the phase's training data; its loss and metrics on them,
    without an update. One of the two, or both."""

    data: DataConfig | None = None
    """Prompts, answered greedily and scored by the run's rewards."""
    rows: DataConfig | None = None
    """Rows like those of the phase's training data; its loss and metrics on them, without an update."""
    every: Positive | None = None
    """Steps between two evaluations. None: only at the start and the end of the phase."""
    max_tokens: Positive | None = None
    """Maximum tokens of an answer. Default: the phase's sampling.max_tokens."""
    at_start: bool = True
    """Evaluate before the first step, too."""


ENVIRONMENT = "environment"  # the role that hosts the environments of episodes


class PhaseConfig(Section):
    """One method on one data set with one schedule."""

    method: str = "grpo"
    """Which method trains; see `troupe methods`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The method's own options; `troupe methods NAME` lists them."""
    rename_roles: dict[str, str] = Field(default_factory=dict)
    """Replaces roles of the method: {policy: tutor} trains the role `tutor`."""
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    episode: EpisodeConfig | None = None
    """Samples of several turns, with tools or an environment. None: a completion is one turn."""
    evaluation: EvaluationConfig | None = None
    """Evaluation on held-out data. None: none."""

    @property
    def environments(self) -> str | None:
        """The role that hosts the phase's episodes, if there are any."""
        return None if self.episode is None else self.rename_roles.get(ENVIRONMENT, ENVIRONMENT)


class RoundsConfig(Section):
    """Phases that repeat, one after the other. Phase NAME of round 2 is called NAME-2; `${round}` in a text of such a
    phase is the number of its round."""

    count: Positive
    """How many rounds there are."""
    phases: tuple[str, ...] = Field(min_length=1)
    """Names of the phases that repeat, in their order."""


class WeightsConfig(Section):
    """How published weights reach the rollout workers."""

    transport: Literal["collective", "object_store", "disk"] | None = None
    """Broadcast, Ray's object store, or files. None: collective; object_store between colocated roles."""
    bucket_mib: Annotated[float, Field(gt=0)] | None = None
    """Size of the buckets in which weights are sent. None: 256 where both ends have GPUs, else 16."""
    timeout_s: Seconds = 120.0
    """Deadline of one transfer. Engines that a lost one has cut off from it get another."""
    dtype: DType | None = None
    """Type in which weights are sent. Default: the rollout's dtype."""
    lora: Literal["adapter", "merged"] | None = None
    """With model.lora: send adapters alone, or merged into the weights. None: alone where the engine takes them."""


class CheckpointConfig(Section):
    """When the state of a run is saved."""

    every: Positive | None = None
    """Steps between two checkpoints. None: only at the end of a phase; each step of a phase that trains nothing."""
    keep: Positive = 2
    """How many of the newest checkpoints are kept."""
    grace_s: Seconds = 15.0
    """After SIGTERM, SIGHUP or Ctrl-C: time for the current step and a checkpoint before the run is ended."""


class LoggingConfig(Section):
    """What a run logs, and how often."""

    every: Positive = 1
    """Steps between two lines of metrics, in the file and on the console."""
    completions_every: Positive | None = 10
    """Steps between two tables of sampled completions. None: none."""
    completions_shown: Positive = 4
    """Samples in a table of completions."""
    token_samples: Positive | None = 64
    """Samples of a step whose tokens are kept, with mask, log-probabilities and advantages. None: none."""
    token_length: Positive = 1024
    """Tokens that are kept of each of them; of a longer one most of the prompt is left out, and the end."""
    token_steps: Positive = 100
    """Steps whose tokens are kept, the newest ones: what they take on the disk is bounded."""
    trackers: Annotated[tuple[TrackerName, ...], AfterValidator(_none_twice)] = ("tensorboard",)
    """Where the metrics go besides metrics.jsonl. Each of them is a library of its own (docs/trackers.md)."""
    project: Annotated[str, Field(min_length=1)] = "troupe"
    """The project of W&B and Trackio, or MLflow's experiment, that the run belongs to."""
    curves: bool = True
    """Draw RUN/curves.png when the run ends, which takes a second or two of processor time."""
    ray_metrics: bool = True
    """Export gauges `ray_troupe_*` on Ray's metrics port."""
    ray_logs: Literal["json", "text"] = "json"
    """Form of what workers log, in Ray's files: JSON lines name job, actor and task. With `debug` it is text."""
    ray_train_tab: bool = False
    """Show the run in the Train tab of Ray's dashboard, by private classes of Ray; a small actor of Ray's own stays."""


class ClusterConfig(Section):
    """The Ray to use. `address=None`: RAY_ADDRESS if set, else the run starts a local Ray."""

    address: str | None = None
    """HOST:PORT of a running Ray. None: RAY_ADDRESS if set, else the run starts a Ray."""
    num_cpus: Positive | None = None
    """CPUs of a Ray that the run starts. Default: those of the plan, at least the machine's cores."""
    object_store_mib: Positive = 512
    """Size of the object store of a Ray that the run starts."""
    dashboard: bool = False
    """Whether a Ray that the run starts has a dashboard."""
    placement_timeout_s: Seconds = 30.0
    """How long to wait for room for all roles."""
    gpu_memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory of each GPU, by which train.token_budget is chosen. None: that of this machine's smallest."""
    watchdog_s: Seconds = 30.0
    """Waits longer than this are reported on the console."""


class RunConfig(Section):
    """A whole run."""

    name: FolderName = "run"
    """First part of the name of the run's folder."""
    seed: Seed = 0
    """Seed of everything random: order of data, samples, weights of example models."""
    output: Path = Path("runs")
    """The folder in which the run's folder is created."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    phases: dict[FolderName, PhaseConfig] = Field(min_length=1)
    """Phase name -> its method, data and schedule. A file with one phase writes those keys at the top level."""
    rounds: RoundsConfig | None = None
    """Phases that repeat. None: each phase runs once."""
    rewards: tuple[RewardConfig, ...] = ()
    """The reward of a completion is the weighted sum of these."""
    roles: RolesConfig = Field(default_factory=lambda: RolesConfig())  # pyright: ignore[reportCallIssue]
    weights: WeightsConfig = Field(default_factory=WeightsConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    debug: bool = False
    """Print the output of Ray and of every process."""
