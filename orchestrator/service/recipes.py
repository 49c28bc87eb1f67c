"""From what a client sends to a checked configuration, without running anything that the client chose."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from actors.errors import ConfigError
from orchestrator.config import overrides as syntax
from orchestrator.config.error_messages import unknown
from orchestrator.config.loading import check, draft_of, find_recipe, recipes
from orchestrator.config.schema import RunConfig
from orchestrator.service.code_in_recipes import code_in
from orchestrator.service.errors import Problem
from orchestrator.service.schemas import Recipe


def config_of(sent: Recipe, *, runs: Path, address: str | None, allow_code: bool) -> RunConfig:
    """The configuration of a run of this service, below `runs` and on the Ray at `address`. Raises ConfigError for what
    is refused, Problem 403 for code."""
    tree = sent.recipe if isinstance(sent.recipe, dict) else _shipped(sent.recipe)
    own = [f"output={runs}", *([f"cluster.address={address}"] if address else [])]
    draft = draft_of(tree, [*sent.overrides, *own], "the recipe")
    code = code_in({key: value for key, value in draft.tree.items() if key not in ("output", "cluster")})
    if code and not allow_code:
        raise Problem(
            403, f"the recipe runs code, and this service was started without --allow-code: {'; '.join(code[:5])}"
        )
    return check(draft, methods=not code)  # users' own methods are run where the run is, not here


def _shipped(name: str) -> dict[str, Any]:
    if name not in recipes():  # nor is the path of a file one: it would be the service's machine's
        raise ConfigError(unknown("recipe", name, list(recipes())))
    return cast(dict[str, Any], syntax.load_yaml(find_recipe(name).read_text(), name)[0])
