"""A Grafana dashboard of the gauges that runs export on Ray's metrics port. `troupe grafana` prints it, and
`deploy/grafana/troupe.json` is what it prints.

`*` in a metric's name stands for anything: a reward's or a role's name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from orchestrator.reporting.metrics import GAUGE_TAGS, gauge_name

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT = 8, 8  # of a panel; a row is 24 wide
LABELS = ", ".join(f'{tag}=~"${tag}"' for tag in GAUGE_TAGS)
LEGEND = " ".join(f"{{{{{tag}}}}}" for tag in GAUGE_TAGS)


@dataclass(frozen=True)
class Panel:
    """`unit`: Grafana's name of it. `divided_by`: a metric that each of `metrics` is divided by. `only_with`: only the
    phases of runs that have that metric are shown; `without`: only those that do not. `description`: what Grafana shows
    when a reader points at the title."""

    title: str
    metrics: Sequence[str]
    unit: str = "short"
    stacked: bool = False
    divided_by: str | None = None
    only_with: str | None = None
    without: str | None = None
    description: str = ""

    @property
    def others(self) -> list[str]:
        """Metrics that it asks for beside those that it shows."""
        return [name for name in (self.divided_by, self.only_with, self.without) if name is not None]


FIRST_ERROR = "*first_error"  # a process reward model's, whose `accuracy` is of steps, and a reward model's of pairs


ROWS: dict[str, Sequence[Panel]] = {
    "Learning": (
        Panel("reward", ("reward", "eval_reward")),
        Panel("each reward", ("rewards/*/mean",)),
        Panel("loss", ("*loss",)),
        Panel(
            "log-ratio to the reference, nats",
            ("kl", "objective/kl"),
            description="kl: of a token; objective/kl: of a completion. Of the policy's own samples its mean is the KL "
            "divergence from the reference. Of rows that others sampled it is not, and may be below 0.",
        ),
        Panel("entropy, nats", ("*entropy",)),
        Panel(
            "preferences in the right order",
            ("*rewards/accuracies", "accuracy", "eval_accuracy"),
            "percentunit",
            without=FIRST_ERROR,
        ),
        Panel("steps of answers judged rightly", ("accuracy", "eval_accuracy"), "percentunit", only_with=FIRST_ERROR),
        Panel("answers whose first wrong step is found", (FIRST_ERROR,), "percentunit"),
        Panel("gradient norm", ("*grad_norm",)),
        Panel("learning rate", ("*learning_rate",)),
        Panel(
            "ratio of trained to sampling policy", ("sampling/importance_sampling_ratio/mean", "clip_ratio/region_mean")
        ),
    ),
    "Samples": (
        Panel("length of completions, tokens", ("completions/mean_length", "completions/max_length")),
        Panel("completions that were cut off", ("completions/clipped_ratio",), "percentunit"),
        Panel("prompt groups of a step", ("groups/kept", "groups/filtered", "groups/expired", "groups/lost")),
        Panel("age of the weights that sampled, versions", ("staleness/mean", "staleness/max")),
        Panel("groups without any difference in reward", ("frac_reward_zero_std",), "percentunit"),
        Panel("failed calls of rewards", ("rewards/*/failed/*",)),
    ),
    "Time": (
        Panel(
            "a step's time by part",
            ("time/collect", "time/*.infer", "time/*.update", "time/publish", "time/rest"),
            "s",
            stacked=True,
        ),
        Panel("generation and scoring, beside training if it runs ahead", ("time/generate", "time/score"), "s"),
        Panel("a reward's call", ("rewards/*/seconds",), "s"),
        Panel("tokens trained on, per second", ("num_tokens",), divided_by="step_time"),
        Panel("step time", ("step_time",), "s"),
        Panel("step", ("step",)),
    ),
}


def metrics() -> list[str]:
    """Every metric that the dashboard asks for, in Troupe's names."""
    panels = [panel for row in ROWS.values() for panel in row]
    asked = [metric for panel in panels for metric in (*panel.metrics, *panel.others)]
    return list(dict.fromkeys(asked))


def selected(metric: str) -> str:
    """The series of a metric, of the chosen runs and phases, in Prometheus' language."""
    if "*" not in metric:
        return f"ray_{gauge_name(metric)}{{{LABELS}}}"
    parts = [gauge_name(part).removeprefix("troupe_") for part in metric.split("*")]
    return f'{{__name__=~"ray_troupe_{".*".join(parts)}", {LABELS}}}'


def as_file() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


def dashboard() -> dict[str, Any]:
    """Of Grafana 9 and newer."""
    return {
        "uid": "troupe",
        "title": "Troupe",
        "tags": ["ray", "troupe"],
        "schemaVersion": 38,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,  # one cursor in all panels
        "refresh": "10s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [_source(), *map(_choice, GAUGE_TAGS)]},
        "panels": list(_panels()),
    }


def _panels() -> Iterator[dict[str, Any]]:
    ids, y = count(1), 0
    for title, panels in ROWS.items():
        yield {"id": next(ids), "type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": _at(0, y)}
        y += 1
        for index, panel in enumerate(panels):
            place = {"x": index * WIDTH % 24, "y": y + index * WIDTH // 24 * HEIGHT, "w": WIDTH, "h": HEIGHT}
            yield {"id": next(ids), "gridPos": place, **_panel(panel)}
        y += -(-len(panels) * WIDTH // 24) * HEIGHT


def _at(x: int, y: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": 24, "h": 1}


def _panel(panel: Panel) -> dict[str, Any]:
    several = len(panel.metrics) > 1 or "*" in panel.metrics[0]
    legend = f"{{{{__name__}}}} {LEGEND}" if several else LEGEND
    divisor = "" if panel.divided_by is None else f" / {selected(panel.divided_by)}"
    same = f"on ({', '.join(GAUGE_TAGS)})"
    limit = "" if panel.only_with is None else f" and {same} {selected(panel.only_with)}"
    limit += "" if panel.without is None else f" unless {same} {selected(panel.without)}"
    drawn = {"lineWidth": 1, "fillOpacity": 30 if panel.stacked else 0, "showPoints": "never", "spanNulls": True}
    stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "custom": {**drawn, "stacking": stacking}},
            "overrides": [],
        },
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "transformations": [_renamed()] if several else [],
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": SOURCE,
                "expr": f"{selected(metric)}{divisor}{limit}",
                "legendFormat": legend,
            }
            for index, metric in enumerate(panel.metrics)
        ],
    }


def _renamed() -> dict[str, Any]:
    return {"id": "renameByRegex", "options": {"regex": "ray_troupe_(.*)", "renamePattern": "$1"}}


def _source() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "refresh": 1}


def _choice(tag: str) -> dict[str, Any]:
    """A list of a tag's values to choose from; at first all."""
    query = f"label_values(ray_{gauge_name('step')}, {tag})"
    return {
        "name": tag,
        "label": tag,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": tag},
        "definition": query,
        "refresh": 2,  # when the time range changes
        "sort": 4,  # the newest run first
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def matches(metric: str, name: str) -> bool:
    """Whether a metric of the dashboard, with its `*`, is that of this name."""
    return re.fullmatch(".*".join(map(re.escape, metric.split("*"))), name) is not None
