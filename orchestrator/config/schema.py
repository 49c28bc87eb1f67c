"""The configuration of a run: every key, its type, its range, its default and its line of help, in one place.

Files are YAML; `a.b=c` on the command line overrides (`overrides.py`). Everything is frozen. A key that does
not exist is an error that names the nearest one that does. A method's `options` are validated against the method's
own signature. `troupe keys` prints the string below each key; of a key without one, its section's first sentence.

A run is one phase, or several in sequence that share the policy: a phase is a method with its data and its schedule.
A file with one phase writes `method`, `data`, `train` ... at the top level; a file with several writes `phases`, a
mapping from phase name to the same keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from actors.specs import LoraSpec, OptimSpec, Scheduler
from orchestrator.config.roles import RolesConfig
from orchestrator.config.section import BelowOne, DType, FolderName, Fraction, Positive, Seconds, Section, Seed
from rollout.sampling import Sampling


def _not_zero(count: int) -> int:
    """The number, or ValueError for 0, which some engines take for none and some for all."""
    if count == 0:
        raise ValueError("-1 keeps all tokens, and a number above 0 the likeliest; 0 would keep none")
    return count


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
    """Weight-decomposed adapters (DoRA): direction and length of each weight apart."""


class ModelConfig(Section):
    """A causal language model: a folder, a hub name, or `example:NAME` for one that Troupe makes itself, seeded."""

    path: str = "example:arithmetic"
    """A folder, a hub name, or `example:NAME`."""
    tokenizer: str | None = None
    """A folder or hub name of another tokenizer. Default: the model's own."""
    dtype: DType = "float32"
    """Type in which the weights are held and trained."""
    lora: LoraConfig | None = None
    """Train adapters instead of the weights; `{}` takes the defaults. None: train all weights."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    neftune_noise_alpha: Annotated[float, Field(ge=0)] = 0.0
    """Size of the noise added to the embeddings in training (NEFTune); 0: none."""
    router_aux_loss_coef: float | None = None
    """Weight of a mixture-of-experts model's balancing loss. None: the model's own value."""
    chat_template: str | None = None
    """A Jinja file that takes the place of the tokenizer's chat template."""
    trust_remote_code: bool = False
    """Run the Python code that a model's folder brings with it."""


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
    """Several data sets, interleaved; in the place of `path`."""
    split: str = "train"
    """Which split of the data set."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Renames columns: our name -> the data set's name, e.g. {chosen: better}."""
    max_length: Positive | None = None
    """Tokens of prompt and completion; what is longer is handled as `truncation` says."""
    max_prompt_length: Positive | None = None
    """Tokens of the prompt; a row with a longer one is handled as `truncation` says."""
    truncation: Literal["keep_start", "keep_end", "drop", "error"] | None = None
    """Rows too long: cut, left out or refused. Default: `keep_start`; `drop` for methods that judge whole rows."""
    packing: Literal["none", "bfd", "bfd_split", "wrapped"] = "none"
    """Rows of several examples: best-fit decreasing, the same with long rows split, or one stream cut up."""
    completion_only: bool | None = None
    """Learn from completions alone. None: true exactly when the data has a prompt column."""
    assistant_only: bool = False
    """In conversations, learn from the assistant's turns alone."""
    append_eos: bool = True
    """End rows that are not conversations with the end-of-sequence token."""
    shuffle: bool = True
    """Draw rows in an order that the seed decides, another in every epoch."""
    streaming: bool = False
    """Read rows while training goes on, not all of them first."""
    max_bad_rows: Annotated[int, Field(ge=0)] = 0
    """How many unusable rows are passed over before the data is refused."""
    limit: Positive | None = None
    """Use only that many rows."""
    cache_dir: Path | None = None
    """Where tokenised data is kept. Default: Troupe's own cache folder."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of `example:NAME`, or of datasets.load_dataset."""


class BemaConfig(Section):
    """A bias-corrected moving average of the trained weights (arXiv:2508.00180), saved as `bema/` beside `model/`.
    Steps are optimizer steps of the phase."""

    update_freq: Positive = 400
    """Steps from one average to the next."""
    ema_power: Annotated[float, Field(ge=0)] = 0.5
    """Exponent of the average's decay: the new weights' share falls with steps^-ema_power."""
    bias_power: Annotated[float, Field(ge=0)] = 0.2
    """Exponent of the bias correction: its share falls with steps^-bias_power."""
    lag: Annotated[float, Field(ge=1)] = 10.0
    """Added to the steps in both shares."""
    multiplier: Annotated[float, Field(ge=0)] = 1.0
    """Factor on the steps in both shares."""
    update_after: Annotated[int, Field(ge=0)] = 0
    """The step whose weights the average starts from."""
    min_ema_multiplier: Fraction = 0.0
    """The least share that new weights have in the average."""


class TrainConfig(Section):
    """The schedule of a phase. `batch_size` counts items of the data set per optimizer step: prompts, examples,
    pairs."""

    steps: Positive | None = None
    """Optimizer steps of the phase; this or `epochs`."""
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Passes over the data; this or `steps`."""
    batch_size: Positive = 32
    """Items of the data set per optimizer step: prompts, examples, pairs."""
    token_budget: Positive = 8192
    """Tokens per micro-batch and rank; the batch is cut into as many as it takes."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """Learning rate of AdamW when the warm-up is over."""
    weight_decay: Annotated[float, Field(ge=0)] = OptimSpec.weight_decay
    """Decoupled weight decay of AdamW."""
    adam_betas: tuple[BelowOne, BelowOne] = OptimSpec.adam_betas
    """Decay rates of AdamW's first and second moment."""
    adam_eps: Annotated[float, Field(gt=0)] = OptimSpec.adam_eps
    """Added to AdamW's denominator."""
    scheduler: Scheduler = OptimSpec.scheduler
    """How the learning rate goes from the warm-up's end to the last step."""
    warmup_steps: Annotated[int, Field(ge=0)] = OptimSpec.warmup_steps
    """Steps in which the learning rate rises from 0."""
    min_lr_ratio: Fraction = OptimSpec.min_lr_ratio
    """Where the schedule ends, as a share of `learning_rate`."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = OptimSpec.max_grad_norm
    """Longer gradients are scaled to this norm. None: no limit."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps that a token may lag behind the weights it trains; 0 is synchronous training."""
    bema: BemaConfig | None = None
    """Average the weights; `{}` takes the defaults. None: no average."""


class SamplingConfig(Section):
    """How completions are drawn in a phase that generates."""

    max_tokens: Positive = 256
    """Tokens of a completion at most."""
    temperature: Annotated[float, Field(ge=0)] = Sampling.temperature
    """0 is greedy; 1 samples from the model's distribution."""
    top_p: Annotated[float, Field(gt=0, le=1)] = Sampling.top_p
    """Sample from the fewest likeliest tokens that hold this probability together; 1: from all."""
    top_k: Annotated[int, Field(ge=-1), AfterValidator(_not_zero)] = Sampling.top_k
    """Sample from that many likeliest tokens; -1: from all."""
    min_p: Fraction = Sampling.min_p
    """Sample from tokens at least this likely, relative to the likeliest; 0: from all."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Sampling.stop
    """Texts that end a completion."""
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = Sampling.stop_token_ids
    """Tokens that end a completion, besides the end-of-sequence token."""


class RewardConfig(Section):
    """One reward: a function (`fn`), or the score of a role's model (`role`)."""

    fn: str | None = None
    """A shipped reward's name, `package.module:function` or `path/to/file.py:function`."""
    role: str | None = None
    """Instead of `fn`: the role whose model scores prompt and completion with one number."""
    weight: float = 1.0
    """Factor of this reward in the sum."""
    name: str | None = None
    """Its name in metrics. Default: the function's."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function."""

    @model_validator(mode="after")
    def _one_of_two(self) -> RewardConfig:
        if (self.fn is None) == (self.role is None):
            raise ValueError("a reward is a function (fn: NAME) or a model's score (role: NAME), one of the two")
        if self.role is not None and self.options:
            raise ValueError("options are keyword arguments of a function (fn); a model's score (role) takes none")
        return self


class EvaluationConfig(Section):
    """What is measured on held-out data at a phase's start and end, and in between. `data`: prompts, answered greedily
    and scored by the run's rewards. `rows`: rows as the phase learns from them; its loss and metrics, without learning.
    One of the two, or both."""

    data: DataConfig | None = None
    """Prompts, answered greedily and scored by the run's rewards."""
    rows: DataConfig | None = None
    """Rows as the phase learns from them; its loss and metrics, without learning."""
    every: Positive | None = None
    """Steps between two evaluations. None: only at the start and the end of the phase."""
    max_tokens: Positive | None = None
    """Tokens of an answer at most. Default: the phase's sampling.max_tokens."""
    at_start: bool = True
    """Evaluate before the first step, too."""


class PhaseConfig(Section):
    """One method on one data set with one schedule."""

    method: str = "grpo"
    """Which method trains; see `troupe methods`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The method's own options; `troupe methods NAME` lists them."""
    rename_roles: dict[str, str] = Field(default_factory=dict)
    """Other roles in the places of the method's: {policy: tutor} trains the role `tutor`."""
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig | None = None
    """What is measured on held-out data; None: nothing."""


class WeightsConfig(Section):
    """How published weights reach the rollout workers."""

    transport: Literal["collective", "object_store", "disk"] = "collective"
    """Broadcast between processes (NCCL, gloo), Ray's object store, or files."""
    topology: Literal["each", "all"] = "each"
    """Of collective transport: a broadcast for every worker, or one for all of them."""
    bucket_mib: Annotated[float, Field(gt=0)] = 4.0
    """Size of the pieces in which weights travel."""
    timeout_s: Seconds = 120.0
    """Deadline of one publication."""
    dtype: DType | None = None
    """Type in which weights travel. Default: the rollout's dtype."""


class CheckpointConfig(Section):
    """When the state of a run is saved."""

    every: Positive | None = None
    """Steps between two checkpoints. None: only at the end of a phase."""
    keep: Positive = 2
    """How many of the newest checkpoints are kept."""
    grace_s: Seconds = 15.0
    """After SIGTERM, SIGHUP or Ctrl-C: time for the step under way and a checkpoint, before the run is ended."""


class LoggingConfig(Section):
    """What a run writes down and shows."""

    every: Positive = 1
    """Steps between two lines of metrics, in the file and on the console."""
    completions_every: Positive | None = 10
    """Steps between two tables of sampled completions. None: none."""
    completions_shown: Positive = 4
    """Samples in a table of completions."""
    tensorboard: bool = True
    """Write TensorBoard's event files."""
    ray_metrics: bool = True
    """Export gauges `ray_troupe_*` on Ray's metrics port."""


class ClusterConfig(Section):
    """Where Ray is. `address=None`: RAY_ADDRESS if set, else a local Ray of our own."""

    address: str | None = None
    """HOST:PORT of a running Ray. None: RAY_ADDRESS if set, else a Ray of our own."""
    num_cpus: Positive | None = None
    """CPUs of a Ray of our own. Default: what the plan needs, at least the machine's cores."""
    object_store_mib: Positive = 512
    """Size of the object store of a Ray of our own."""
    dashboard: bool = False
    """Whether a Ray of our own has a dashboard."""
    placement_timeout_s: Seconds = 30.0
    """How long to wait for room for all roles."""
    watchdog_s: Seconds = 30.0
    """A wait is reported on the console after that long."""


class RunConfig(Section):
    """A whole run."""

    name: FolderName = "run"
    """The run's folder begins with it."""
    seed: Seed = 0
    """Decides everything that is drawn: order of data, samples, weights of example models."""
    output: Path = Path("runs")
    """The folder in which the run's folder is made."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    phases: dict[FolderName, PhaseConfig] = Field(min_length=1)
    """Phase name -> its method, data and schedule. A file with one phase writes those keys at the top level."""
    rewards: tuple[RewardConfig, ...] = ()
    """What a completion is worth: the weighted sum of these."""
    roles: RolesConfig = Field(default_factory=lambda: RolesConfig())  # pyright: ignore[reportCallIssue]
    weights: WeightsConfig = Field(default_factory=WeightsConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    debug: bool = False
    """Show the output of Ray and of every process."""
