"""What a shell offers after Tab: recipes, keys and methods. `troupe --install-completion` sets it up."""

from __future__ import annotations

from collections.abc import Iterator

# Imports are inside: the shell starts a process for each press of Tab.


def recipe_names(incomplete: str) -> Iterator[tuple[str, str]]:
    """With what each does. Files are the shell's own matter."""
    from orchestrator.config.loading import recipes

    return ((name, what) for name, what in recipes().items() if name.startswith(incomplete))


def override_keys(incomplete: str) -> Iterator[tuple[str, str]]:
    """`train.st` -> `train.steps=`; of a value nothing is known."""
    return ((f"{name}=", help_line) for name, help_line in key_names(incomplete) if "=" not in incomplete)


def key_names(incomplete: str) -> Iterator[tuple[str, str]]:
    from orchestrator.config.keys import every_key

    return ((key.name, key.help) for key in every_key() if key.name.startswith(incomplete))


def method_names(incomplete: str) -> Iterator[str]:
    from orchestrator.methods import METHODS

    return (name for name in METHODS if name.startswith(incomplete))
