"""The weights of a phase: what its roles hold when it begins, from the model or from a checkpoint, and what a
checkpoint holds of them."""

from __future__ import annotations

from pathlib import Path

from actors.errors import ConfigError
from orchestrator.checkpoint import AVERAGED, MODEL, Checkpoint
from orchestrator.config import RunConfig
from orchestrator.launch import average_spec, optim_spec
from orchestrator.prepare import PreparedPhase
from orchestrator.roles import Roles

SAVE_TIMEOUT_S = 1800.0
ADAPTER = "adapter"  # in a checkpoint, beside the model; of the average, `bema-adapter`


def reference_folder(run: Path, phase: PreparedPhase) -> Path:
    """The policy as a phase after the first one found it."""
    return run / "references" / phase.name


async def set_weights(
    config: RunConfig, run: Path, phase: PreparedPhase, roles: Roles, found: Checkpoint | None
) -> None:
    """What frozen roles hold while the phase lasts: the policy as the phase found it, or what the checkpoint says."""
    await _set_reference(config, reference_folder(run, phase), phase, roles, resumed=found is not None)
    await _set_mixed(phase, roles, found)


async def set_optimizers(phase: PreparedPhase, roles: Roles, found: Checkpoint | None) -> None:
    """A fresh optimizer for the phase, and if it is resumed, everything as the checkpoint has it."""
    for role in phase.pipeline.trained:
        average = average_spec(phase) if role == "policy" else None  # what leaves as a model
        await roles.groups[role].call("reset", optim_spec(phase), average, timeout_s=SAVE_TIMEOUT_S)
        if found is not None:
            await roles.groups[role].call("load_state", str(found.path / role), timeout_s=SAVE_TIMEOUT_S)


async def save_weights(config: RunConfig, phase: PreparedPhase, roles: Roles, folder: Path) -> None:
    """Every trained role's state, the weights of those that follow them, a model folder, and one with the average if
    that is taken; with LoRA also the adapters that are merged in them, alone."""
    policy = roles.groups["policy"]
    for role in phase.pipeline.trained:
        (folder / role).mkdir()
        await roles.groups[role].call("save_state", str(folder / role), timeout_s=SAVE_TIMEOUT_S)
    for role in phase.pipeline.mixed:
        await roles.groups[role].call("save_model", str(folder / role), timeout_s=SAVE_TIMEOUT_S)
    taken = {MODEL: (ADAPTER, False)}
    if phase.config.train.bema is not None:
        taken[AVERAGED] = (f"{AVERAGED}-{ADAPTER}", True)
    for model, (adapter, averaged) in taken.items():
        await policy.call("save_model", str(folder / model), averaged, timeout_s=SAVE_TIMEOUT_S)
        if config.model.lora is not None:
            await policy.call("save_adapter", str(folder / adapter), averaged, timeout_s=SAVE_TIMEOUT_S)


async def _set_reference(config: RunConfig, folder: Path, phase: PreparedPhase, roles: Roles, *, resumed: bool) -> None:
    """The reference is the policy as it was when the phase began, unless `roles.reference.model` is another. It is kept
    in the run's folder: a phase that is resumed must find it again."""
    shared = "reference" in phase.pipeline.roles and "reference" in roles.groups
    if phase.index == 0 or not shared or config.roles.reference.model is not None:
        return
    if not resumed:
        folder.mkdir(parents=True, exist_ok=True)
        await roles.groups["policy"].call("save_model", str(folder), timeout_s=SAVE_TIMEOUT_S)
    await roles.groups["reference"].call("load_model", str(folder), timeout_s=SAVE_TIMEOUT_S)


async def _set_mixed(phase: PreparedPhase, roles: Roles, found: Checkpoint | None) -> None:
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
