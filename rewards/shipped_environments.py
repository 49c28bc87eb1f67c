"""The tools and environments that come with Troupe, by the names that a recipe uses. Each is where it is
(`package.module:name`), and imported in the workers that need it."""

from __future__ import annotations

TOOLS: dict[str, str] = {  # functions: episode.tools
    "calculator": "rewards.environments.calculator:calculator",
}

ENVIRONMENTS: dict[str, str] = {  # classes with `reset` and `step`: episode.environment
    "critique_and_revision": "rewards.environments.critique_and_revision:CritiqueAndRevision",
    "guessing_game": "rewards.environments.guessing_game:GuessingGame",
}

FACTORIES: dict[str, str] = {  # classes whose methods are tools: episode.environment_factory
    "python": "rewards.environments.python_sandbox:PythonSandbox",
    "search": "rewards.environments.corpus_search:CorpusSearch",
}
