"""Every shipped recipe trains: three steps of each phase in one process, a two-layer model in the place of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.loading import load_config, recipes
from orchestrator.config.schema import RunConfig
from orchestrator.planning.resolve import build_pipeline
from orchestrator.result import RunResult
from orchestrator.run import run
from tests.unit.source_stub import write_rows
from tests.unit.tiny import tiny_model_folder

STEPS = 3


def samples(name: str) -> bool:
    """Whether a phase of the recipe samples."""
    return any(build_pipeline(phase).generates for phase in load_config(name).phases.values())


NAMES = [name for name in recipes() if not samples(name)]  # sampling has its own tests, with engines
PAPERS = [name for name in NAMES if name.startswith("papers/")]
WITH_REFERENCE = ["dpo_arithmetic", "kto_arithmetic", "bco_arithmetic"]

ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "completions": lambda i: {"prompt": f"{i}+1=", "completion": str(i + 1)},
    "pairs": lambda i: {"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i + 11)},
    "labelled": lambda i: {"prompt": f"{i}+1=", "completion": str(i + i % 2), "label": i % 2 == 1},
}
ROWS["step_labels"] = lambda i: {
    "prompt": f"{i}+1=",
    "completions": [str(i), str(i + 1)],
    "labels": [i % 2 == 0, False],
}
ROWS["triples"] = lambda i: {**ROWS["pairs"](i), "reference": str(i + 1)}
ROWS["pairs_with_margin"] = lambda i: {**ROWS["pairs"](i), "margin": i % 4 / 3}
ROWS["answered_prompts"] = ROWS["completions"]
ROWS |= {f"{how}_labelled": ROWS["labelled"] for how in ("mismatched", "weighted")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"), hidden=32)


def started(config: RunConfig, model: Path, output: Path, replaced: dict[str, Any]) -> tuple[RunResult, list[dict]]:
    """The run in miniature, and its lines of metrics. `replaced`: keys of its data that are different."""
    phases: dict[str, Any] = {}
    for name, phase in config.phases.items():
        bema = phase.train.bema and phase.train.bema.model_copy(update={"update_freq": 1})
        short = {"steps": STEPS, "epochs": None, "batch_size": 8, "bema": bema}
        options = {**phase.options, **({"ref_model_sync_steps": 2} if "ref_model_sync_steps" in phase.options else {})}
        if any(stage.top_k for stage in build_pipeline(phase)):
            options["teacher_top_k"] = 8  # of the miniature's few tokens
        changed: dict[str, Any] = {
            "train": phase.train.model_copy(update=short),
            "data": phase.data.model_copy(update=replaced),
            "options": options,
        }
        if phase.evaluation is not None and phase.evaluation.rows is not None:
            few = phase.evaluation.rows.model_copy(update={"limit": 12})
            changed["evaluation"] = phase.evaluation.model_copy(update={"rows": few})
        phases[name] = phase.model_copy(update=changed)
    small = config.model.model_copy(update={"path": str(model), "dtype": "float32"})
    quiet = config.logging.model_copy(update={"trackers": (), "curves": False})
    roles = type(config.roles).model_validate(named_models(config, str(model)))
    updates = {"model": small, "phases": phases, "output": output, "logging": quiet, "roles": roles}
    result = run(config.model_copy(update=updates), local=True)
    return result, [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]


def named_models(config: RunConfig, model: str) -> dict[str, Any]:
    """What a laptop keeps of the recipe's roles: the kinds of those with names of their own, and their models,
    the miniature in the place of folders and hub names."""
    roles: dict[str, Any] = {}
    for name, settings in config.roles:
        given = getattr(settings, "model", None)
        if name not in type(config.roles).model_fields:
            roles[name] = {"kind": settings.kind}
        if given is not None:
            roles.setdefault(name, {})["model"] = given if "${" in given else model
    return roles


def steps_of(lines: list[dict]) -> list[dict]:
    return [line for line in lines if "loss" in line]


def assert_trained(result: RunResult, lines: list[dict], config: RunConfig) -> None:
    steps = steps_of(lines)
    assert len(steps) == STEPS * len(config.phases)
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in steps)
    assert result.model is not None and (result.model / "config.json").is_file()


def assert_evaluated(lines: list[dict], config: RunConfig) -> None:
    """Each phase with held-out rows at its start and its end; `every` is beyond the few steps."""
    total = 0
    for name, phase in config.phases.items():
        found = [line for line in lines if line["phase"] == name and "eval_loss" in line]
        expected = [total, total + STEPS] if phase.evaluation and phase.evaluation.rows else []
        assert [line["step"] for line in found] == expected
        assert all(math.isfinite(line["eval_loss"]) for line in found)
        assert len({line["eval_loss"] for line in found}) == len(found)
        total += STEPS


@pytest.mark.parametrize("name", [name for name in NAMES if name not in PAPERS])
def test_a_methods_recipe_trains_on_its_own_data(name: str, model: Path, tmp_path: Path) -> None:
    config = load_config(name)
    result, lines = started(config, model, tmp_path, {"limit": 64})
    assert_trained(result, lines, config)
    assert any(phase.evaluation for phase in config.phases.values())
    assert_evaluated(lines, config)
    if name in WITH_REFERENCE:
        steps = steps_of(lines)
        first = steps[STEPS]
        assert first["rewards/chosen"] == pytest.approx(0, abs=1e-6)  # it starts from its reference
        assert any(abs(line["rewards/chosen"]) > 1e-9 for line in steps[STEPS + 1 :])


def test_a_teacher_with_ranks_of_its_own_takes_the_model_of_the_phase_before(model: Path, tmp_path: Path) -> None:
    overrides = ["phases.gkd.options.teacher_top_k=4", "phases.teach.train.learning_rate=0.1"]
    config = load_config("gkd_arithmetic", overrides)
    result, lines = started(config, model, tmp_path, {"limit": 64})
    assert_trained(result, lines, config)
    assert_evaluated(lines, config)
    before, after = [line["eval_divergence"] for line in lines if "eval_divergence" in line]
    assert 0 < after < 0.95 * before


@pytest.mark.parametrize("name", PAPERS)
def test_a_papers_recipe_trains_on_rows_of_its_kind(name: str, model: Path, tmp_path: Path) -> None:
    config = load_config(name)
    (kind,) = (build_pipeline(phase).data.name for phase in config.phases.values())
    rows = write_rows(tmp_path / "rows.jsonl", map(ROWS[kind], range(16)))
    packs = any(phase.data.packing != "none" for phase in config.phases.values())  # as many as a batch takes
    replaced = {"path": str(rows), "columns": {}, "max_length": 8 if packs else 64, "max_prompt_length": None}
    result, lines = started(config, model, tmp_path, replaced)
    assert_trained(result, lines, config)
