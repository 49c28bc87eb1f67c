"""Everything that can be wrong with a run is found here, before an actor starts: method and options, model folder,
tokenizer, data sets, rewards, batch sizes."""

# pyright: basic
# (tokenizers and model configurations are typed in part only)

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from actors.errors import ConfigError, ModelError
from orchestrator.config import DataConfig, EvaluationConfig, PhaseConfig, RunConfig
from orchestrator.examples import PREFIX, is_example, model_folder
from orchestrator.methods import build
from orchestrator.pipeline import Pipeline, Prompts, Stage
from orchestrator.precompute import recall
from orchestrator.source import RowSource, Source, open_source
from rewards.loading import RewardSpec, check_columns, check_reward
from rollout.sampling import Sampling

UNBOUNDED = 2**31  # of a model that does not say how far its positions reach


@dataclass(frozen=True)
class PreparedPhase:
    """A phase whose pipeline closes and whose data is open."""

    name: str
    index: int
    config: PhaseConfig
    pipeline: Pipeline
    source: Source
    evaluation: Source | None
    steps: int
    sampling: Sampling
    first_version: int  # of the policy's weights when the phase begins
    kept: tuple[Path, ...] = ()  # folders of columns that were computed for the whole data set

    @property
    def temperature(self) -> float:
        """Log-probabilities are taken at the sampling temperature; at 1 where nothing is sampled, or greedily."""
        return (self.sampling.temperature or 1.0) if self.pipeline.generates else 1.0

    def given(self, stage: Stage, values: NDArray[Any], folder: Path) -> PreparedPhase:
        """The phase with what a stage would write, so that it need not run: `values` for each token of the data."""
        assert isinstance(self.source, RowSource)
        (column,) = stage.writes
        source = self.source.with_column(column, values, f"{column} of every row from the cache, {folder}")
        return replace(self, pipeline=self.pipeline.given(stage), source=source, kept=(*self.kept, folder))


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to be planned and placed."""

    config: RunConfig
    model: str  # folder or hub name
    tokenizer_path: str
    tokenizer: Any
    phases: tuple[PreparedPhase, ...]
    rewards: tuple[RewardSpec, ...]
    parameters: int | None

    @property
    def generates(self) -> bool:
        return any(phase.pipeline.generates or phase.evaluation for phase in self.phases)

    @property
    def scores(self) -> bool:
        return bool(self.rewards) and self.generates

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and completion that a rollout worker may see."""
        longest = [0]
        for phase in self.phases:
            limit = max(phase.sampling.max_tokens, _evaluation_tokens(phase))
            for source in (phase.source if phase.pipeline.generates else None, phase.evaluation):
                if source is not None:
                    longest.append(source.report.longest + limit)
        return max(longest)


def prepare(config: RunConfig, *, output: Path | None = None) -> Prepared:
    """Resolve and open everything that a run names. Raises ConfigError, ModelError or DataError."""
    pipelines = {name: build_pipeline(phase) for name, phase in config.phases.items()}
    rewards = tuple(check_reward(reward) for reward in config.rewards)
    model = resolve_model(config.model.path, config.seed)
    tokenizer_path = config.model.tokenizer or model
    tokenizer = load_tokenizer(tokenizer_path, config.model.chat_template, config.model.trust_remote_code)
    room = model_length(model)
    phases: list[PreparedPhase] = []
    for name, pipeline in pipelines.items():
        phase = _prepare_phase(config, name, pipeline, tokenizer, room, phases)
        phases.append(recall(config, model, phase))
    prepared = Prepared(config, model, tokenizer_path, tokenizer, tuple(phases), rewards, count_parameters(model))
    _check_rewards(prepared)
    return prepared


def build_pipeline(phase: PhaseConfig) -> Pipeline:
    return build(phase.method, phase.options, {"max_completion_length": phase.sampling.max_tokens})


def resolve_model(path: str, seed: int) -> str:
    """`example:NAME` becomes the folder of a model made here; what looks like a path must be one."""
    if is_example(path):
        return str(model_folder(path.removeprefix(PREFIX), seed))
    folder = Path(path).expanduser()
    looks_local = path.startswith((".", "/", "~")) or folder.exists()
    if looks_local and not (folder / "config.json").is_file():
        found = sorted(entry.name for entry in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
        raise ModelError(f"model.path={path!r} is not a model folder: it has no config.json (found: {found})")
    return str(folder) if looks_local else path


def load_tokenizer(path: str, chat_template: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"no tokenizer at {path!r}: {str(error).splitlines()[0]}; set model.tokenizer") from None
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text()
        except OSError as error:
            raise ConfigError(f"model.chat_template={chat_template!r} cannot be read: {error.strerror}") from None
    return tokenizer


def count_parameters(model: str) -> int | None:
    """From the headers of a folder's safetensors files; None where there are none to read."""
    total = 0
    for file in Path(model).glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total or None


def model_length(model: str) -> int:
    """Tokens that the model's positions reach to."""
    from transformers import AutoConfig

    return int(getattr(AutoConfig.from_pretrained(model), "max_position_embeddings", UNBOUNDED))


def _prepare_phase(
    config: RunConfig, name: str, pipeline: Pipeline, tokenizer: Any, room: int, before: list[PreparedPhase]
) -> PreparedPhase:
    phase = config.phases[name]
    source = open_source(phase.data, pipeline.data, tokenizer, seed=config.seed, model_max_length=room)
    steps = phase_steps(phase, name, source)
    evaluation = _open_evaluation(phase.evaluation, tokenizer, config.seed, room)
    first_version = sum(earlier.steps for earlier in before)
    sampling = Sampling(**phase.sampling.model_dump())
    return PreparedPhase(name, len(before), phase, pipeline, source, evaluation, steps, sampling, first_version)


def phase_steps(phase: PhaseConfig, name: str, source: Source) -> int:
    """Optimizer steps of a phase: `train.steps`, or as many as `train.epochs` passes over the data take."""
    where, train = f"phases.{name}.train", phase.train
    items = None if phase.data.streaming else len(source)  # a stream does not know its length
    if items is not None and train.batch_size > items:
        raise ConfigError(
            f"{where}.batch_size={train.batch_size} is more than the {items} items of {phase.data.path!r}; "
            "lower it or give more data"
        )
    if train.steps is not None:
        if train.epochs is not None:
            raise ConfigError(f"{where} sets both steps={train.steps} and epochs={train.epochs:g}; keep one")
        return train.steps
    if train.epochs is None:
        raise ConfigError(f"{where} sets neither steps nor epochs; set one, e.g. {where}.steps=100")
    if items is None:
        raise ConfigError(f"{where}.epochs={train.epochs:g} of a stream cannot be counted; set {where}.steps")
    return max(1, int(items * train.epochs) // train.batch_size)


def _open_evaluation(evaluation: EvaluationConfig | None, tokenizer: Any, seed: int, room: int) -> Source | None:
    if evaluation is None:
        return None
    data: DataConfig = evaluation.data.model_copy(update={"shuffle": False})
    return open_source(data, Prompts, tokenizer, seed=seed, model_max_length=room)


def _evaluation_tokens(phase: PreparedPhase) -> int:
    return (phase.config.evaluation.max_tokens or 0) if phase.config.evaluation else 0


def _check_rewards(prepared: Prepared) -> None:
    """Every data set that is scored has rewards, and the columns that they ask for."""
    for phase in prepared.phases:
        scored = {"its data": phase.source} if any(stage.role == "reward" for stage in phase.pipeline) else {}
        if phase.evaluation is not None:
            scored["its evaluation data"] = phase.evaluation
        if scored and not prepared.rewards:
            raise ConfigError(
                f"phase {phase.name} scores completions, but the run has no rewards; "
                "add some, for example rewards: [{fn: exact_match}]"
            )
        for what, source in scored.items():
            check_columns(prepared.rewards, source.report.columns, f"phase {phase.name}, {what}")
