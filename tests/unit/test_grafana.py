"""The Grafana dashboard asks for gauges that runs export, and the file that ships is the one that is printed."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from orchestrator.import_pin import ROOT
from orchestrator.reporting.grafana import as_file, dashboard, matches, metrics, selected
from orchestrator.reporting.metrics import GAUGE_TAGS, gauge_name
from tests.dashboard_metrics import IN_OTHER_RUNS


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def test_the_file_is_what_the_command_prints():
    assert (ROOT / "deploy" / "grafana" / "troupe.json").read_text() == as_file()


def test_every_query_names_gauges_of_troupe_with_the_tags_that_they_have_and_no_others():
    queries = [target["expr"] for panel in panels() for target in panel["targets"]]
    assert len(queries) == len(set(queries)) > 20
    for query in queries:
        assert set(re.findall(r"(\w+)=~\"\$", query)) == set(GAUGE_TAGS)
        assert "ray_troupe_" in query


@pytest.mark.parametrize(
    ("metric", "name", "others"),
    [
        ("reward", "reward", ["reward_std", "eval_reward"]),
        ("rewards/*/mean", "rewards/exact_match/mean", ["rewards/margins", "eval_rewards/x/mean"]),
        ("*loss", "value/loss", ["losses"]),
        ("*first_error", "eval_first_error", ["first_errors"]),
        ("time/*.update", "time/policy.update", ["time/policy.infer"]),
    ],
)
def test_a_query_selects_the_gauge_of_its_metric_and_not_that_of_another(metric: str, name: str, others: list[str]):
    """As Prometheus does it: a name, or a regular expression that must match all of it."""
    found = re.match(r'(?:(\w+)\{|\{__name__=~"([^"]+)")', selected(metric))
    assert found is not None
    pattern = found[1] or found[2]
    assert re.fullmatch(pattern, f"ray_{gauge_name(name)}") and matches(metric, name)
    for other in others:
        assert not re.fullmatch(pattern, f"ray_{gauge_name(other)}") and not matches(metric, other)


def test_the_accuracy_of_a_process_reward_model_is_not_shown_as_one_of_preferences():
    """As Prometheus joins them: series of a run's phase that has the metric `first_error`, or has it not."""
    expressions = {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in panels()}
    joined = f" on (run, phase) {selected('*first_error')}"
    for name in ("accuracy", "eval_accuracy"):
        assert f"{selected(name)} unless{joined}" in expressions["preferences in the right order"]
        assert f"{selected(name)} and{joined}" in expressions["steps of answers judged rightly"]
    everywhere = [query for queries in expressions.values() for query in queries]
    assert sum(query.startswith(selected("accuracy")) for query in everywhere) == 2


def test_a_mean_that_is_no_divergence_is_not_called_one():
    [panel] = [panel for panel in panels() if any("objective_kl" in target["expr"] for target in panel["targets"])]
    assert panel["title"] == "log-ratio to the reference, nats" and "may be below 0" in panel["description"]


def test_panels_do_not_overlap_and_have_numbers_of_their_own():
    places = [panel["gridPos"] for panel in dashboard()["panels"]]
    spans = [(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])) for at in places]
    cells = [(x, y) for columns, rows in spans for x in columns for y in rows]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) == 23
    numbers = [panel["id"] for panel in dashboard()["panels"]]
    assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize("metric", IN_OTHER_RUNS)
def test_a_metric_that_no_run_of_the_other_test_has_is_written_somewhere_in_the_code(metric: str):
    """The others: tests/contract/test_online_runs.py."""
    file, text = IN_OTHER_RUNS[metric]
    assert metric in metrics()
    assert text in (ROOT / file).read_text()


def test_the_dashboard_is_plain_json():
    assert json.loads(as_file())["uid"] == "troupe"
