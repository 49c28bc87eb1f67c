"""Phases that repeat: `rounds: {count: 3, phases: [make, dpo]}` becomes the phases make-1, dpo-1, make-2 ... Pure.

After this a run knows phases only: each of them is planned, finished, resumed and skipped like any other.

    ${phases.NAME.output}   of a phase that repeats: in its round, what that round made; in a later phase, the last one
    ${round}                the number of the round, from 1, in any text of a phase that repeats
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from actors.errors import ConfigError, did_you_mean
from orchestrator.config.schema import PhaseConfig, RoundsConfig, RunConfig

ROUND = "${round}"


def with_rounds(config: RunConfig) -> RunConfig:
    """The run with every round's phases written out. Raises ConfigError for phases that cannot repeat."""
    if config.rounds is None:
        return config
    _refuse_impossible(config.rounds, list(config.phases))
    repeated, count = config.rounds.phases, config.rounds.count
    _refuse_ambiguous(config, repeated)
    phases: dict[str, PhaseConfig] = {}
    for name, phase in config.phases.items():
        if name == repeated[0]:
            for number in range(1, count + 1):
                phases |= {
                    _named(each, number): _of_round(config.phases[each], repeated, number, number) for each in repeated
                }
        elif name not in repeated:
            phases[name] = _of_round(phase, repeated, count, None)
    if len(phases) != len(config.phases) + len(repeated) * (count - 1):
        raise ConfigError(f"rounds: a phase is called like that of a round ({', '.join(phases)}); give it another name")
    return config.model_copy(update={"phases": phases, "rounds": None})


def _named(phase: str, number: int) -> str:
    return f"{phase}-{number}"


def _of_round(phase: PhaseConfig, repeated: Sequence[str], leaving: int, number: int | None) -> PhaseConfig:
    """A phase whose placeholders stand for what the round `leaving` leaves; `number`: its own round, if it has one."""

    def replaced(text: str) -> Any:
        for name in repeated:
            text = text.replace(f"${{phases.{name}.", f"${{phases.{_named(name, leaving)}.")
        if number is None:
            return text
        return number if text == ROUND else text.replace(ROUND, str(number))

    tree = phase.model_dump(mode="json", exclude_unset=True)
    changed = _mapped(tree, replaced)
    return phase if changed == tree else PhaseConfig.model_validate(changed)


def _mapped(value: Any, change: Callable[[str], Any]) -> Any:
    """The same with every text in it changed, keys of mappings aside."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(each, change) for key, each in cast(Mapping[str, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_mapped(each, change) for each in cast(Sequence[Any], value)]
    return value


def _refuse_impossible(rounds: RoundsConfig, names: list[str]) -> None:
    for name in rounds.phases:
        if name not in names:
            hint = did_you_mean(name, names) or "."
            raise ConfigError(f"rounds.phases names {name!r}, which is no phase{hint} There are: {', '.join(names)}")
    first = names.index(rounds.phases[0])
    following = tuple(names[first : first + len(rounds.phases)])
    if rounds.phases != following:
        raise ConfigError(
            f"rounds.phases={list(rounds.phases)}: phases that repeat follow one another, as in `phases`, each once; "
            f"there the order is {', '.join(names)}"
        )


def _refuse_ambiguous(config: RunConfig, repeated: Sequence[str]) -> None:
    """A role starts once, with the model of one round."""
    for role, settings in config.roles:
        model: str | None = getattr(settings, "model", None)
        for name in repeated:
            if model is not None and f"${{phases.{name}." in model:
                raise ConfigError(
                    f"roles.{role}.model={model}: phase {name} repeats, and the role starts once; say with what which "
                    f"round leaves, e.g. ${{phases.{_named(name, 1)}.model}}. A role that follows a trained one from "
                    "round to round has no model of its own"
                )
