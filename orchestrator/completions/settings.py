"""The configuration of a run that only asks a model or only scores: what a recipe or an earlier run says of rewards,
roles and sampling, with another model and other data.

recipe, or the run that the model is of ─► rewards, roles, sampling, evaluation.data ─► one phase of generate_data
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.errors import ConfigError
from orchestrator.config.loading import SAVED, config_of, load_config, load_run
from orchestrator.config.roles import EngineRole, RanksRole
from orchestrator.config.schema import PhaseConfig, RunConfig
from orchestrator.model_folders.found import Wanted, find_model
from orchestrator.planning.handover import is_handed_over, kept_folder, phase_of

BATCH = 64  # prompts asked at a time; twice that are under way, and after each there is a checkpoint
METHOD = "generate_data"  # of all three commands
KEPT_SAMPLING = ("max_tokens", "stop", "stop_token_ids")  # what greedy sampling keeps of a phase's


@dataclass(frozen=True)
class Settings:
    """What the commands take of a recipe or of a run. `run`: the run's folder, if it is one."""

    config: RunConfig | None = None
    run: Path | None = None

    @classmethod
    def of(cls, recipe: str | None, model: str | None = None) -> Settings:
        """Those of the recipe, of a YAML file or of a run's folder; else those of the run that the model is of, if it
        is in a run's folder."""
        if recipe is not None and (Path(recipe) / SAVED).is_file():
            return cls(load_run(Path(recipe)), Path(recipe))
        if recipe is not None:
            return cls(load_config(recipe))
        run = None if model is None else _run_of(Path(model).expanduser())
        if run is None:
            return cls()
        try:
            return cls(load_run(run), run)
        except ConfigError as error:  # of another version, say
            error.add_note(f"rewards, roles and sampling are those of {run}, unless another recipe is given: --recipe")
            raise

    def phase(self, name: str | None, *, evaluated: bool) -> PhaseConfig | None:
        """The phase of that name; else the last one, of those with held-out prompts if it is to be `evaluated`."""
        phases = {} if self.config is None else dict(self.config.phases)
        if name is not None:
            if name not in phases:
                raise ConfigError(f"--phase {name}: there are {', '.join(phases) or 'none: give a recipe'}")
            return phases[name]
        fitting = [each for each in phases.values() if not evaluated or (each.evaluation and each.evaluation.data)]
        return fitting[-1] if fitting else None

    def tree(self, model: str | None) -> dict[str, Any]:
        """Everything but the phase: model, rewards, roles and the cluster. Of the roles' models, those that phases of
        the run left are named by their folders."""
        if self.config is None:
            return {"model": {"path": model}} if model else {}
        config = self.config
        whole = config.model_dump(mode="json", exclude_defaults=True)
        found = {key: whole[key] for key in ("seed", "output", "rewards", "cluster", "weights") if key in whole}
        own = {key: value for key, value in whole.get("model", {}).items() if key not in ("path", "lora")}
        found["model"] = {**own, "path": model or config.model.path}
        sampled = {role.follows for _, role in config.roles if isinstance(role, EngineRole)} if model else set[str]()
        found["roles"] = {
            name: dumped
            for name, role in config.roles
            if (dumped := self._role(name, role, named=name not in sampled)) is not None
        }
        return found

    def _role(self, name: str, role: Any, *, named: bool) -> dict[str, Any] | None:
        """A role's keys that are not the defaults. `named`: keep the model that it names; else it gets the run's."""
        kind, dumped = str(role.kind), dict[str, Any](role.model_dump(mode="json", exclude_defaults=True))
        model = role.model if isinstance(role, RanksRole) else None
        if model is not None and not named:
            del dumped["model"]
        elif model is not None and is_handed_over(model):
            left = phase_of(model)
            folder = kept_folder(self.run, left) / "model" if self.run and left else None
            if folder is None or not folder.is_dir():
                return None  # asked for, the plan says which role has no model
            dumped["model"] = str(folder)
        return {"kind": kind, **dumped} if dumped or name not in _USUAL else None


_USUAL = frozenset(RunConfig.model_fields["roles"].annotation.model_fields)  # pyright: ignore


def _run_of(folder: Path) -> Path | None:
    """The run that a folder is, or lies in: a checkpoint, or what a phase left."""
    for candidate in (folder, *folder.resolve().parents[:3]):
        if (candidate / SAVED).is_file() and (candidate / "events.jsonl").is_file():
            return candidate
    return None


def model_path(model: str, wanted: Wanted | None = None) -> str:
    """The folder of a model that is to be asked. Raises ConfigError for an adapter: engines take whole models."""
    found = find_model(model, wanted)
    if found.adapter:
        raise ConfigError(f"{model} is an adapter: merge it first, troupe merge {model} --into FOLDER")
    return str(found.path)


def phase_tree(
    data: dict[str, Any], options: dict[str, Any], sampling: dict[str, Any], *, ahead: int = 1
) -> dict[str, Any]:
    """One pass over the data, in its order, the next batch under way while one is written."""
    return {
        "method": METHOD,
        "options": options,
        "data": {"shuffle": False, **data},
        "train": {"epochs": 1, "batch_size": BATCH, **({"max_staleness": ahead} if ahead else {})},
        **({"sampling": sampling} if sampling else {}),
    }


def built(name: str, tree: dict[str, Any], phase: dict[str, Any], overrides: Sequence[str]) -> RunConfig:
    """The configuration, as `troupe run` would check it; the phase is called after the command."""
    whole = {**tree, "name": name, "phases": {name: phase}}
    return config_of(whole, overrides, f"troupe {name}")


def data_of(given: str | None, split: str | None) -> dict[str, Any]:
    return {"path": given, **({"split": split} if split else {})}


def rewards_of(names: Sequence[str]) -> list[dict[str, Any]]:
    """Rewards as `--reward` names them: a function, a named actor, an endpoint."""
    kinds = (("actor" if name.startswith("ray://") else "url" if "://" in name else "fn", name) for name in names)
    return [{kind: name} for kind, name in kinds]


def sampling_of(phase: PhaseConfig | None) -> dict[str, Any]:
    """How the phase samples, without what only training reads."""
    if phase is None:
        return {}
    whole = phase.sampling.model_dump(mode="json", exclude_defaults=True)
    return {key: value for key, value in whole.items() if not key.startswith("replay_")}


def greedy(sampling: dict[str, Any]) -> dict[str, Any]:
    """The same limits without randomness."""
    return {**{key: sampling[key] for key in KEPT_SAMPLING if key in sampling}, "temperature": 0.0}
