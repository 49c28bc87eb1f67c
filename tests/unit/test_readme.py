"""What the README says of the methods is what there is."""

from pathlib import Path

import pytest

from orchestrator.methods import METHODS, build

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "README.md").read_text().splitlines()


@pytest.mark.parametrize("name", METHODS)
def test_the_readme_has_a_line_for_every_method_with_its_data_and_its_roles(name: str):
    pipeline = build(name, {})
    start = f"| [`{name}`](docs/methods/{name}.md) | {pipeline.data.name} | {', '.join(pipeline.roles)} | "
    assert sum(line.startswith(start) for line in LINES) == 1, f"expected one line that starts with: {start}"
    assert (ROOT / "docs" / "methods" / f"{name}.md").is_file()


def test_the_readme_names_no_method_that_does_not_exist():
    named = {line.split("`")[1] for line in LINES if line.startswith("| [`") and "docs/methods/" in line}
    assert named == set(METHODS)
