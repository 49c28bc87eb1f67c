"""The tools and environments that come with Troupe, by the names that a recipe uses. Each is where it is
(`package.module:name`), and imported in the workers that need it."""

from __future__ import annotations

TOOLS: dict[str, str] = {}  # functions: episode.tools

ENVIRONMENTS: dict[str, str] = {}  # classes with `reset` and `step`: episode.environment

FACTORIES: dict[str, str] = {}  # classes whose methods are tools: episode.environment_factory
