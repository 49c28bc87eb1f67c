"""Tables for the command line: methods, options, recipes, data, plans, status."""

from __future__ import annotations

import inspect
import json
import os
import re
import textwrap
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from actors.errors import ConfigError
from orchestrator.config import DataConfig, PhaseConfig, RunConfig
from orchestrator.data.report import LEARNED
from orchestrator.explain import unknown
from orchestrator.keys import as_yaml, every_key, keys_below, type_name
from orchestrator.metrics import METRICS_FILE, read
from orchestrator.pipeline import Pipeline

PREVIEW_LIMIT = 4_000  # characters of a rendered row
PLAIN_WIDTH = 160  # columns where the output is not a terminal, and COLUMNS does not say


def show_methods(*, papers: bool) -> None:
    from orchestrator.methods import METHODS

    table = _table("method", "data", "roles", "what it does", *(["source"] if papers else []))
    for name, method in METHODS.items():
        pipeline = _default_pipeline(method)
        data, roles = (pipeline.data.name, ", ".join(pipeline.roles)) if pipeline else ("", "")
        what, source = _described(method)
        table.add_row(name, data, roles, what, *([source] if papers else []))
    _print(table)
    if papers:
        _print(_papers())


def _papers() -> Table:
    """Which recipe holds which paper's settings."""
    from orchestrator.papers import papers

    table = _table("recipe", "paper", "arXiv", "method and options")
    for paper in papers():
        options = (f"{name}={as_yaml(value)}" for name, value in paper.options.items())
        table.add_row(paper.recipe, paper.title, paper.number, " ".join([paper.method, *options]))
    return table


def show_method(name: str) -> None:
    """A method's description, stages and options."""
    method = _method(name)
    _print(Text(inspect.cleandoc(method.__doc__ or "")))
    pipeline = _default_pipeline(method)
    if pipeline:
        _print(_stages(pipeline))
    options = _table("option", "default", "type")
    hints = typing.get_type_hints(method, include_extras=True)
    for option, parameter in inspect.signature(method).parameters.items():
        default = "required" if parameter.default is parameter.empty else as_yaml(parameter.default)
        options.add_row(option, default, Text(type_name(hints[option])))
    _print(options)


def show_recipes() -> None:
    from orchestrator.loading import recipes

    table = _table("recipe", "what it does")
    for name, what in recipes().items():
        table.add_row(name, what)
    _print(table)


def show_keys(prefix: str | None, *, everything: bool) -> None:
    """Keys with type, default and help: all that begin with `prefix`, everything, or those of the top level."""
    top_level = [
        key for key in every_key() if key.name in RunConfig.model_fields or key.name in PhaseConfig.model_fields
    ]
    found = keys_below(prefix) if prefix else list(every_key()) if everything else top_level
    for key in found:
        default = "" if key.type == "section" else ", required" if key.default is None else f", default {key.default}"
        head = Text(_filled(f"{key.name}  {key.type}{default}", first=""), "dim")
        head.stylize("not dim bold", 0, len(key.name))
        _print(head)
        _print(Text(_filled(key.help)))
    if not prefix and not everything:
        _print(Text("\ntroupe keys train: the keys below train; troupe keys --all: every key"))


def show_data(path: str, method: str, model: str | None, overrides: Sequence[str], **options: Any) -> None:
    """Without a model rows are read and not tokenised, so none is too long. `options` are keys of `DataConfig`, and
    `overrides` reach every key of a run. Raises DataError for data that the method cannot use."""
    from orchestrator.loading import config_of

    _method(method)
    data = {"path": path, "truncation": "error", **options}
    tree: dict[str, Any] = {"method": method, "data": data, "model": {"path": model} if model else {}}
    config = config_of(tree, overrides, "troupe check")
    for line in _examined(config, tokenised=model is not None):
        _print(line)


def _examined(config: RunConfig, *, tokenised: bool) -> list[Text]:
    """A report, and with a model a row as it is learned from."""
    from orchestrator.prepare import build_pipeline, load_tokenizer, model_length, resolve_model
    from orchestrator.source import open_source, validate

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


def show_status(folder: Path) -> None:
    """The driver's last report and the last line of its metrics."""
    from orchestrator.control import status

    _print(Text(json.dumps(status(folder), indent=2)))
    lines = read(folder / METRICS_FILE)
    if lines:
        _print(Text(json.dumps(lines[-1])))


def show_plan(config: RunConfig) -> bool:
    """What a run would be; True if nothing would be refused. Opens the data and launches nothing."""
    from orchestrator.placement import cluster_at_hand
    from orchestrator.plan import draft_plan, problems
    from orchestrator.plan_view import render
    from orchestrator.prepare import prepare

    prepared = prepare(config)
    pipelines = {phase.name: phase.pipeline for phase in prepared.phases}
    plan = draft_plan(config, pipelines, parameters=prepared.parameters)
    cluster = cluster_at_hand(config.cluster, plan)
    _print(render(plan, cluster))
    for phase in prepared.phases:
        _print(Text(f"\ndata of {phase.name}", "bold"))
        _print(Text("\n".join(phase.source.report.lines())))
        _print(coloured(phase.source.preview()))
    return not problems(plan, cluster)


def coloured(preview: str) -> Text:
    """A rendered row, what is learned from in colour; the middle of a long one is left out."""
    if len(preview) > PREVIEW_LIMIT:
        half = PREVIEW_LIMIT // 2
        preview = f"{preview[:half]} … {len(preview) - 2 * half:,} characters … {preview[-half:]}"
    text = Text(preview)
    text.highlight_regex(re.compile(f"{LEARNED[0]}[^{LEARNED[1]}]*{LEARNED[1]}?"), "green")
    return text


def _method(name: str) -> Callable[..., Pipeline]:
    from orchestrator.methods import METHODS

    if name not in METHODS:
        raise ConfigError(unknown("method", name, list(METHODS)))
    return METHODS[name]


def _default_pipeline(method: Callable[..., Pipeline]) -> Pipeline | None:
    """With every option at its default; None for a method that has options without one."""
    needed = [p for p in inspect.signature(method).parameters.values() if p.default is p.empty]
    return None if needed else method()


def _described(method: Callable[..., Pipeline]) -> tuple[str, str]:
    """First sentence of a method's docstring, and its source."""
    text = " ".join((method.__doc__ or "").split())
    source = re.search(r"Sources?: (.+?)\.?$", text)
    first = re.split(r"(?<=\.)\s", text, maxsplit=1)[0]
    return first.rstrip("."), source[1] if source else ""


def _stages(pipeline: Pipeline) -> Table:
    table = _table("stage", "reads", "writes", "part")
    for stage in pipeline:
        part = "collect" if stage in pipeline.collect else "learn"
        table.add_row(stage.name, ", ".join(sorted(stage.reads)), ", ".join(sorted(stage.writes)), part)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column == columns[0])
    return table


def _filled(text: str, first: str = "    ") -> str:
    """Broken into lines where the terminal ends; lines after the first are indented."""
    return textwrap.fill(text, _terminal().width, initial_indent=first, subsequent_indent="    ")


def _print(what: RenderableType) -> None:
    _terminal().print(what)


def _terminal() -> Console:
    terminal = Console(highlight=False)
    wide = not terminal.is_terminal and "COLUMNS" not in os.environ
    return Console(highlight=False, width=PLAIN_WIDTH) if wide else terminal
