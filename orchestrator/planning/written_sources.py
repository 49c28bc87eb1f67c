"""The data of a phase that an earlier one makes: opened if it is there, awaited if not."""

# pyright: basic
# (tokenizers are typed in part only)

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.errors import ConfigError
from orchestrator.config.schema import DataConfig
from orchestrator.data.awaited import AwaitedSource, Made
from orchestrator.data.formats import carried
from orchestrator.data.parts import is_complete
from orchestrator.data.source import Source, open_source
from orchestrator.pipeline import DataKind
from orchestrator.planning.handover import is_handed_over, output_of, written_folder
from orchestrator.planning.prepared import PreparedPhase


def open_phase_source(
    data: DataConfig,
    kind: DataKind,
    tokenizer: Any,
    *,
    seed: int,
    room: int,
    where: str,
    before: Sequence[PreparedPhase],
    run: Path | None,
) -> Source:
    """The data of a phase. `where`: its key; `before`: the phases before it; `run`: the folder of the run, if there is
    one yet. Raises ConfigError for a path that stands for nothing, DataError for columns that cannot be used."""
    makers = [_maker(path, where, before) for path in _paths(data) if is_handed_over(path)]
    if not makers:
        return open_source(data, kind, tokenizer, seed=seed, model_max_length=room)
    if run is not None and all(is_complete(written_folder(run, maker.name)) for maker in makers):
        return open_source(in_folder(data, run), kind, tokenizer, seed=seed, model_max_length=room)
    return AwaitedSource(data, kind, [made_by(maker) for maker in makers], model_max_length=room)


def is_made(data: DataConfig) -> bool:
    """Whether a phase of the run makes the data, or a part of it."""
    return any(map(is_handed_over, _paths(data)))


def in_folder(data: DataConfig, run: Path) -> DataConfig:
    """The same with the paths of what was made."""

    def found(path: str) -> str:
        phase = output_of(path)
        return path if phase is None else str(written_folder(run, phase))

    mixture = tuple(entry.model_copy(update={"path": found(entry.path)}) for entry in data.mixture)
    return data.model_copy(update={"path": data.path and found(data.path), "mixture": mixture})


def made_by(phase: PreparedPhase) -> Made:
    """What is known of the data set that a phase will have made."""
    filled = phase.pipeline.written_columns
    beside = [name for name in carried(phase.source.report.columns) if name not in filled]
    prompt = phase.prompt_tokens(phase.source)
    return Made(phase.name, (*filled, *beside), prompt, prompt + phase.sampling.max_tokens)


def _paths(data: DataConfig) -> list[str]:
    return [path for path in (data.path, *(entry.path for entry in data.mixture)) if path is not None]


def _maker(path: str, where: str, before: Sequence[PreparedPhase]) -> PreparedPhase:
    making = {phase.name: phase for phase in before if phase.pipeline.written_columns}
    phase = making.get(output_of(path) or "")
    if phase is None:
        raise ConfigError(
            f"{where}.path={path}: it may be a file, a folder, a hub name, example:NAME, or ${{phases.NAME.output}} "
            f"with NAME one of {', '.join(making) or 'none: no phase before this one makes a data set'}"
        )
    return phase
