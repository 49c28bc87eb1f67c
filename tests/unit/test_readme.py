"""What the README says of the methods is what there is."""

import inspect
import re
from pathlib import Path

import pytest

from orchestrator.config.loading import recipes
from orchestrator.methods import METHODS, build

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "README.md").read_text().splitlines()
PICTURE = re.compile(r"!\[[^]]*\]\(([^)]+\.png)\)")


@pytest.mark.parametrize("name", METHODS)
def test_the_readme_has_a_line_for_every_method_with_its_data_and_its_roles(name: str):
    pipeline = build(name, {})
    start = f"| [`{name}`](docs/methods/{name}.md) | {pipeline.data.name} | {', '.join(pipeline.roles)} | "
    assert sum(line.startswith(start) for line in LINES) == 1, f"expected one line that starts with: {start}"
    assert (ROOT / "docs" / "methods" / f"{name}.md").is_file()


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"generate_data"}))  # which trains nothing
def test_the_page_of_a_method_shows_what_it_learns(name: str):
    pages = ROOT / "docs" / "methods"
    page, curve = (pages / f"{name}.md").read_text(), f"curves/{name}.png"
    assert f"]({curve})" in page, f"docs/methods/{name}.md does not show {curve}; `make curves` draws it"
    assert (pages / curve).read_bytes().startswith(b"\x89PNG")


def test_every_curve_is_shown_somewhere():
    shown = {path.name for page in ROOT.glob("docs/**/*.md") for path in map(Path, PICTURE.findall(page.read_text()))}
    drawn = {path.name for path in (ROOT / "docs" / "methods" / "curves").glob("*.png")}
    assert len(drawn) > 30 and drawn <= shown


def test_the_readme_names_no_method_that_does_not_exist():
    named = {line.split("`")[1] for line in LINES if line.startswith("| [`") and "docs/methods/" in line}
    assert named == set(METHODS)


def test_the_index_names_every_method_and_only_methods_and_recipes_that_there_are():
    index = (ROOT / "docs" / "methods" / "index.md").read_text()
    assert set(METHODS) <= set(re.findall(r"`(\w+)`", index))
    pages = set(re.findall(r"\]\((\w+)\.md\)", index))
    assert pages <= set(METHODS) and len(pages) > 20
    rows = [line.strip("| ").split(" | ") for line in index.split("## Papers")[1].splitlines() if line.startswith("| ")]
    papers = [row for row in rows[1:] if row[1] != "-"]
    assert len(papers) > 60
    for _, runs, recipe in papers:
        assert set(re.findall(r"`([\w/]+)`", recipe)) <= set(recipes()), recipe
        first = re.match(r"`([a-z0-9_]+)`", runs)
        assert first is None or first[1] in METHODS, runs


def test_every_option_that_a_row_of_the_index_names_is_one_of_the_rows_methods() -> None:
    """Written `name`, or `name: value`; a key of the configuration has a dot or no method beside it."""
    index = (ROOT / "docs" / "methods" / "index.md").read_text()
    values = {"apo_down", "aot_unpaired", "bfd_split"}  # further values of an option
    checked: set[str] = set()
    for _, *cells in (line.split(" | ") for line in index.splitlines() if line.startswith("| ")):
        named = set(re.findall(r"`(\w+)(?::[^`]*)?`", cells[0]))
        methods = named & set(METHODS)
        options = {option for method in methods for option in inspect.signature(METHODS[method]).parameters}
        assert not methods or named - methods - values <= options, cells[0]
        checked |= named & options
    assert len(checked) > 15
    beyond = re.findall(r"`([\w/]+)`", index.rpartition("Beyond TRL's index")[2])
    assert len(beyond) > 15 and set(beyond) <= {*METHODS, *recipes()}


def test_options_that_the_index_names_build_with_their_methods():
    index = (ROOT / "docs" / "methods" / "index.md").read_text()
    said = re.findall(r"`(\w+)`,(?: [\w ]*)?`(loss_type|importance_sampling_level|correction|keep): (\w+)`", index)
    assert len(said) > 20
    beside = {"exo_pair": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.1}, "cispo": {"epsilon_high": 5.0}}
    beside |= {"statistical_rejection": {"num_generations": 8}, "dppo": {"dppo_threshold": 0.1}}
    for method, option, value in said:
        assert build(method, {option: value, **beside.get(value, {})}, {"max_completion_length": 16})
