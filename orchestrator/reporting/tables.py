"""Tables for the command line: methods, options, recipes, data, plans, status."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from actors.errors import ConfigError
from orchestrator.config.keys import as_yaml, every_key, keys_below
from orchestrator.config.schema import DataConfig, PhaseConfig, RunConfig
from orchestrator.data.report import LEARNED
from orchestrator.pipeline import Pipeline
from orchestrator.reporting.catalogue import as_data, described
from orchestrator.reporting.terminal_tables import Rows, entry

PREVIEW_LIMIT = 4_000  # characters of a rendered row
PLAIN_WIDTH = 170  # columns if the output is not a terminal and COLUMNS is not set


def show_methods(*, papers: bool, as_json: bool = False) -> None:
    """`as_json`: a list of the methods, or of the papers' recipes."""
    from orchestrator.methods import METHODS

    if as_json:
        from orchestrator.reporting.papers import papers as every_paper

        print(json.dumps([*map(asdict, every_paper())] if papers else [as_data(described(name)) for name in METHODS]))
        return
    sources = ("source",) if papers else ()
    rows = Rows("method", "data", "roles", "what it does", *sources, prose=("what it does", "source"))
    for method in map(described, METHODS):
        pipeline = method.pipeline
        data, roles = (pipeline.data.name, ", ".join(pipeline.roles)) if pipeline else ("", "")
        rows.add(method.name, data, roles, method.summary, *([method.source] if papers else []))
    _print(rows)
    if papers:
        _print(_papers())


def _papers() -> Rows:
    """The papers with their recipes."""
    from orchestrator.reporting.papers import papers

    rows = Rows("recipe", "paper", "arXiv", "method and options", prose=("paper", "method and options"))
    for paper in papers():
        options = (f"{name}={as_yaml(value)}" for name, value in paper.options.items())
        rows.add(paper.recipe, paper.title, paper.number, " ".join([paper.method, *options]))
    return rows


def show_method(name: str, *, as_json: bool = False) -> None:
    """A method's description, stages and options."""
    method = described(name)
    if as_json:
        print(json.dumps(as_data(method)))
        return
    _print(Text(method.text))
    if method.pipeline:
        _print(_stages(method.pipeline))
    options = Rows("option", "default", "type")
    for option in method.options:
        options.add(option.name, "required" if option.default is None else option.default, option.type)
    _print(options)


def show_recipes(*, as_json: bool = False) -> None:
    from orchestrator.config.loading import recipes

    if as_json:
        print(json.dumps([{"recipe": name, "what": what} for name, what in recipes().items()]))
        return
    rows = Rows("recipe", "what it does", prose=("what it does",))
    for name, what in recipes().items():
        rows.add(name, what)
    _print(rows)


def show_keys(prefix: str | None, *, everything: bool, as_json: bool = False) -> None:
    """Keys with type, default and help: all that begin with `prefix`, everything, or those of the top level."""
    top_level = RunConfig.model_fields | PhaseConfig.model_fields
    found = keys_below(prefix) if prefix else [key for key in every_key() if everything or key.name in top_level]
    if as_json:
        print(
            json.dumps(
                [{"key": each.name, "type": each.type, "default": each.default, "help": each.help} for each in found]
            )
        )
        return
    for key in found:
        default = "" if key.type == "section" else ", required" if key.default is None else f", default {key.default}"
        _print(entry(key.name, f"{key.type}{default}", key.help, width=_terminal().width))
    if not prefix and not everything:
        _print(Text("\ntroupe keys train: the keys below train; troupe keys --all: every key"))


def show_data(path: str, method: str, model: str | None, overrides: Sequence[str], **options: Any) -> None:
    """Without a model rows are read and not tokenised, so that none is too long. `options` are keys of `DataConfig`;
    `overrides` can set any key of a run. Raises DataError for data that the method cannot use."""
    from orchestrator.config.loading import config_of

    _method(method)
    data = {"path": path, "truncation": "error", **options}
    tree: dict[str, Any] = {"method": method, "data": data, "model": {"path": model} if model else {}}
    config = config_of(tree, overrides, "troupe check")
    for line in _examined(config, tokenised=model is not None):
        _print(line)


def _examined(config: RunConfig, *, tokenised: bool) -> list[Text]:
    """A report, and with a model a row with its trained tokens marked."""
    from orchestrator.data.source import open_source, validate
    from orchestrator.planning.model_files import model_length
    from orchestrator.planning.resolve import build_pipeline, load_tokenizer, resolve_model

    (phase,) = config.phases.values()
    kind, model = build_pipeline(phase).data, config.model
    if not tokenised:
        _refuse_limits_in_tokens(phase.data)
        return list(map(Text, validate(phase.data, kind).lines()))
    folder = resolve_model(model.path, seed=0)
    words = load_tokenizer(model.tokenizer or folder, model.chat_template, model.trust_remote_code)
    room = model_length(folder, model.trust_remote_code)
    source = open_source(phase.data, kind, words, seed=0, model_max_length=room)
    return [*map(Text, source.report.lines()), coloured(source.preview())]


def _refuse_limits_in_tokens(data: DataConfig) -> None:
    for name in ("max_length", "max_prompt_length"):
        if (limit := getattr(data, name)) is not None:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option}={limit} counts tokens, so it needs a tokenizer: name one by --model")


def show_lines(lines: Sequence[RenderableType]) -> None:
    for line in lines:
        _print(line)


def show_plan(config: RunConfig, *, as_json: bool = False) -> bool:
    """Prints the plan of a run, `as_json` in one line; True if the run would be accepted. Opens the data and launches
    nothing."""
    from orchestrator.cluster.ray_connection import cluster_at_hand
    from orchestrator.planning.plan import problems
    from orchestrator.planning.preconditions import refuse_engines, refuse_surroundings
    from orchestrator.planning.resolve import prepare
    from orchestrator.reporting.plan_report import as_data, render

    refuse_surroundings(config)
    prepared = prepare(config)
    plan = prepared.plan()
    refuse_engines(prepared, plan.roles)
    cluster = cluster_at_hand(config.cluster, plan)
    refused = problems(plan, cluster)
    if as_json:
        data = {phase.name: [*phase.source.report.lines(), phase.drawn] for phase in prepared.phases}
        print(json.dumps(as_data(plan, cluster, data)))
        return not refused
    _print(render(plan, cluster))
    for phase in prepared.phases:
        _print(Text(f"\ndata of {phase.name}", "bold"))
        _print(Text("\n".join([*phase.source.report.lines(), phase.drawn])))
        _print(coloured(phase.source.preview()))
    return not refused


def coloured(preview: str) -> Text:
    """A rendered row with coloured trained tokens; the middle of a long row is left out."""
    if len(preview) > PREVIEW_LIMIT:
        half = PREVIEW_LIMIT // 2
        preview = f"{preview[:half]} … {len(preview) - 2 * half:,} characters … {preview[-half:]}"
    text = Text(preview)
    text.highlight_regex(re.compile(f"{LEARNED[0]}[^{LEARNED[1]}]*{LEARNED[1]}?"), "green")
    return text


def _method(name: str) -> Callable[..., Pipeline]:
    from orchestrator.methods import find_method

    return find_method(name)


def _stages(pipeline: Pipeline) -> Rows:
    rows = Rows("stage", "reads", "writes", "part")
    for stage in pipeline:
        part = "collect" if stage in pipeline.collect else "learn"
        rows.add(stage.name, ", ".join(sorted(stage.reads)), ", ".join(sorted(stage.writes)), part)
    return rows


def _print(what: RenderableType) -> None:
    _terminal().print(what)


def _terminal() -> Console:
    terminal = Console(highlight=False)
    wide = not terminal.is_terminal and "COLUMNS" not in os.environ
    return Console(highlight=False, width=PLAIN_WIDTH) if wide else terminal
