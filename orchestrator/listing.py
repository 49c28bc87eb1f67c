"""Tables for the command line: methods, options, recipes, data, plans, status."""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from actors.errors import ConfigError
from orchestrator.config import DataConfig, RunConfig
from orchestrator.explain import unknown
from orchestrator.metrics import METRICS_FILE, read
from orchestrator.pipeline import Pipeline


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
        options = (f"{name}={_yaml(value)}" for name, value in paper.options.items())
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
        default = "required" if parameter.default is parameter.empty else _yaml(parameter.default)
        options.add_row(option, default, Text(_type_name(hints[option])))
    _print(options)


def show_recipes() -> None:
    from orchestrator.loading import recipes

    table = _table("recipe", "what it does")
    for name, what in recipes().items():
        table.add_row(name, what)
    _print(table)


def show_data(path: str, method: str, model: str | None, **options: Any) -> None:
    """Without a model rows are read and not tokenised, so none is too long. `options` are keys of `DataConfig`. Raises
    DataError for data that the method cannot use."""
    pipeline = _default_pipeline(_method(method))
    if pipeline is None:
        raise ConfigError(f"method {method} has options without a default, so its data cannot be checked by itself")
    for line in _examined(_data_config(path, model, options), pipeline, model):
        _print(Text(line))


def _data_config(path: str, model: str | None, options: dict[str, Any]) -> DataConfig:
    if model is None and (limit := next((name for name, value in options.items() if "length" in name and value), None)):
        option = limit.replace("_", "-")
        raise ConfigError(f"--{option}={options[limit]} counts tokens, so it needs a tokenizer: name one by --model")
    return DataConfig(path=path, truncation="error", **options)


def _examined(data: DataConfig, pipeline: Pipeline, model: str | None) -> list[str]:
    """A report, and with a model a row as it is learned from."""
    from orchestrator.prepare import load_tokenizer, model_length, resolve_model
    from orchestrator.source import open_source, validate

    if model is None:
        return validate(data, pipeline.data).lines()
    folder = resolve_model(model, seed=0)
    words = load_tokenizer(folder, None, trust_remote_code=False)
    source = open_source(data, pipeline.data, words, seed=0, model_max_length=model_length(folder))
    return [*source.report.lines(), source.preview()]


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
        _print(Text("\n".join([*phase.source.report.lines(), phase.source.preview()])))
    return not problems(plan, cluster)


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


def _type_name(annotation: Any) -> str:
    """A type as a user writes values of it: `float > 0 | none`, `token | sequence`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is Annotated:
        return " ".join([_type_name(arguments[0]), *_limits(arguments[1:])])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_type_name, arguments))
    if annotation is types.NoneType:
        return "none"
    return str(annotation) if arguments else getattr(annotation, "__name__", str(annotation))


def _limits(constraints: tuple[Any, ...]) -> Iterator[str]:
    """`> 0`, `<= 1` from pydantic's fields."""
    for field in constraints:
        for limit in getattr(field, "metadata", ()):
            for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
                if hasattr(limit, name):
                    yield f"{sign} {getattr(limit, name):g}"


def _yaml(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column == columns[0])
    return table


def _print(what: RenderableType) -> None:
    terminal = Console(highlight=False)
    (terminal if terminal.is_terminal else Console(highlight=False, width=160)).print(what)
