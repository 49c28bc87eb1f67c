"""Every shipped recipe is one that would be launched: its keys hold, its methods close, its plan refuses nothing."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from orchestrator.config.loading import RECIPES, load_config, recipes
from orchestrator.config.schema import RunConfig
from orchestrator.import_pin import ROOT
from orchestrator.methods import METHODS
from orchestrator.planning.machine import Machine
from orchestrator.planning.plan import draft_plan
from orchestrator.planning.resolve import build_pipeline
from orchestrator.reporting.papers import FIRST_LINE, papers

NAMES = sorted(recipes())
PAPERS = [name for name in NAMES if name.startswith("papers/")]
ARITHMETIC = [name for name in NAMES if name.endswith("_arithmetic")]


def lines_of(recipe: str) -> list[str]:
    return (RECIPES / f"{recipe}.yaml").read_text().splitlines()


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_loaded_and_planned_and_nothing_of_it_would_be_refused(name: str) -> None:
    config = load_config(name)
    pipelines = {phase: build_pipeline(settings) for phase, settings in config.phases.items()}
    plan = draft_plan(config, pipelines, machine=Machine(2))
    assert plan.refusals == ()
    assert set(plan.roles) >= {role for pipeline in pipelines.values() for role in pipeline.trained}


def test_every_method_has_a_recipe_for_a_laptop() -> None:
    assert {name.removesuffix("_arithmetic") for name in ARITHMETIC} >= set(METHODS)
    for name in ARITHMETIC:
        config = load_config(name)
        assert name.removesuffix("_arithmetic") in {phase.method for phase in config.phases.values()}
        assert needs_nothing_from_elsewhere(config)


def needs_nothing_from_elsewhere(config: RunConfig) -> bool:
    paths = [config.model.path, *(str(phase.data.path) for phase in config.phases.values())]
    return all(path.startswith("example:") for path in paths) and config.roles.policy.gpus == 0


def test_recipes_of_papers_are_told_by_the_paper_with_its_number() -> None:
    listed = {paper.recipe: paper for paper in papers()}
    assert sorted(listed) == PAPERS
    assert listed["papers/alphapo"].number == "2501.03884"
    assert listed["papers/on_policy_distillation"].number == "2025"  # not on arXiv
    assert list(listed).index("papers/on_policy_distillation") > list(listed).index("papers/alphapo")  # by date
    assert listed["papers/icepop"].number == "2025"
    assert listed["papers/robust_dpo"].options == {"loss_type": "robust", "beta": 0.01, "label_smoothing": 0.1}


@pytest.mark.parametrize("name", PAPERS)
def test_a_papers_recipe_says_of_each_number_whether_it_is_the_papers(name: str) -> None:
    """`5.2`, `appendix B` or `table 3` of the paper, or ours."""
    first, *lines = lines_of(name)
    assert FIRST_LINE.match(first)
    for line in lines:
        if re.match(r"  (batch_size|learning_rate|epochs|beta|max_length|max_prompt_length):", line):
            assert re.search(r"  # (.*(\d|appendix|table|paper's)|(ours|our default)\b)", line), line


def test_a_paper_that_has_no_recipe_is_told_which_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match="did you mean papers/discopop"):
        load_config("papers/discopo")


def test_a_wheel_carries_every_recipe() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["orchestrator.recipes"]
    carried = {file.relative_to(RECIPES) for pattern in patterns for file in RECIPES.glob(pattern)}
    assert carried == {file.relative_to(RECIPES) for file in RECIPES.rglob("*.yaml")}
