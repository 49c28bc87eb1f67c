"""The papers whose settings ship as recipes. A recipe's first line names its paper: `# TITLE, arXiv:NUMBER: what it
is.`; what is not on arXiv has its year: `# TITLE, AUTHORS, 2025: what it is.`"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config.loading import RECIPES, recipe_name
from orchestrator.config.overrides import load_yaml

FIRST_LINE = re.compile(r"# (?P<title>.+), (arXiv:(?P<number>\d{4}\.\d{5})|(?P<year>\d{4})): ")


@dataclass(frozen=True)
class Paper:
    """A paper, and the recipe that reproduces it. `number`: arXiv's, which begins with year and month, or the year."""

    title: str
    number: str
    method: str
    options: Mapping[str, Any]
    recipe: str


def papers() -> Iterator[Paper]:
    """Sorted by arXiv number, that is, by date."""
    return iter(sorted(map(_read, (RECIPES / "papers").glob("*.yaml")), key=lambda paper: (_date(paper), paper.recipe)))


def _date(paper: Paper) -> str:
    """In the order of arXiv numbers: 2510.12345 is of October 2025. A year alone comes after its months."""
    return paper.number if "." in paper.number else f"{paper.number[2:]}99"


def _read(file: Path) -> Paper:
    text = file.read_text()
    named = FIRST_LINE.match(text)
    assert named is not None, f"{file}: its first line must be `# TITLE, arXiv:NUMBER: what it is.`"
    tree, _ = load_yaml(text, str(file))
    return Paper(
        named["title"], named["number"] or named["year"], tree["method"], tree.get("options", {}), recipe_name(file)
    )
