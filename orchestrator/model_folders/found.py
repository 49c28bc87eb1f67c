"""Which model folder a user means: that of a run, a checkpoint or a finished phase; a folder; a name on the hub.

runs/NAME            its newest intact checkpoint, or that of `step`, or what `phase` left
.../step-00000400    that checkpoint
.../phases/sft       what the phase left to later ones
a Hugging Face folder, a PEFT adapter's, a hub name, example:NAME
"""

# pyright: basic
# (huggingface_hub is typed in part only)

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

from actors.errors import ConfigError, ModelError
from actors.pretrained import ADAPTER_CONFIG
from orchestrator.checkpoint import ADAPTER, AVERAGED, MODEL, NAME, STATE, CheckpointStore, verify
from orchestrator.data.synthetic_examples import is_example
from orchestrator.planning.handover import kept_folder


@dataclass(frozen=True)
class Wanted:
    """Which of the models that a run has. `role`: a trained role other than the first one; `averaged`: the average of
    the weights (`train.bema`); `adapter`: the LoRA adapters alone; `step`, `phase`: where a run is named, of which
    checkpoint or finished phase."""

    role: str | None = None
    averaged: bool = False
    adapter: bool = False
    step: int | None = None
    phase: str | None = None

    def given(self) -> list[str]:
        """The options that are set, as the command line has them."""
        words = {"role": self.role, "step": self.step, "phase": self.phase}
        flags = {"averaged": self.averaged, "adapter": self.adapter}
        return [f"--{name}" for name, value in flags.items() if value] + [
            f"--{name} {value}" for name, value in words.items() if value is not None
        ]


@dataclass(frozen=True)
class ModelFolder:
    """`path` holds config.json and weights; or, if `adapter`, a PEFT adapter. `tokenizer`: the folder that has one,
    where the folder itself does not."""

    path: Path
    adapter: bool = False
    tokenizer: Path | None = None


def find_model(given: str, wanted: Wanted | None = None) -> ModelFolder:
    """The folder that `given` stands for. Reads every file of a checkpoint to see that it is intact. Raises ConfigError
    or ModelError, which say what there is."""
    wanted = wanted or Wanted()
    folder = Path(given).expanduser()
    if _is_run(folder):
        return _of_run(folder, wanted)
    if _is_checkpoint(folder) or (folder / MODEL).is_dir():
        _refuse(wanted, given, "is one checkpoint", "step", "phase")
        if _is_checkpoint(folder) and (problem := verify(folder)):
            raise ConfigError(f"{given} cannot be used: {problem}")
        return _inside(folder, wanted)
    _refuse(wanted, given, "is no run and no checkpoint", "step", "phase", "role", "averaged")
    if folder.is_dir() and (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        return ModelFolder(folder, adapter=True)
    _refuse(wanted, given, "holds no adapter", "adapter")
    return ModelFolder(_resolved(given))


def _is_run(folder: Path) -> bool:
    return (folder / "events.jsonl").is_file() or (folder / "checkpoints").is_dir()


def _is_checkpoint(folder: Path) -> bool:
    return NAME.fullmatch(folder.resolve().name) is not None and (folder / STATE).is_file()


def _of_run(run: Path, wanted: Wanted) -> ModelFolder:
    if wanted.phase is not None:
        return _of_phase(run, wanted)
    store = CheckpointStore(run / "checkpoints", keep=1)
    if wanted.step is not None:
        return _inside(store.at(wanted.step).path, wanted)
    newest = store.latest()
    if newest is None:
        raise ConfigError(f"{run} has no checkpoint that can be used: its run saved none (checkpoint.every=N saves)")
    return _inside(newest.path, wanted)


def _of_phase(run: Path, wanted: Wanted) -> ModelFolder:
    """What a phase left. The last one's is the newest checkpoint: nothing comes after it."""
    assert wanted.phase is not None
    if wanted.step is not None:
        raise ConfigError(
            f"--step {wanted.step} and --phase {wanted.phase}: a step is in one phase; give one of the two"
        )
    kept = kept_folder(run, wanted.phase)
    if kept.is_dir():
        return _inside(kept, wanted)
    newest = CheckpointStore(run / "checkpoints", keep=1).latest()
    if newest is not None and newest.state.phase == wanted.phase:
        return _inside(newest.path, wanted)
    finished = sorted(each.name for each in (run / "phases").glob("*") if not each.name.startswith("."))
    there = [*finished, *([newest.state.phase] if newest else [])]
    raise ConfigError(f"{run} has no model of a phase {wanted.phase!r}; there are: {', '.join(there) or 'none'}")


def _inside(folder: Path, wanted: Wanted) -> ModelFolder:
    """The model that a checkpoint or a finished phase has for what is wanted."""
    own = wanted.role is None or ((folder / wanted.role).is_dir() and not (folder / "models" / wanted.role).is_dir())
    if not own:
        if wanted.averaged or wanted.adapter:
            raise ConfigError(f"{folder}: {' '.join(wanted.given())}: only the first trained role has that")
        return ModelFolder(_existing(folder, f"models/{wanted.role}", wanted))
    name = AVERAGED if wanted.averaged else MODEL
    if not wanted.adapter:
        return ModelFolder(_existing(folder, name, wanted))
    adapter = f"{AVERAGED}-{ADAPTER}" if wanted.averaged else ADAPTER
    return ModelFolder(_existing(folder, adapter, wanted), adapter=True, tokenizer=folder / name)


def _existing(folder: Path, name: str, wanted: Wanted) -> Path:
    found = folder / name
    if found.is_dir():
        return found
    roles = sorted(each.name for each in (folder / "models").glob("*"))
    there = [each for each in (MODEL, AVERAGED, ADAPTER, f"{AVERAGED}-{ADAPTER}") if (folder / each).is_dir()]
    raise ConfigError(
        f"{folder} has no {name}/, which {' '.join(wanted.given()) or 'this'} asks for; it has: "
        f"{', '.join([*there, *(f'models/{role}' for role in roles)]) or 'no model'}"
    )


def _refuse(wanted: Wanted, given: str, why: str, *options: str) -> None:
    """Raises ConfigError if one of these options is set, which choose among the models of a run."""
    found = [option for option in options if getattr(wanted, option)]
    if found:
        raise ConfigError(f"--{found[0]} chooses among the models of a run, and {given} {why}: leave it out")


def _resolved(given: str) -> Path:
    """A folder with a model, of this machine, of the hub, or made here."""
    from orchestrator.planning.resolve import resolve_model

    path = resolve_model(given, 0, "MODEL")
    return Path(path) if is_example(given) or Path(path).is_dir() else _downloaded(path)


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack"])
        )
    except Exception as error:  # the network, the hub's answers, a name that is none
        said = shorten(str(error), 250, placeholder=" ...")
        raise ModelError(
            f"{name} is no folder here, and the Hugging Face hub gave no model of that name: {said}"
        ) from error


def base_of(adapter: Path) -> str:
    """The model that an adapter was trained on, as its configuration names it. Raises ModelError if it names none."""
    try:
        name = json.loads((adapter / ADAPTER_CONFIG).read_text()).get("base_model_name_or_path")
    except (OSError, ValueError) as error:
        raise ModelError(f"{adapter / ADAPTER_CONFIG} cannot be read: {error}") from None
    if not name:
        raise ModelError(f"{adapter / ADAPTER_CONFIG} does not say which model the adapter is for: name it with --base")
    return str(name)
