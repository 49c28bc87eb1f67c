"""From a recipe and overrides to a checked `RunConfig`.

    recipe name or file ──► YAML tree ──► overrides ──► one shape (`phases`) ──► RunConfig ──► methods' options

The place where each path was set is recorded for error messages. Keys are checked before methods are imported (which
import the losses, and torch), so that a misspelt key is reported at once.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from actors.errors import ConfigError, did_you_mean
from orchestrator.config import overrides as syntax
from orchestrator.config.error_messages import explain
from orchestrator.config.overrides import Keys, Override, dotted
from orchestrator.config.rounds import with_rounds
from orchestrator.config.schema import PhaseConfig, RunConfig

RECIPES = Path(__file__).parent.parent / "recipes"
PHASE_KEYS = tuple(PhaseConfig.model_fields)  # a file with one phase writes them at its top level
SAVED = "config.json"  # in a run's folder; JSON is YAML
SUBMITTED = "recipe.json"  # beside it, of a run that a service was asked for: what was submitted


def load_config(recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a run, every key and every method's option checked. Raises ConfigError."""
    return check(_folded(Draft.read(find_recipe(recipe)), overrides))


def config_of(tree: dict[str, Any], overrides: Sequence[str], name: str) -> RunConfig:
    """As `load_config`, for a tree that is in no file; `name` stands for it in error messages."""
    return check(draft_of(tree, overrides, name))


def draft_of(tree: dict[str, Any], overrides: Sequence[str], name: str) -> Draft:
    """A tree that is in no file, with its overrides, in one shape and not checked. `tree` is left as it is."""
    draft = Draft(name, copy.deepcopy(tree), {})
    draft.refuse_both_shapes()
    return _folded(draft, overrides)


def load_run(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration that a run saved in its folder when it started."""
    return load_config(saved_config(folder), overrides)


def saved_config(folder: Path) -> Path:
    """The file of a run's configuration. Raises ConfigError if the folder is no run's."""
    if not (folder / SAVED).is_file() and (folder / SUBMITTED).is_file():
        raise ConfigError(
            f"the run in {folder} was submitted and is not accepted yet; `troupe logs {folder}` says more"
        )
    if not (folder / SAVED).is_file():
        raise ConfigError(f"{folder} is not a run's folder: it has no {SAVED}. Give the one that `troupe run` printed")
    return folder / SAVED


def resumable_config(folder: Path) -> Path:
    """The file of the configuration that a run is resumed with: its own, or of one that was submitted and has ended
    before it was accepted, what was submitted. Raises ConfigError if the folder is no run's."""
    submitted = folder / SUBMITTED
    return submitted if submitted.is_file() and not (folder / SAVED).is_file() else saved_config(folder)


def recipes() -> dict[str, str]:
    """Shipped recipes: name -> the first sentence of its file."""
    return {recipe_name(file): _headline(file) for folder in (".", "papers") for file in _files(RECIPES / folder)}


def recipe_name(file: Path) -> str:
    """The name of a shipped recipe: `dpo_arithmetic`, `papers/dpo`."""
    return file.relative_to(RECIPES).with_suffix("").as_posix()


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.yaml"))


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe: a path to one, or the name of a shipped one."""
    file = Path(recipe)
    if file.is_file():
        return file
    shipped = RECIPES / f"{recipe}.yaml"
    if not shipped.is_file():
        if file.suffix in (".yaml", ".yml") or file.parent.name not in ("", "papers"):
            raise ConfigError(f"there is no file {file} (looked in {Path.cwd()})")
        raise ConfigError(no_recipe(str(recipe)))
    return shipped


def no_recipe(given: str) -> str:
    """There are too many to name all."""
    hint = did_you_mean(given, recipes()) or "."
    return f"no recipe {given!r}{hint} `troupe recipes` lists those that there are; a file is given by its path"


@dataclass
class Draft:
    """A configuration before it is checked. `origins`: path -> where it was set. `single`: the name of the phase that
    the file wrote at its top level, if it did."""

    name: str
    tree: dict[str, Any]
    origins: dict[Keys, str]
    single: str | None = None
    _late: list[Override] = field(default_factory=list[Override])

    @classmethod
    def read(cls, file: Path) -> Draft:
        try:
            text = file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {file}: {error}") from None
        tree, lines = syntax.load_yaml(text, str(file))
        if not isinstance(tree, dict):
            raise ConfigError(f"{file} must hold keys and values at its top level, for example `method: grpo`")
        draft = cls(str(file), cast(dict[str, Any], tree), {path: f"{file}, line {n}" for path, n in lines.items()})
        draft.refuse_both_shapes()
        return draft

    def override(self, override: Override) -> None:
        """The last one wins. Overrides of `phases...` are applied after a single phase has got its name. A key of a
        phase without `phases.NAME` means the only phase, even if the file has `phases`."""
        head = override.path[0]
        if head == "phases" and "phases" not in self.tree:
            self._late.append(override)
            return
        if head in PHASE_KEYS and "phases" in self.tree:
            names = list(cast(dict[str, Any], self.tree["phases"] or {}))
            if len(names) == 1:
                self._apply(replace(override, path=("phases", names[0], *override.path)))
                return
            example = f"phases.{names[0] if names else 'NAME'}.{override.text}"
            raise ConfigError(f"{override}: {self.name} has the phases {', '.join(names)}; say which: {example}")
        self._apply(override)

    def fold(self) -> None:
        """Name a single phase after its method, so that every configuration has `phases`."""
        if "phases" not in self.tree:
            method = str(self.tree.get("method", PhaseConfig.model_fields["method"].default))
            self.single = method.rpartition(":")[2]  # of a user's method, the name in its file
            phase = {key: self.tree.pop(key) for key in PHASE_KEYS if key in self.tree}
            self.tree["phases"] = {self.single: phase}
            self.origins = {self._folded(path): origin for path, origin in self.origins.items()}
        for override in self._late:
            self._apply(override)

    def where(self, path: Keys) -> str:
        """Where a path was set, or a key inside it, or else the nearest section around it."""
        inside = [origin for set_at, origin in self.origins.items() if set_at[: len(path)] == path]
        if inside and path not in self.origins:
            return inside[0]
        while path:
            if path in self.origins:
                return self.origins[path]
            path = path[:-1]
        return self.name

    def shown_as(self, path: Keys) -> str:
        """A path in the notation of this file: without `phases.NAME` if it has one phase."""
        if self.single is not None and path[:1] == ("phases",) and path[1:2] in ((self.single,), ("NAME",)):
            path = path[2:]
        return dotted(path)

    def _apply(self, override: Override) -> None:
        syntax.apply(self.tree, override)
        depth = len(override.path)
        self.origins = {path: origin for path, origin in self.origins.items() if path[:depth] != override.path}
        self.origins[override.path] = str(override)

    def _folded(self, path: Keys) -> Keys:
        return ("phases", str(self.single), *path) if path[0] in PHASE_KEYS else path

    def refuse_both_shapes(self) -> None:
        beside = [key for key in PHASE_KEYS if key in self.tree]
        if "phases" in self.tree and beside:
            key = beside[0]
            raise ConfigError(
                f"`{key}` is given beside `phases` ({self.where((key,))}). A file has one phase, with its keys at "
                f"the top level, or `phases`: move it to phases.NAME.{key}"
            )


def _folded(draft: Draft, overrides: Sequence[str]) -> Draft:
    for override in map(syntax.parse, overrides):
        draft.override(override)
    draft.fold()
    return draft


def check(draft: Draft, *, methods: bool = True) -> RunConfig:
    """The configuration of a draft that is in one shape. Without `methods` their options are not checked, and the files
    of users' own are not run. Raises ConfigError."""
    config = _validated(draft)
    if methods:
        _check_methods(config, draft)
    return with_rounds(config)


def _validated(draft: Draft) -> RunConfig:
    try:
        return RunConfig.model_validate(draft.tree)
    except ValidationError as error:
        top_level = [("phases", draft.single or "NAME", key) for key in PHASE_KEYS]
        raise explain(error, draft.tree, RunConfig, draft.where, draft.shown_as, top_level) from None


def _check_methods(config: RunConfig, draft: Draft) -> None:
    from orchestrator.planning.resolve import build_pipeline

    for name, phase in config.phases.items():
        try:
            build_pipeline(phase)
        except ConfigError as error:
            where = draft.where(("phases", name, *_blamed(str(error), phase)))
            which = "" if draft.single else f"phases.{name}: "
            raise ConfigError(f"{which}{error}\n  set in {where}") from None


def _blamed(message: str, phase: PhaseConfig) -> Keys:
    """The key of a phase to which a method's error refers: the first option that the error names, else the method."""
    found = {option: re.search(rf"\b{re.escape(option)}\b", message) for option in phase.options}
    named = sorted((match.start(), option) for option, match in found.items() if match)
    return ("options", named[0][1]) if named else ("method",)


def _headline(file: Path) -> str:
    """The first sentence of the comment at a file's top."""
    comment = takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
    text = " ".join(line.lstrip("# ") for line in comment)
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0].rstrip(".")
