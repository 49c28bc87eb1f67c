"""How a run is continued: from which checkpoint, with which settings, and what must be as it was.

    config of the checkpoint ──┐
                               ├──► differences ──► refused with a remedy, or applied and recorded:
    config of the resume ──────┘                    in `config.json` for the next resume, and in `events.jsonl`

A setting may change unless the checkpoint has no meaning under another one. What may not is listed here; everything
else is read when the run is built, exactly as in a new run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from actors.errors import ConfigError, RunError
from orchestrator.checkpoint import MODEL, Checkpoint, CheckpointStore, RunState
from orchestrator.config.loading import SAVED
from orchestrator.config.overrides import leaves
from orchestrator.config.schema import RunConfig
from orchestrator.planning.resolve import Prepared, PreparedPhase, build_pipeline

_WEIGHTS = "the state in the checkpoint is that of the weights as they were"
_POSITIONS = "the checkpoint says which items were trained on by their positions, and they would be others"
FIXED = {  # keys of the run, and why; `*` stands for anything
    "seed": "it decides which items come next and how they are answered",
    "output": "a run stays in its folder",
    "model.path": _WEIGHTS,
    "model.dtype": _WEIGHTS,
    "model.lora": _WEIGHTS,
    "model.lora.[!d]*": _WEIGHTS,  # all but dropout
    "model.tokenizer": "the same rows would become other tokens",
    "model.chat_template": "the same rows would become other tokens",
}
FIXED_IN_PHASE = {  # keys of the phase that the checkpoint is in
    "method": "the checkpoint is in the middle of the phase",
    "data.*": _POSITIONS,
}
FREE_IN_PHASE = ("data.path", "data.cache_dir", "data.max_bad_rows")  # the rows must be the same, wherever they are

Changes = dict[str, tuple[Any, Any]]  # key -> (in the checkpoint, now)


@dataclass(frozen=True)
class Resumption:
    """A checkpoint that the run goes on from, and what is set otherwise since. `chosen`: by its step; those of later
    steps are given up."""

    checkpoint: Checkpoint
    changed: Changes
    chosen: bool

    @property
    def state(self) -> RunState:
        return self.checkpoint.state

    def nothing_to_train(self, prepared: Prepared) -> bool:
        last = prepared.phases[-1]
        return (self.state.phase_index, self.state.step) == (last.index, last.steps)

    def lines(self) -> Iterator[str]:
        yield f"resumed from step {self.state.total_step} ({self.checkpoint.path})"
        for key, (before, now) in self.changed.items():
            yield f"{key} is now {_shown(now)}; it was {_shown(before)}"


def resume_point(folder: Path, prepared: Prepared, step: int | None) -> Resumption:
    """The newest valid checkpoint of a run, or that of `step`. Raises ConfigError if there is none, or if it cannot be
    continued with this configuration; the message says what to do. Reads all of the checkpoint."""
    store = CheckpointStore(folder / "checkpoints", keep=prepared.config.checkpoint.keep)
    found = store.latest() if step is None else store.at(step)
    if found is None:
        raise ConfigError(f"{folder} holds no valid checkpoint to resume from: start again with `troupe run`")
    before = _config_of(found)
    changed = changes(before, prepared.config)
    problems = [*_refused(changed, found.state, prepared.config), *_impossible(found.state, before, prepared)]
    if problems:
        raise ConfigError(
            "\n  ".join([f"the run cannot go on from step {found.state.total_step} like this:", *problems])
            + f"\n  Or start a new run from the weights: `troupe run ... model.path={found.path / MODEL}`"
        )
    return Resumption(found, changed, chosen=step is not None)


def changes(before: RunConfig, now: RunConfig) -> Changes:
    """Every key whose value differs, with both values."""
    one, other = (dict(leaves(each.model_dump(mode="json"))) for each in (before, now))
    keys = dict.fromkeys([*one, *other])
    return {key: (one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)}


def save_config(folder: Path, config: RunConfig) -> None:
    """What `troupe resume` starts from; whole, or as it was before."""
    temporary = folder / f".{SAVED}.tmp"
    temporary.write_text(config.model_dump_json(indent=2))
    os.replace(temporary, folder / SAVED)


def fingerprint(phase: PreparedPhase) -> str:
    """Of the rows that a phase learns from, in their order; of a stream, of the first ones."""
    return phase.source.rows_fingerprint


def _refused(changed: Changes, state: RunState, now: RunConfig) -> Iterator[str]:
    """A line for each change that has no meaning, with the remedy."""
    names = list(now.phases)
    over, current = names[: state.phase_index], state.phase
    if names[state.phase_index : state.phase_index + 1] != [current]:
        yield f"phase {current} is number {state.phase_index + 1} of the run; leave the phases up to it as they were"
        return
    for key, (before, value) in changed.items():
        if why := why_fixed(key, current, over):
            remedy = "leave it out" if before is None else f"leave it at {_shown(before)}"
            yield f"{key} is {_shown(value)}, and was {_shown(before)}: {why}; {remedy}"
    train = now.phases[current].train
    if f"phases.{current}.train.batch_size" in changed and train.epochs is not None:
        yield (
            f"phases.{current}.train.batch_size has changed, and train.epochs={train.epochs:g} would count other steps "
            f"than were done; set phases.{current}.train.steps instead of epochs, or leave the batch size"
        )


def why_fixed(key: str, current: str, over: list[str]) -> str | None:
    """Why a key must be as in the checkpoint, which is in the phase `current` and has those of `over` behind it; None
    if it need not."""
    for name in over:
        if key.startswith(f"phases.{name}."):
            return f"phase {name} is over"
    found = next((why for pattern, why in FIXED.items() if fnmatchcase(key, pattern)), None)
    inside = key.removeprefix(f"phases.{current}.")
    if found or inside == key or inside in FREE_IN_PHASE:
        return found
    return next((why for pattern, why in FIXED_IN_PHASE.items() if fnmatchcase(inside, pattern)), None)


def _impossible(state: RunState, before: RunConfig, prepared: Prepared) -> Iterator[str]:
    """What cannot be seen in the keys alone."""
    if [phase.name for phase in prepared.phases[state.phase_index : state.phase_index + 1]] != [state.phase]:
        return
    phase = prepared.phases[state.phase_index]
    where = f"phases.{phase.name}"
    if phase.steps < state.step:
        yield (
            f"{where} would have {phase.steps} steps, and {state.step} are done: raise {where}.train.steps or epochs, "
            "or choose an earlier checkpoint with --step"
        )
    was = build_pipeline(before.phases[phase.name])
    if phase.pipeline.optimizer_steps_per_batch != was.optimizer_steps_per_batch:
        yield (
            f"{where}.options make {phase.pipeline.optimizer_steps_per_batch} optimizer steps of a batch, and made "
            f"{was.optimizer_steps_per_batch}, which the schedule has counted; leave those options as they were"
        )
    for role in phase.pipeline.mixed:
        if role not in was.mixed:
            yield (
                f"{where}.options would move the weights of {role}: the run that wrote this checkpoint did not, and "
                "saved none of them; leave those options as they were"
            )
    if prepared.config.phases[phase.name].train.bema is not None and before.phases[phase.name].train.bema is None:
        yield f"{where}.train.bema is set, and was not: the checkpoint holds no average to go on with; leave it out"
    if fingerprint(phase) != state.data:
        yield (
            f"the rows of {where}.data ({phase.source.report.source}) are not those that the checkpoint was trained "
            f"on: {_POSITIONS}; give it the data that it had"
        )


def _config_of(found: Checkpoint) -> RunConfig:
    try:
        return RunConfig.model_validate(found.state.config)
    except ValidationError as error:
        raise RunError(
            f"the checkpoint {found.path} has settings of another version of Troupe ({error.errors()[0]['loc']}): "
            "resume with the one that wrote it"
        ) from None


def _shown(value: Any) -> str:
    return "not set" if value is None else json.dumps(value)
