"""From what a configuration says about tools and environments to something that is found, checked and ready to travel.

driver   EnvironmentSpec(...).located() ──► is it there, do the chat template's schemas come out? else ConfigError
worker   spec.loaded() ──► make(): a new instance, as often as episodes run at the same time
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from actors.errors import ConfigError
from rewards import finding
from rewards.environment import Environment, ToolEnvironment, tool_methods
from rewards.finding import Kind
from rewards.options import required, signature_of
from rewards.shipped_environments import ENVIRONMENTS, FACTORIES, TOOLS
from rewards.user_calls import UserCalls
from rewards.user_code import UserCode

TOOL = Kind("tool", TOOLS, "rewards.shipped_environments.TOOLS")
ENVIRONMENT = Kind("environment", ENVIRONMENTS, "rewards.shipped_environments.ENVIRONMENTS")
FACTORY = Kind("environment factory", FACTORIES, "rewards.shipped_environments.FACTORIES")
ROUTED_BY = "environment"  # the column of the data set that chooses one of several

Schema = dict[str, Any]


@dataclass(frozen=True)
class Named:
    """A name in a configuration; once located, with the text of its file. Picklable."""

    fn: str
    kind: Kind
    code: UserCode | None = None

    def located(self) -> Named:
        fn, code = finding.located(self.fn, self.kind)
        return replace(self, fn=fn, code=code)

    def found(self) -> Any:
        there = finding.found(self.fn, self.code, self.kind)
        if not callable(there):
            raise ConfigError(f"{self.kind.word} {self.fn} is not callable, but a {type(there).__name__}")
        return there


@dataclass(frozen=True)
class EnvironmentSpec:
    """The tools of an episode and its environments, by the value of the data set's column `environment`; with the key
    "", there is one for all rows; with none at all, the tools alone. `options`: keyword arguments of the classes."""

    tools: tuple[Named, ...] = ()
    environments: Mapping[str, Named] = field(default_factory=dict[str, Named])
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tool_schemas: tuple[Schema, ...] = ()  # of `tools`, once they are located: making them takes seconds of imports

    @classmethod
    def of(
        cls,
        tools: Sequence[str],
        environment: str | None,
        factories: Mapping[str, str],
        options: Mapping[str, Any],
    ) -> EnvironmentSpec:
        """From what a configuration names; nothing is looked for yet."""
        named = {name: Named(fn, FACTORY) for name, fn in factories.items()}
        if environment is not None:
            named[""] = Named(environment, ENVIRONMENT)
        return cls(tuple(Named(fn, TOOL) for fn in tools), named, dict(options))

    @property
    def routed(self) -> bool:
        """Whether the column `environment` chooses."""
        return bool(self.environments.keys() - {""})

    def located(self) -> EnvironmentSpec:
        """The same, loadable in every worker. Raises ConfigError for what is not there, is of the wrong kind, or has no
        schema."""
        spec = replace(
            self,
            tools=tuple(tool.located() for tool in self.tools),
            environments={name: each.located() for name, each in self.environments.items()},
        )
        for each in spec.environments.values():
            _check_class(each, spec.options)
        return replace(spec, tool_schemas=tuple(schema_of(tool.found(), tool.fn) for tool in spec.tools))

    def schemas_of(self, environment: Environment) -> list[Schema]:
        """Of all tools that the model may call in an episode with this one. Raises ConfigError."""
        if isinstance(environment, ToolEnvironment):
            methods = tool_methods(environment.instance)
            return [*self.tool_schemas, *(schema_of(method, method.__qualname__) for method in methods)]
        tools = getattr(environment, "tools", None) or []
        return [schema_of(tool, getattr(tool, "__name__", "of an environment")) for tool in tools]

    def makers(self) -> dict[str, Callable[[UserCalls], Environment]]:
        """By the value of the column: what makes a new instance. Raises ConfigError."""
        functions = [tool.found() for tool in self.tools]
        if not self.environments:
            return {"": lambda call: ToolEnvironment(functions, None, call)}
        return {name: self._maker(each, functions) for name, each in self.environments.items()}

    def _maker(self, named: Named, functions: Sequence[Callable[..., Any]]) -> Callable[[UserCalls], Environment]:
        target = named.found()

        def make(call: UserCalls) -> Environment:
            instance = finding.constructed(target, self.options, named.fn, named.kind)
            if named.kind == ENVIRONMENT:
                return _checked(instance, named)
            if not callable(getattr(instance, "reset", None)):
                raise ConfigError(f"{named.kind.word} {named.fn}: its instances need a method `reset(**row)`")
            return ToolEnvironment(functions, instance, call)

        return make


def schema_of(tool: Any, name: str) -> Schema:
    """The JSON schema that a chat template shows of a tool: a typed function with a Google-style docstring, or a schema
    itself. Raises ConfigError."""
    if isinstance(tool, Mapping):
        return dict(tool)
    from transformers.utils.chat_template_utils import get_json_schema

    try:
        return get_json_schema(tool)
    except Exception as error:  # its own exceptions, and those of resolving annotations
        raise ConfigError(
            f"tool {name}: {error}\na tool is a function whose parameters have types, and lines in the docstring:\n"
            "    Args:\n        a: What it is."
        ) from None


def _check_class(named: Named, options: Mapping[str, Any]) -> None:
    """A class may load a model or open a game, so it is only looked at here, and built in the workers."""
    target, where = named.found(), f"{named.kind.word} {named.fn}"
    signature = signature_of(target, named.fn)
    takes = signature.parameters.values()
    if not any(each.kind is each.VAR_KEYWORD for each in takes):
        unknown = sorted(set(options) - set(signature.parameters))
        if unknown:
            there = ", ".join(signature.parameters) or "none"
            raise ConfigError(f"{where} has no option {unknown[0]!r}; it has {there} (episode.options)")
    missing = sorted(required(signature) - set(options))
    if missing:
        raise ConfigError(f"{where} needs the option {missing[0]!r} (episode.options)")
    if inspect.isclass(target):
        wanted = ("reset", "step") if named.kind == ENVIRONMENT else ("reset",)
        absent = [name for name in wanted if not callable(getattr(target, name, None))]
        if absent:
            other = "; a class whose methods are tools is an episode.environment_factory" if "step" in absent else ""
            raise ConfigError(f"{where}: {target.__name__} has no method `{absent[0]}`{other}")


def _checked(instance: Any, named: Named) -> Environment:
    if not isinstance(instance, Environment):
        raise ConfigError(f"{named.kind.word} {named.fn}: what it returns has no methods `reset` and `step`")
    return instance
