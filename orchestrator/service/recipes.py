"""From what a client sends to a checked configuration, without running anything that the client chose."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from actors.errors import ConfigError
from orchestrator.config import overrides as syntax
from orchestrator.config.loading import check, draft_of, find_recipe, no_recipe, recipes
from orchestrator.config.schema import RunConfig
from orchestrator.service.code_in_recipes import code_in
from orchestrator.service.errors import Problem
from orchestrator.service.schemas import Recipe

OF_THE_SERVICE = {  # keys that a client cannot set
    "cluster.address": "on which Ray a run runs is the service's to say; leave it out",
    "output": "in which folder a run lies is the service's to say (`--runs`); leave it out",
}


def config_of(sent: Recipe, *, runs: Path, allow_code: bool) -> RunConfig:
    """The configuration of a run of this service, below `runs`. Raises ConfigError for what is refused, Problem 403 for
    code."""
    tree = sent.recipe if isinstance(sent.recipe, dict) else _shipped(sent.recipe)
    draft = draft_of(tree, sent.overrides, "the recipe")
    cluster = draft.tree.get("cluster")
    if isinstance(cluster, dict) and "address" in cluster:
        raise ConfigError(f"cluster.address is given: {OF_THE_SERVICE['cluster.address']}")
    if "output" in draft.tree:
        raise ConfigError(f"output={draft.tree['output']} is given: {OF_THE_SERVICE['output']}")
    code = code_in(draft.tree)
    _refuse_code(code, allow_code)
    config = check(draft, methods=not code)  # users' own methods are run where the run is, not here
    _refuse_no_data(config)
    return config.model_copy(update={"output": runs})


def resumed_config(saved: Path, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a run that is resumed with overrides that are not refused (`refuse_overrides`)."""
    draft = draft_of(json.loads(saved.read_text()), overrides, "the run's configuration")
    return check(draft, methods=not code_in(draft.tree))


def refuse_overrides(overrides: Sequence[str], *, allow_code: bool) -> None:
    """Of a run that is resumed. Raises ConfigError, or Problem 403 for code."""
    for override in map(syntax.parse, overrides):
        key = syntax.dotted(override.path)
        for said, why in OF_THE_SERVICE.items():
            if said == key or said.startswith(f"{key}."):
                raise ConfigError(f"{override}: {why}")
        _refuse_code(code_in({key: override.value}), allow_code)


def _refuse_no_data(config: RunConfig) -> None:
    """Whether the data can be read is seen where the run is; that none is named is seen here."""
    for name, phase in config.phases.items():
        if phase.data.path is None and not phase.data.mixture:
            from orchestrator.data.mixtures import NO_DATA

            raise ConfigError(f"phases.{name}: {NO_DATA}")


def _refuse_code(code: Sequence[str], allow_code: bool) -> None:
    if code and not allow_code:
        raise Problem(
            403, f"the recipe runs code, and this service was started without --allow-code: {'; '.join(code[:5])}"
        )


def _shipped(name: str) -> dict[str, Any]:
    if name not in recipes():  # nor is the path of a file one: it would be the service's machine's
        raise ConfigError(no_recipe(name))
    return cast(dict[str, Any], syntax.load_yaml(find_recipe(name).read_text(), name)[0])
