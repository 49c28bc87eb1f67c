"""The weights of a phase: what its roles hold when it begins, from a model, from an earlier phase or from a checkpoint,
and what a checkpoint and a finished phase leave of them.

    checkpoints/step-N/   ROLE/ state of a trained role, model/ of the first one, models/ROLE/ of the others
    references/PHASE/     ROLE/ a trained role as the phase found it
    phases/PHASE/         what the finished phase leaves to later ones: ROLE/ state, model/
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from actors.checkpoint_parts import Part
from actors.errors import ConfigError
from actors.saved_state import Seal
from actors.worker import all_or_first_error
from orchestrator.checkpoint import ADAPTER, AVERAGED, MODEL, Checkpoint
from orchestrator.cluster.launch import average_spec, model_spec, optim_spec
from orchestrator.config.roles import FrozenRole
from orchestrator.config.schema import RunConfig
from orchestrator.executor import Executor
from orchestrator.planning.handover import kept_folder, phase_of
from orchestrator.planning.prepared import Prepared, PreparedPhase

SAVE_TIMEOUT_S = 1800.0


def reference_folder(run: Path, phase: PreparedPhase) -> Path:
    """Trained roles as a phase after the first one found them."""
    return run / "references" / phase.name


async def set_weights(
    prepared: Prepared, run: Path, phase: PreparedPhase, roles: Executor, found: Checkpoint | None
) -> None:
    """What roles hold when the phase begins, trained ones aside that the phase goes on with."""
    if found is not None:
        await _restore(prepared.phases[: phase.index], run, roles, tuple(roles.groups))
    await _start_handed_over(prepared, run, phase, roles)
    await _set_copies(prepared.config, reference_folder(run, phase), phase, roles, resumed=found is not None)
    await _set_mixed(phase, roles, found)
    await _set_companions(prepared, run, phase, roles)


async def set_optimizers(config: RunConfig, phase: PreparedPhase, roles: Executor, found: Checkpoint | None) -> None:
    """A fresh optimizer for the phase, and if it is resumed, everything as the checkpoint has it."""
    for index, role in enumerate(phase.pipeline.trained):
        average = average_spec(phase) if index == 0 else None  # of what leaves as the model
        optim = optim_spec(phase, role, config.roles.ranks(role))
        await roles.groups[role].call("reset", optim, average, timeout_s=SAVE_TIMEOUT_S)
        if found is not None:
            await roles.groups[role].call("load_state", str(found.path / role), timeout_s=SAVE_TIMEOUT_S)


def checkpoint_parts(config: RunConfig, phase: PreparedPhase) -> dict[str, list[Part]]:
    """What each role has for a checkpoint: every trained role's state and its model, the weights of roles that follow
    them, and a model with the average if that is taken; with LoRA also the adapters that are merged in the first role's
    models, alone."""
    if not phase.pipeline.trained:
        return {}
    first, *others = phase.pipeline.trained
    parts = {role: [Part("state", role)] for role in phase.pipeline.trained}
    for role in phase.pipeline.mixed:
        parts[role] = [Part("model", role)]
    for role in others:
        parts[role].append(Part("model", f"models/{role}"))
    taken = {MODEL: (ADAPTER, False)}
    if phase.config.train.bema is not None:
        taken[AVERAGED] = (f"{AVERAGED}-{ADAPTER}", True)
    for model, (adapter, averaged) in taken.items():
        parts[first].append(Part("model", model, averaged))
        if config.model.lora is not None:
            parts[first].append(Part("adapter", adapter, averaged))
    return parts


async def begin_save(parts: dict[str, list[Part]], roles: Executor, folder: Path) -> None:
    """Every rank copies and writes its share from now on. Returns when the weights may be trained again."""
    for role in parts:
        await asyncio.to_thread((folder / role).mkdir)
    names = {role: f"{role}.begin_save" for role in parts}
    await all_or_first_error(
        roles.groups[role].call("begin_save", str(folder), own, timeout_s=SAVE_TIMEOUT_S, task_name=names[role])
        for role, own in parts.items()
    )


async def finish_save(parts: dict[str, list[Part]], roles: Executor) -> dict[str, Seal]:
    """The files of all ranks, when they are on the disk."""
    found = await all_or_first_error(
        roles.groups[role].call("finish_save", SAVE_TIMEOUT_S, timeout_s=SAVE_TIMEOUT_S + 30) for role in parts
    )
    return {name: seal for ranks in found for own in ranks for name, seal in own.items()}


def keep_phase(folder: Path, trained: Iterable[str], checkpoint: Path) -> None:
    """Keep what a finished phase leaves, the state of each role that it trained and its model, for later phases:
    checkpoints are deleted in time. Files are shared with the checkpoint where the disk can. What is there already is
    replaced: it may be of a time before the run went back to an earlier step, with other settings."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in (*trained, MODEL):
        shutil.copytree(checkpoint / name, partial / name, copy_function=_link_or_copy)
    if folder.is_dir():
        shutil.rmtree(folder)  # a process that is killed here resumes from that checkpoint, and does this again
    partial.rename(folder)


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of a time before the run went back, maybe with other ranks' files
    folder.mkdir(parents=True)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


async def _restore(earlier: Sequence[PreparedPhase], run: Path, roles: Executor, wanted: Sequence[str]) -> None:
    """Roles that earlier phases of a resumed run trained have the weights that the last of these left."""
    for role in wanted:
        trained = [phase for phase in earlier if role in phase.pipeline.trained]
        if trained:
            folder = kept_folder(run, trained[-1].name) / role
            await roles.groups[role].call("load_state", str(folder), timeout_s=SAVE_TIMEOUT_S)


async def _start_handed_over(prepared: Prepared, run: Path, phase: PreparedPhase, roles: Executor) -> None:
    """Roles whose model an earlier phase leaves start with the first phase that needs them."""
    scoring = [role for reward in prepared.model_rewards for role in reward.roles] if phase.scores else []
    for role in dict.fromkeys((*phase.pipeline.roles, *scoring)):
        model = prepared.handed_over.get(role)
        if model is not None and role not in roles.groups:
            left = phase_of(model)
            assert left is not None, "the plan refuses other placeholders"
            await roles.start(role, str(kept_folder(run, left) / MODEL))
            await _restore(prepared.phases[: phase.index], run, roles, [role])


async def _set_companions(prepared: Prepared, run: Path, phase: PreparedPhase, roles: Executor) -> None:
    """Trained roles hold the frozen models that the phase's losses compare them with, and no others."""
    for role in phase.pipeline.trained:
        companion = phase.pipeline.companions.get(role)
        if companion is None and not any(role in earlier.pipeline.companions for earlier in prepared.phases):
            continue
        spec = None
        if companion is not None:
            path, left = None, prepared.handed_over.get(companion)
            if left is not None and (earlier := phase_of(left)) is not None:
                path = str(kept_folder(run, earlier) / MODEL)
            spec = model_spec(prepared, companion, path, trained=False)
        await roles.groups[role].call("set_companion", spec, timeout_s=SAVE_TIMEOUT_S)


async def _set_copies(config: RunConfig, folder: Path, phase: PreparedPhase, roles: Executor, *, resumed: bool) -> None:
    """A frozen role without a model of its own is a trained one as it was when the phase began. That is kept in the
    run's folder: a phase that is resumed must find it again."""
    if phase.index == 0:
        return
    for role in phase.pipeline.roles:
        settings = config.roles[role]
        if not isinstance(settings, FrozenRole) or settings.model is not None or role not in roles.groups:
            continue
        copy = folder / settings.copies
        if not resumed:
            await asyncio.to_thread(_emptied, copy)
            await roles.groups[settings.copies].call("save_model", str(copy), timeout_s=SAVE_TIMEOUT_S)
        async with roles.changing_weights():
            await roles.groups[role].call("load_model", str(copy), timeout_s=SAVE_TIMEOUT_S)
            roles.replaced(role)


async def _set_mixed(phase: PreparedPhase, roles: Executor, found: Checkpoint | None) -> None:
    """If the phase is resumed, roles whose weights follow the trained ones have those of the checkpoint."""
    if found is None:
        return
    for role in phase.pipeline.mixed:
        folder = found.path / role
        if not folder.is_dir():
            raise ConfigError(
                f"{folder} does not exist: the run that wrote this checkpoint did not move the weights of {role}; "
                "resume with the options of its method that it had"
            )
        await roles.groups[role].call("load_model", str(folder), timeout_s=SAVE_TIMEOUT_S)
